"""Adapters: they start as nothing, the same everywhere, are told apart by name, and their gradients by patient."""

from typing import Any

import pytest
import torch
from per_study import assert_gradients_separate
from test_models import STUDIES, random_batch
from tiny import tiny_federation

from mmfm_core.config import Federation
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.parameters import block_of, check_patterns, fates_of, held

TARGETS = ["encoders.scan.vit.blocks.*.attn.qkv", "encoders.note.*.query", "fusion.*"]
DUAL = {"shared": {"rank": 2, "alpha": 4, "targets": TARGETS}, "local": {"rank": 3, "targets": TARGETS[:1]}}
PARAMETERS = {
    "frozen": ["encoders.*"],
    "shared": ["*.lora_*.shared.*", "fusion.*", "heads.*"],
    "local": ["*.lora_*.local.*"],
}
STAGES = [{"name": "train", "tasks": {"disease": {}}}]


def adapted(adapters: dict[str, Any] = DUAL, **changes: Any) -> Federation:
    document = tiny_federation(**changes).model_dump(mode="json")
    document["model"]["fusion"] = {"type": "joint", "depth": 1}
    document["model"]["adapters"] = adapters
    return Federation.model_validate(document)


def names_of(model: MultimodalModel, adapter: str) -> list[str]:
    return [name for name in model.state_dict() if f".{adapter}." in name and ".lora_" in name]


def randomised(model: MultimodalModel, *adapters: str) -> MultimodalModel:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if any(f".{adapter}." in name for adapter in adapters) and ".lora_" in name:
                parameter.normal_(std=0.3, generator=generator)
    return model


def test_a_new_adapter_changes_nothing_and_nothing_else_is_drawn_otherwise() -> None:
    plain, dual = full_model(adapted({}).model, 0).eval(), full_model(adapted().model, 0).eval()
    batch = random_batch()
    assert torch.equal(dual(batch, ["disease"])["disease"], plain(batch, ["disease"])["disease"])
    own = {name.replace(".base_layer", ""): t for name, t in dual.state_dict().items() if ".lora_" not in name}
    assert own.keys() == plain.state_dict().keys()
    for name, tensor in plain.state_dict().items():
        assert torch.equal(own[name], tensor), name
    assert all(parameter.requires_grad for parameter in dual.parameters())


def test_both_adapters_add_their_product_to_the_layer() -> None:
    model = randomised(full_model(adapted().model, 0), "shared", "local").eval()
    layer = model.encoders["scan"].vit.blocks[0].attn.qkv
    x = torch.randn(5, 12)
    a, b = ({n: getattr(layer, part)[n].weight for n in DUAL} for part in ("lora_A", "lora_B"))
    expected = layer.base_layer(x) + 4 / 2 * x @ a["shared"].T @ b["shared"].T + 8 / 3 * x @ a["local"].T @ b["local"].T
    torch.testing.assert_close(layer(x), expected)
    assert a["shared"].shape == (2, 12)
    assert b["local"].shape == (36, 3)


def test_only_named_layers_are_adapted() -> None:
    names = names_of(full_model(adapted().model, 0), "shared")
    layers = {name.partition(".lora_")[0] for name in names}
    assert {layer for layer in layers if layer.startswith("encoders")} == {
        "encoders.scan.vit.blocks.0.attn.qkv",
        "encoders.note.bert.encoder.layer.0.attention.self.query",
    }
    assert any(layer.startswith("fusion.") for layer in layers)
    assert {block_of(name) for name in names} == {"encoders.scan", "encoders.note", "fusion"}


def test_an_adapter_starts_the_same_at_a_site_with_fewer_modalities() -> None:
    federation = adapted()
    full = full_model(federation.model, federation.seed).state_dict()
    torch.manual_seed(123)
    partial = MultimodalModel(federation.model, ["note"], ["disease"], federation.seed).state_dict()
    assert [name for name in partial if ".lora_A.shared" in name]
    for name, tensor in partial.items():
        assert torch.equal(tensor, full[name]), name
    a = {name: tensor for name, tensor in full.items() if ".lora_A." in name}
    assert len({tensor.flatten()[0].item() for tensor in a.values()}) == len(a), "each is drawn by itself"


def test_what_is_said_of_adapters_goes_before_what_is_said_of_their_encoders() -> None:
    federation = adapted(parameters=PARAMETERS)
    model = full_model(federation.model, 0)
    fates = fates_of(federation, model.state_dict())
    assert set(held(fates, "local")) == set(names_of(model, "local"))
    assert set(names_of(model, "shared")) <= set(held(fates, "shared"))
    assert all(".lora_" not in name for name in held(fates, "frozen"))
    assert "encoders.scan.vit.blocks.0.attn.qkv.base_layer.weight" in held(fates, "frozen")
    check_patterns(federation, model.state_dict())
    # Among what is said of adapters the order is the usual one, and where nothing is, they are as their layer.
    everything = adapted(parameters=PARAMETERS | {"shared": ["*.lora_*", "fusion.*", "heads.*"]})
    assert fates_of(everything, model.state_dict()) == fates
    silent = adapted(parameters={"frozen": ["encoders.*"], "shared": ["*"]})
    name = "encoders.scan.vit.blocks.0.attn.qkv.lora_A.shared.weight"
    assert fates_of(silent, [name]) == {name: "frozen"}


def test_every_patients_gradient_of_an_adapter_can_be_told_apart() -> None:
    federation = adapted(parameters=PARAMETERS)
    model = randomised(full_model(federation.model, 0), "shared", "local")
    batch = random_batch()
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["disease"])["disease"], STUDIES)
    seen = [p for name, p in model.named_parameters() if ".lora_" in name and "encoders.scan" in name]
    assert len(seen) == 4
    assert all(parameter.grad_sample.flatten(1).norm(dim=1).gt(0).sum() == 5 for parameter in seen), "one has no label"


def test_convolutions_are_adapted_too() -> None:
    adapter = {"only": {"targets": ["encoders.scan.vit.patch_embed.proj"]}}
    model = randomised(full_model(adapted(adapter).model, 0), "only").eval()
    layer = model.encoders["scan"].vit.patch_embed.proj
    x = torch.randn(2, 1, 16, 16)
    product = (layer.lora_B["only"].weight.flatten(1) @ layer.lora_A["only"].weight.flatten(1)).view(12, 1, 8, 8)
    expected = layer.base_layer(x) + 8 / 4 * torch.nn.functional.conv2d(x, product, stride=8)
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pattern", ["encoders.scan.vit.blocks.*.qkvs", "heads.*", "encoders.scan.vit.norm"])
def test_a_pattern_that_adapts_nothing_is_refused(pattern: str) -> None:
    with pytest.raises(MmfmError) as error:
        full_model(adapted({"shared": {"targets": [TARGETS[0], pattern]}}).model, 0)
    assert str(error.value).startswith(f"model.adapters.shared.targets: '{pattern}' matches no linear")


def test_batchnorm_that_would_be_trained_is_refused() -> None:
    names = ["encoders.scan.trunk.bn1.weight", "encoders.scan.trunk.bn1.running_mean", "heads.a"]
    with pytest.raises(MmfmError, match=r"'encoders\.scan\.trunk\.bn1\.running_mean' belongs to BatchNorm.*freeze"):
        check_patterns(tiny_federation(stages=STAGES), names)
    frozen = {"shared": ["*"], "frozen": ["encoders.scan.trunk.*"]}
    check_patterns(tiny_federation(stages=STAGES, parameters=frozen), names)
