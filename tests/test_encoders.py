"""Encoders made of library networks: what they compute, and that every patient's gradient can be told apart."""

from typing import Any

import pytest
import torch
from per_study import assert_gradients_separate
from pydantic import ValidationError
from tiny import tiny_federation
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.errors import MmfmError
from mmfm_core.models.encoders.base import Encoder, FeatureDropout
from mmfm_core.models.encoders.timm_trunk import TrunkEncoder
from mmfm_core.models.encoders.vit3d import VolumeEncoder
from mmfm_core.models.model import MultimodalModel, full_model

import timm  # isort: skip  (after torchvision's operators)
from monai.networks.nets import ViT  # isort: skip

STUDIES = 4
ALL = torch.ones(STUDIES, dtype=torch.bool)


def with_scan(modality: dict[str, Any], encoder: dict[str, Any], dim: int = 12) -> Model:
    """The tiny model with another image encoder, and the fusion that has fewest parts."""
    model = tiny_federation().model.model_dump(mode="json") | {"dim": dim, "fusion": {"type": "concat"}}
    model["modalities"]["scan"], model["encoders"]["scan"] = modality, encoder
    return Model.model_validate(model)


def volumes(**encoder: Any) -> Model:
    modality = {"kind": "volume3d", "size": [8, 8, 16]}
    return with_scan(modality, {"type": "vit3d", "patch_size": 4, "depth": 2} | encoder)


def images(side: int = 32, channels: int = 1, **encoder: Any) -> Model:
    modality = {"kind": "image2d", "size": [side, side], "channels": channels}
    return with_scan(modality, {"type": "timm"} | encoder)


def batch_of(x: Tensor) -> Batch:
    labels = torch.tensor([0, 1, 1, 0])
    return Batch({"scan": x}, {"scan": ALL}, {"disease": labels}, {"disease": ALL})


def test_a_volume_passes_through_monais_own_network() -> None:
    encoder = full_model(volumes(), seed=0).encoders["scan"].eval()
    assert isinstance(encoder, VolumeEncoder)
    theirs = ViT(1, (8, 8, 16), 4, hidden_size=12, mlp_dim=48, num_layers=2, num_heads=3, pos_embed_type="sincos")
    left = theirs.load_state_dict(encoder.vit.state_dict(), strict=False)
    assert set(left.missing_keys) == {"patch_embedding.position_embeddings"} | {
        f"blocks.{block}.norm_cross_attn.{part}" for block in (0, 1) for part in ("weight", "bias")
    }
    x = torch.randn(STUDIES, 1, 8, 8, 16)
    last, hidden = theirs.eval()(x)
    torch.testing.assert_close(encoder.features(x), torch.stack([last, hidden[0]], 1))
    tokens = encoder(x)
    assert tokens.grid == (2, 2, 4)
    assert tokens.x.shape == (STUDIES, 16, 12)


def test_only_the_voxels_of_a_cube_reach_its_embedding() -> None:
    encoder = full_model(volumes(), seed=0).encoders["scan"]
    assert isinstance(encoder, VolumeEncoder)
    x = torch.randn(1, 1, 8, 8, 16)
    changed = x.clone()
    changed[:, :, 4:8, 0:4, 8:12] += 1  # place (1, 0, 2) of the grid (2, 2, 4)
    moved = (encoder.embed(x) != encoder.embed(changed)).any(-1)[0]
    assert moved.nonzero().tolist() == [[1 * 8 + 0 * 4 + 2]]


def test_volumes_are_stacked_as_channels() -> None:
    document = volumes().model_dump(mode="json")
    document["modalities"]["second"] = document["modalities"]["scan"]
    document["encoders"]["both"] = document["encoders"].pop("scan") | {"channels": ["scan", "second"]}
    model = full_model(Model.model_validate(document), seed=0).eval()
    x = torch.randn(STUDIES, 1, 8, 8, 16)
    without = Batch({"scan": x}, {"scan": ALL}, {}, {})
    masked = Batch({"scan": x, "second": torch.full_like(x, 9.0)}, {"scan": ALL, "second": ~ALL}, {}, {})
    expected = model(without, ["disease"])["disease"]
    torch.testing.assert_close(model(masked, ["disease"])["disease"], expected)
    both = Batch({"scan": x, "second": x}, {"scan": ALL, "second": ALL}, {}, {})
    assert not torch.allclose(model(both, ["disease"])["disease"], expected)


@pytest.mark.parametrize(
    ("architecture", "side", "width"),
    [("tf_efficientnet_lite0", 64, 1280), ("vit_tiny_patch16_224", 48, 192), ("convnext_atto", 64, 320)],
)
def test_a_trunks_tokens_are_means_of_its_own_map(architecture: str, side: int, width: int) -> None:
    model = full_model(images(side, 3, architecture=architecture, grid=1), seed=0)
    encoder = model.encoders["scan"].eval()
    assert isinstance(encoder, TrunkEncoder)
    x = torch.randn(STUDIES, 3, side, side)
    features = encoder.features(x)
    assert features.shape == (STUDIES, 1, 1, width)
    own = encoder.trunk.forward_features(x)
    own = own[:, 1:].mean(1) if own.ndim == 3 else own.mean((2, 3))
    torch.testing.assert_close(features[:, 0, 0], own)
    torch.testing.assert_close(encoder.tokens(features, x).x[:, 0], encoder.project(own))


def test_a_grid_keeps_what_is_where() -> None:
    encoder = full_model(images(64, architecture="convnext_atto", grid=2), seed=0).encoders["scan"].eval()
    assert isinstance(encoder, TrunkEncoder)
    x = torch.randn(1, 1, 64, 64)
    first = encoder.trunk.forward_features(x)
    assert first.shape[2:] == (2, 2)
    torch.testing.assert_close(encoder.features(x)[0, 0], first[0].permute(1, 2, 0).reshape(4, -1))


