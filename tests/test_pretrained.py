"""Starting from a checkpoint: the encoder is the library's own network, or a sentence says what does not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file
from tiny import tiny_federation
from torch import Tensor

from mmfm_core.artifacts import sha256_of
from mmfm_core.config.model import Model
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import full_model

import timm  # isort: skip  (after torchvision's operators)
from monai.networks.nets import ViT  # isort: skip
from transformers import BertConfig, BertForMaskedLM, BertModel  # isort: skip


def pinned(artifacts: Path, source: Path) -> dict[str, str]:
    """Put a checkpoint where a site has it, and say how a document names it."""
    sha256 = sha256_of(source)
    artifacts.mkdir(exist_ok=True)
    (shutil.copytree if source.is_dir() else shutil.copyfile)(source, artifacts / sha256)
    return {"path": source.name, "sha256": sha256}


def saved(folder: Path, state: dict[str, Tensor]) -> Path:
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, folder / "weights.safetensors")
    return folder / "weights.safetensors"


def document(name: str, modality: dict[str, Any], encoder: dict[str, Any], **model: Any) -> Model:
    tiny = tiny_federation().model.model_dump(mode="json") | model
    tiny["modalities"][name] |= modality
    tiny["encoders"][name] = encoder
    return Model.model_validate(tiny)


def image(side: int, channels: int, **encoder: Any) -> Model:
    return document("scan", {"size": [side, side], "channels": channels}, {"type": "timm", "grid": 2} | encoder)


def note(pretrained: dict[str, str], max_length: int = 24, **encoder: Any) -> Model:
    return document("note", {"max_length": max_length}, {"type": "bert", "pretrained": pretrained} | encoder)


def volume(pretrained: dict[str, str], size: tuple[int, int, int] = (8, 8, 16), depth: int = 2) -> Model:
    encoder = {"type": "vit3d", "patch_size": 4, "depth": depth, "pretrained": pretrained}
    tiny = tiny_federation().model.model_dump(mode="json")
    tiny["modalities"]["scan"] = {"kind": "volume3d", "size": size}
    tiny["encoders"]["scan"] = encoder
    return Model.model_validate(tiny)


@pytest.mark.parametrize("architecture", ["vit_tiny_patch16_224", "tf_efficientnet_lite0"])
def test_a_timm_trunk_computes_what_the_checkpoints_network_does(tmp_path: Path, architecture: str) -> None:
    sized = {"img_size": 32} if architecture.startswith("vit") else {}
    theirs = timm.create_model(architecture, **sized).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.01)
    name = pinned(tmp_path / "artifacts", saved(tmp_path, theirs.state_dict()))
    config = image(32, 3, architecture=architecture, pretrained=name, grid=1)
    encoder = full_model(config, 0, tmp_path / "artifacts").encoders["scan"].eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.trunk.forward_features(x), theirs.forward_features(x))


def test_a_trunk_for_grey_images_sees_them_as_the_colour_network_does(tmp_path: Path) -> None:
    theirs = timm.create_model("convnext_atto").eval()
    name = pinned(tmp_path / "artifacts", saved(tmp_path, theirs.state_dict()))
    config = image(64, 1, architecture="convnext_atto", pretrained=name)
    encoder = full_model(config, 0, tmp_path / "artifacts").encoders["scan"].eval()
    grey = torch.randn(2, 1, 64, 64)
    expected = theirs.forward_features(grey.expand(-1, 3, -1, -1))
    torch.testing.assert_close(encoder.trunk.forward_features(grey), expected, rtol=1e-4, atol=1e-5)


def test_positions_are_resampled_to_another_image_size(tmp_path: Path) -> None:
    theirs = timm.create_model("vit_tiny_patch16_224", img_size=64)
    ramp = torch.arange(4.0).repeat(4, 1).flatten()  # grows from left to right
    with torch.no_grad():
        theirs.pos_embed[0, 1:] = ramp[:, None]
    name = pinned(tmp_path / "artifacts", saved(tmp_path, theirs.state_dict()))
    config = image(128, 3, architecture="vit_tiny_patch16_224", pretrained=name)
    trunk = full_model(config, 0, tmp_path / "artifacts").encoders["scan"].trunk
    grid = trunk.pos_embed[0, 1:, 0].reshape(8, 8)
    assert torch.equal(trunk.pos_embed[:, :1], theirs.pos_embed[:, :1])
    torch.testing.assert_close(grid, grid[:1].expand(8, -1), rtol=0, atol=1e-4)
    assert (grid[0].diff() > 0).all()


def test_a_volume_encoder_computes_what_monais_network_does(tmp_path: Path) -> None:
    theirs = ViT(1, (8, 8, 16), 4, hidden_size=12, mlp_dim=48, num_layers=2, num_heads=3).eval()
    name = pinned(tmp_path / "artifacts", saved(tmp_path, theirs.state_dict()))
    encoder = full_model(volume(name), 0, tmp_path / "artifacts").encoders["scan"].eval()
    x = torch.randn(2, 1, 8, 8, 16)
    last, hidden = theirs(x)
    torch.testing.assert_close(encoder.features(x), torch.stack([last, hidden[0]], 1))


def bert_folder(folder: Path, width: int = 16, vocabulary: int = 260, positions: int = 32) -> BertModel:
    """A tiny BERT with the byte tokenizer's vocabulary, with the heads of pre-training that a published one has."""
    config = BertConfig(
        vocab_size=vocabulary,
        hidden_size=width,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=32,
        max_position_embeddings=positions,
        pad_token_id=0,
    )
    model = BertForMaskedLM(config)
    model.save_pretrained(folder)
    return model.bert.eval()