def test_a_trunk_has_no_weight_that_only_its_classifier_uses() -> None:
    encoder = full_model(images(64, architecture="convnext_atto"), seed=0).encoders["scan"]
    whole = timm.create_model("convnext_atto", in_chans=1)
    assert {name for name in whole.state_dict() if name.startswith("head.")}
    assert not [name for name in encoder.state_dict() if ".head." in name]
    assert all(parameter.grad is not None for parameter in _after_backward(encoder, torch.randn(2, 1, 64, 64)))


def _after_backward(encoder: Any, x: Tensor) -> list[Tensor]:
    encoder(x).x.sum().backward()
    return list(encoder.parameters())


def test_batchnorm_keeps_its_own_statistics_in_training() -> None:
    model = full_model(images(64, architecture="tf_efficientnet_lite0", grid=2), seed=0)
    x = torch.randn(STUDIES, 1, 64, 64)
    still = model.encoders["scan"].eval().features(x)
    model.train()
    torch.testing.assert_close(model.encoders["scan"].features(x), still)
    torch.testing.assert_close(model.encoders["scan"].features(x[:1]), still[:1], rtol=1e-3, atol=1e-4)


def test_a_frozen_trunk_has_no_dropout_and_a_trained_one_has() -> None:
    encoder = full_model(tiny_federation().model, seed=0).encoders["note"]
    assert isinstance(encoder, Encoder)
    ids = torch.randint(3, 259, (STUDIES, 24))
    encoder.train()
    assert not torch.equal(encoder.features(ids), encoder.features(ids))
    encoder.bert.requires_grad_(False)
    encoder.train()
    assert torch.equal(encoder.features(ids), encoder.features(ids))


def test_dropout_takes_a_feature_from_all_tokens_of_a_study_and_in_training_alone() -> None:
    drop = FeatureDropout(0.5)
    taken = drop(torch.ones(200, 6, 40)) == 0
    assert torch.equal(taken, taken[:, :1].expand_as(taken))  # the same features in every token
    assert not torch.equal(taken[0], taken[1])
    assert abs(taken[:, 0].float().mean() - 0.5) < 4 * (0.25 / 8000) ** 0.5
    assert torch.equal(drop.eval()(torch.ones(2, 6, 40)), torch.ones(2, 6, 40))


@pytest.mark.parametrize("name", ["scan", "note"])
def test_a_frozen_trunks_features_are_dropped_behind_it(name: str) -> None:
    model = images(64, architecture="tf_efficientnet_lite0", grid=2, dropout=0.5).model_dump(mode="json")
    model["encoders"]["note"]["dropout"] = 0.5
    encoder = full_model(Model.model_validate(model), seed=0).encoders[name]
    assert isinstance(encoder, Encoder)
    (encoder.trunk if name == "scan" else encoder.bert).requires_grad_(False)
    x = torch.randn(STUDIES, 1, 64, 64) if name == "scan" else torch.randint(3, 259, (STUDIES, 24))
    kept = encoder.eval().features(x)
    encoder.train()
    assert torch.equal(encoder.features(x), kept)
    assert not torch.allclose(encoder(x, kept).x, encoder(x, kept).x)
    encoder.eval()
    assert torch.equal(encoder(x, kept).x, encoder(x, kept).x)


@pytest.mark.parametrize("frozen", [False, True])
def test_every_patients_gradient_can_be_told_apart_in_a_volume_and_behind_a_frozen_trunk(frozen: bool) -> None:
    config = images(64, architecture="tf_efficientnet_lite0", grid=2) if frozen else volumes()
    model = MultimodalModel(config, ["scan"], ["disease"], seed=0)
    x = torch.randn(STUDIES, 1, *([64, 64] if frozen else [8, 8, 16]))
    if frozen:
        model.encoders["scan"].trunk.requires_grad_(False)
    for name, parameter in list(model.named_parameters()):
        if not parameter.requires_grad:
            # What is not trained is no parameter to whoever looks at gradients.
            owner = model.get_submodule(name.rpartition(".")[0])
            leaf = name.rpartition(".")[2]
            del owner._parameters[leaf]
            owner.register_buffer(leaf, parameter.data)
    assert_gradients_separate(model, lambda rows: model.losses(batch_of(x).rows(rows), ["disease"])["disease"], STUDIES)


@pytest.mark.parametrize(
    ("encoder", "said"),
    [
        ({"architecture": "hf-hub:someone/something"}, "architecture"),
        ({"architecture": "local-dir:folder"}, "architecture"),
        ({"architecture": "resnet_18"}, "timm has no 'resnet_18'; did you mean 'resnet18'"),
    ],
)
def test_only_timms_own_architectures_can_be_named(encoder: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        images(**encoder)


def test_an_image_that_the_architecture_cannot_read_is_refused_in_a_sentence() -> None:
    with pytest.raises(MmfmError, match=r"model\.encoders\.scan\.architecture: 'vit_tiny_patch16_224' gives no map"):
        full_model(images(8, architecture="vit_tiny_patch16_224"), seed=0)


@pytest.mark.parametrize(
    ("change", "said"),
    [({"heads": 5}, "heads: 5 does not divide dim 12"), ({"patch_size": 3}, "patch_size: side 8 of modality 'scan'")],
)
def test_a_volume_encoder_that_does_not_fit_is_refused(change: dict[str, int], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        volumes(**change)


def test_positions_in_a_volume_need_six_angles() -> None:
    with pytest.raises(ValidationError, match="multiple of 6, not 16"):
        with_scan({"kind": "volume3d", "size": [8, 8, 8]}, {"type": "vit3d", "patch_size": 4, "heads": 4}, dim=16)