@pytest.mark.parametrize("width", [12, 16])
def test_a_text_encoder_computes_what_the_transformers_folder_does(tmp_path: Path, width: int) -> None:
    theirs = bert_folder(tmp_path / "bert", width)
    encoder = full_model(note(pinned(tmp_path / "artifacts", tmp_path / "bert")), 0, tmp_path / "artifacts").encoders[
        "note"
    ]
    encoder.eval()
    ids = torch.randint(3, 259, (3, 24))
    ids[1, 7:] = 0
    expected = theirs(ids, attention_mask=ids != 0).last_hidden_state
    torch.testing.assert_close(encoder.features(ids)[:, 0], expected)
    projected = encoder.tokens(encoder.features(ids), ids).x
    torch.testing.assert_close(projected, expected if width == 12 else encoder.project(expected))
    assert projected.shape == (3, 24, 12)


def test_the_width_of_a_checkpoint_is_not_said_twice(tmp_path: Path) -> None:
    with pytest.raises(ValidationError, match=r"encoders\.note\.depth: the checkpoint's config\.json says it"):
        note({"path": "bert", "sha256": "0" * 64}, depth=2)
    config = note({"path": "bert", "sha256": "0" * 64})
    assert Model.model_validate(config.model_dump(mode="json")) == config


def test_a_checkpoint_reads_the_same_numbers_of_tokens_as_the_document(tmp_path: Path) -> None:
    bert_folder(tmp_path / "bert")
    name = pinned(tmp_path / "artifacts", tmp_path / "bert")
    with pytest.raises(MmfmError, match=r"model\.modalities\.note\.max_length: .* at most 32 tokens"):
        full_model(note(name, max_length=33), 0, tmp_path / "artifacts")
    bert_folder(tmp_path / "small", vocabulary=100)
    name = pinned(tmp_path / "artifacts", tmp_path / "small")
    with pytest.raises(MmfmError, match=r"the checkpoint has 100 tokens and padding 0, and model\.tokenizer 260 and 0"):
        full_model(note(name), 0, tmp_path / "artifacts")


def test_what_no_weights_are_read_from_stays_as_it_was(tmp_path: Path) -> None:
    """A checkpoint changes its own trunk, and nothing that is drawn at random elsewhere."""
    bert_folder(tmp_path / "bert", 12)
    name = pinned(tmp_path / "artifacts", tmp_path / "bert")
    with_it = full_model(note(name), 0, tmp_path / "artifacts").state_dict()
    without = full_model(tiny_federation().model, 0).state_dict()
    for key in with_it.keys() & without.keys():
        if not key.startswith("encoders.note."):
            assert torch.equal(with_it[key], without[key]), key


@pytest.mark.parametrize("kind", ["timm", "vit3d", "bert"])
def test_a_checkpoint_that_is_absent_or_another_one_is_refused(tmp_path: Path, kind: str) -> None:
    name = {"path": "weights", "sha256": "1" * 64}
    config = {
        "timm": lambda: image(32, 1, architecture="resnet18", pretrained=name),
        "vit3d": lambda: volume(name),
        "bert": lambda: note(name),
    }[kind]()
    field = f"model.encoders.{'note' if kind == 'bert' else 'scan'}.pretrained: "
    with pytest.raises(MmfmError) as absent:
        full_model(config, 0, tmp_path)
    assert str(absent.value).startswith(f"{field}the federation needs 'weights'")
    (tmp_path / name["sha256"]).write_bytes(b"something else")
    with pytest.raises(MmfmError) as other:
        full_model(config, 0, tmp_path)
    assert str(other.value).startswith(field)
    assert "its sha256 is another one" in str(other.value)


def test_a_file_that_is_no_safetensors_is_refused_and_not_unpickled(tmp_path: Path) -> None:
    torch.save(timm.create_model("resnet18").state_dict(), tmp_path / "weights.pth")
    name = pinned(tmp_path / "artifacts", tmp_path / "weights.pth")
    with pytest.raises(MmfmError, match=r"scan\.pretrained: 'weights.pth' is not a safetensors file; save"):
        full_model(image(32, 3, architecture="resnet18", pretrained=name), 0, tmp_path / "artifacts")


def broken(state: dict[str, Tensor], how: str) -> dict[str, Tensor]:
    if how == "missing":
        return {name: tensor for name, tensor in state.items() if name != "layer2.0.conv1.weight"}
    if how == "more":
        return state | {"layer5.weight": torch.zeros(1)}
    return state | {"layer3.0.conv1.weight": torch.zeros(1, 2, 3, 3)}


@pytest.mark.parametrize(
    ("how", "said"),
    [
        ("missing", "for 'layer2.0.conv1.weight' the model has [128, 64, 3, 3] and the file none"),
        ("more", "for 'layer5.weight' the model has none and the file [1]"),
        ("shape", "for 'layer3.0.conv1.weight' the model has [256, 128, 3, 3] and the file [1, 2, 3, 3]"),
    ],
)
def test_a_timm_checkpoint_of_another_architecture_is_refused(tmp_path: Path, how: str, said: str) -> None:
    name = pinned(tmp_path / "artifacts", saved(tmp_path, broken(timm.create_model("resnet18").state_dict(), how)))
    with pytest.raises(MmfmError) as error:
        full_model(image(32, 1, architecture="resnet18", pretrained=name), 0, tmp_path / "artifacts")
    assert str(error.value).startswith("model.encoders.scan.pretrained: the checkpoint is of another architecture: ")
    assert said in str(error.value)


def test_a_vit_that_reads_a_convolutional_network_says_so(tmp_path: Path) -> None:
    name = pinned(tmp_path / "artifacts", saved(tmp_path, timm.create_model("resnet18").state_dict()))
    config = image(32, 3, architecture="vit_tiny_patch16_224", pretrained=name)
    with pytest.raises(MmfmError, match=r"another architecture: for 'cls_token' the model has .* and the file none"):
        full_model(config, 0, tmp_path / "artifacts")


@pytest.mark.parametrize(
    ("size", "depth", "key"),
    [((8, 8, 8), 2, "patch_embedding.position_embeddings"), ((8, 8, 16), 3, "blocks.2.mlp.linear1.weight")],
)
def test_a_monai_checkpoint_of_another_architecture_is_refused(
    tmp_path: Path, size: tuple[int, int, int], depth: int, key: str
) -> None:
    theirs = ViT(1, (8, 8, 16), 4, hidden_size=12, mlp_dim=48, num_layers=2, num_heads=3)
    name = pinned(tmp_path / "artifacts", saved(tmp_path, theirs.state_dict()))
    with pytest.raises(MmfmError, match=rf"scan\.pretrained: the checkpoint is of another architecture: for '{key}'"):
        full_model(volume(name, size, depth), 0, tmp_path / "artifacts")


def test_a_folder_that_holds_no_bert_is_refused(tmp_path: Path) -> None:
    bert_folder(tmp_path / "bert")
    settings = json.loads((tmp_path / "bert" / "config.json").read_text())
    (tmp_path / "bert" / "config.json").write_text(json.dumps(settings | {"model_type": "gpt2"}))
    name = pinned(tmp_path / "artifacts", tmp_path / "bert")
    with pytest.raises(MmfmError, match=r"'bert' is of type 'gpt2' in its config.json, and must be a 'bert'"):
        full_model(note(name), 0, tmp_path / "artifacts")


@pytest.mark.parametrize("damage", ["layer missing", "no weights", "no config", "pickle only"])
def test_a_damaged_folder_is_refused(tmp_path: Path, damage: str) -> None:
    model, folder = bert_folder(tmp_path / "bert"), tmp_path / "bert"
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    said = "cannot be read as a BERT"
    if damage == "layer missing":
        del state["encoder.layer.0.output.dense.weight"]
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        said = "does not hold 'encoder.layer.0.output.dense.weight'"
    elif damage == "no config":
        (folder / "config.json").unlink()
        said = "must be a folder with config.json and model.safetensors"
    else:
        (folder / "model.safetensors").unlink()
        if damage == "pickle only":
            torch.save(state, folder / "pytorch_model.bin")
    name = pinned(tmp_path / "artifacts", folder)
    with pytest.raises(MmfmError, match=r"model\.encoders\.note\.pretrained: 'bert'") as error:
        full_model(note(name), 0, tmp_path / "artifacts")
    assert said in str(error.value)
