"""Registration heads: identity at the start, a known shift found, one pair at a time, label maps that measure."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from per_study import assert_gradients_separate
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config import Site
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch, load_dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.displacement import Displacement, Motion, curve_error
from mmfm_core.models.model import full_model
from mmfm_core.models.tasks import Encoding

SIDE, STUDIES = 16, 3


def model_with(dimensions: int = 2, side: int = SIDE, **head: Any) -> Model:
    """One encoder that stacks a moving and a fixed image or volume."""
    kind, vit = ("image2d", "vit") if dimensions == 2 else ("volume3d", "vit3d")
    form = {"kind": kind, "size": [side] * dimensions}
    described: dict[str, Any] = {
        "dim": 12,
        "modalities": {"moving": form, "fixed": form},
        "encoders": {"pair": {"type": vit, "patch_size": 4, "depth": 1, "heads": 3, "channels": ["moving", "fixed"]}},
        "fusion": {"type": "channels"},
        "heads": {"align": {"type": "registration", "moving": "moving", "fixed": "fixed", "width": 4} | head},
    }
    return Model.model_validate(described)


def blobs(dimensions: int, shift: float, side: int = SIDE) -> Tensor:
    """STUDIES smooth images [B, 1, *size], each moved by `shift` along the first axis: known at every real point."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.rand(STUDIES, 6, dimensions, generator=generator) * side
    axes = torch.stack(torch.meshgrid(*[torch.arange(side).float()] * dimensions, indexing="ij"), -1)
    moved = axes - shift * F.one_hot(torch.tensor(0), dimensions)
    distance = (moved - centres.view(STUDIES, 6, *[1] * dimensions, dimensions)).square().sum(-1)
    return torch.exp(-distance / side).sum(1, keepdim=True)


def batch_of(moving: Tensor, fixed: Tensor, maps: Tensor | None = None) -> Batch:
    everyone = torch.ones(len(moving), dtype=torch.bool)
    here = {"moving": everyone, "fixed": everyone}
    return Batch({"moving": moving, "fixed": fixed}, here, {} if maps is None else {"align": maps}, {"align": everyone})


def measured(network: Any, batch: Batch) -> pd.DataFrame:
    network.eval()
    with torch.inference_mode():
        return pd.DataFrame(network.heads["align"].predict(Encoding(network, batch)))


def moved_a_little(network: Any) -> Any:
    """The network with small random weights where it starts from zero, so that it displaces something."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in network.heads["align"].parameters():
            if not parameter.any():
                parameter.copy_(0.05 * torch.randn(parameter.shape, generator=generator))
    return network


@pytest.mark.parametrize("dimensions", (2, 3))
@pytest.mark.parametrize("head", ({}, {"transform": "affine"}, {"diffeomorphic": False}, {"similarity": "mi"}))
def test_it_starts_from_the_identity(dimensions, head):
    network = full_model(model_with(dimensions, **head), seed=0)
    batch = batch_of(blobs(dimensions, 0), blobs(dimensions, 2))
    motion = network(batch, ["align"])["align"]
    field = network.heads["align"].displacement(motion, (SIDE,) * dimensions)
    assert field.shape == (STUDIES, dimensions, *[SIDE] * dimensions)
    assert not field.any()
    table = measured(network, batch)
    np.testing.assert_allclose(table["similarity"], table["similarity_before"], rtol=1e-5)
    assert (table["folding"] == 0).all()


def test_an_affine_map_of_coordinates_is_that_map_in_voxels():
    affine = torch.tensor([[[0.0, 0.1, 0.2], [-0.1, 0.05, 0.0]]])
    field = Displacement(False)(Motion(affine, None), (5, 9))
    for i, j in ((0, 0), (4, 8), (1, 5)):
        u, v = i / 2 - 1, j / 4 - 1
        expected = torch.tensor([2 * (0.1 * v + 0.2), 4 * (-0.1 * u + 0.05 * v)])
        torch.testing.assert_close(field[0, :, i, j], expected)


def test_a_constant_velocity_flows_as_far_as_it_says():
    velocity = torch.zeros(1, 2, 16, 16)
    velocity[:, 1] = 1.5  # in half-resolution voxels
    for diffeomorphic in (True, False):
        field = Displacement(diffeomorphic)(Motion(torch.zeros(1, 2, 3), velocity), (32, 32))
        torch.testing.assert_close(field[:, 1], torch.full((1, 32, 32), 3.0), rtol=1e-4, atol=1e-4)
        assert not field[:, 0].any()


def test_a_strong_velocity_folds_only_where_it_is_not_integrated():
    from mmfm_core.metrics.deformation import folding, jacobian_determinant

    velocity = 4 * torch.randn(1, 2, 8, 8, generator=torch.Generator().manual_seed(0))
    smooth = F.interpolate(velocity, size=(32, 32), mode="bilinear")
    folded = {
        kind: folding(jacobian_determinant(Displacement(kind)(Motion(torch.zeros(1, 2, 3), smooth), (64, 64))[0]))
        for kind in (True, False)
    }
    assert folded[False] > 0.02
    assert folded[True] < folded[False] / 4


@pytest.mark.parametrize(
    ("dimensions", "head"),
    [
        (2, {"smoothness": 0.1}),
        (2, {"smoothness": 0.1, "similarity": "mi"}),
        (2, {"transform": "affine"}),
        (3, {"smoothness": 0.1}),
    ],
)
def test_descent_on_a_pair_alone_finds_a_known_shift(dimensions, head):
    """Moving is the fixed image, two voxels along the first axis, or its negative: another contrast."""
    side = 16 if dimensions == 3 else 32
    network = full_model(model_with(dimensions, side, refine=60, **head), seed=0)
    moving, fixed = blobs(dimensions, 2, side), blobs(dimensions, 0, side)
    batch = batch_of(-moving if head.get("similarity") == "mi" else moving, fixed)
    network.eval()
    part = network.heads["align"]
    table = measured(network, batch)
    assert (table["similarity"] > table["similarity_before"] + 0.05).all()
    assert (table["folding"] < 0.005).all()
    shown = shift_of(part, network, batch)
    body = fixed[:, 0] > 0.3
    assert abs(float(shown[:, 0][body].mean()) - 2) < 0.4
    assert abs(float(shown[:, 1][body].mean())) < 0.4


def shift_of(part: Any, network: Any, batch: Batch) -> Tensor:
    from mmfm_core.models.displacement import refined

    motion = part(Encoding(network, batch))
    motion = Motion(motion.affine.detach(), None if motion.velocity is None else motion.velocity.detach())
    return part.displacement(refined(motion, part.cost, part.images(batch), part.config.refine), part.size)


def test_training_finds_a_known_shift_without_labels():
    network = full_model(model_with(2, 32, smoothness=0.1), seed=0)
    batch = batch_of(blobs(2, 2, 32), blobs(2, 0, 32))
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-2)
    network.train()
    for _ in range(80):
        optimizer.zero_grad()
        network.losses(batch, ["align"])["align"].mean().backward()
        optimizer.step()
    network.eval()
    with torch.no_grad():
        field = network.heads["align"].displacement(network(batch, ["align"])["align"], (32, 32))
    assert abs(float(field[:, 0][batch.inputs["fixed"][:, 0] > 0.3].mean()) - 2) < 0.5


@pytest.mark.parametrize("refine", (0, 5))
def test_a_pair_does_not_depend_on_the_others_in_its_batch(refine):
    network = moved_a_little(full_model(model_with(refine=refine), seed=0)).eval()
    batch = batch_of(blobs(2, 1), blobs(2, 0))
    losses, together = network.losses(batch, ["align"])["align"], measured(network, batch)
    for row in range(STUDIES):
        alone = network.losses(batch.rows([row]), ["align"])["align"][0]
        torch.testing.assert_close(alone, losses[row], rtol=1e-4, atol=1e-5)
        similarity = measured(network, batch.rows([row]))["similarity"][0]
        assert similarity == pytest.approx(together["similarity"][row], abs=1e-4)


@pytest.mark.parametrize(
    ("dimensions", "head"), [(2, {}), (2, {"similarity": "mi"}), (2, {"supervision": 1.0, "structures": 2}), (3, {})]
)
def test_hooks_see_the_gradient_of_every_pair_as_autograd_does_one_at_a_time(dimensions, head):
    network = moved_a_little(full_model(model_with(dimensions, **head), seed=0))
    maps = torch.randint(0, 3, (STUDIES, 2, *[SIDE] * dimensions), generator=torch.Generator().manual_seed(0))
    maps[1] = -1
    batch = batch_of(blobs(dimensions, 1), blobs(dimensions, 0), maps.to(torch.int16))
    assert_gradients_separate(network, lambda rows: network.losses(batch.rows(rows), ["align"])["align"], STUDIES)


def test_constant_images_give_no_nan():
    network = full_model(model_with(), seed=0)
    batch = batch_of(torch.full((STUDIES, 1, SIDE, SIDE), 3.7), blobs(2, 0))
    loss = network.losses(batch, ["align"])["align"]
    loss.sum().backward()
    assert loss.isfinite().all() and loss.abs().max() < 0.1
    assert all(p.grad is None or p.grad.isfinite().all() for p in network.parameters())


def test_label_maps_supervise_and_measure_where_a_pair_has_them():
    maps = torch.zeros(STUDIES, 2, SIDE, SIDE, dtype=torch.int16)
    maps[:, 0, 6:10, 4:8], maps[:, 1, 4:8, 4:8] = 1, 1
    maps[2] = -1
    same = batch_of(blobs(2, 0), blobs(2, 0), maps)
    bare, taught = (full_model(model_with(structures=1, landmarks=True, supervision=s), seed=0) for s in (0.0, 2.0))
    extra = taught.losses(same, ["align"])["align"] - bare.losses(same, ["align"])["align"]
    torch.testing.assert_close(extra, torch.tensor([1.0, 1.0, 0.0]), rtol=0, atol=1e-4)  # 2 (1 - Dice), Dice 1/2
    table = measured(bare, same)
    assert table["dice_before"][:2].tolist() == [0.5, 0.5]
    assert table["tre_before"][:2].tolist() == [pytest.approx((2 + 1 + 0 + 0) / 4)] * 2
    assert table.loc[2, ["dice", "dice_before", "tre", "tre_before"]].isna().all()
    config = bare_config = model_with(structures=1, landmarks=True).heads["align"]
    assert float(config.statistic("dice", table)(np.ones((1, STUDIES)))[0]) == 0.5
    assert bare_config.counts(table) == {"studies": STUDIES, "label maps": 2}


def test_the_error_along_a_curve_is_the_distance_to_it():
    moving, fixed = torch.zeros(12, 12).int(), torch.zeros(12, 12).int()
    moving[8], fixed[5] = 1, 1
    field = torch.zeros(2, 12, 12)
    assert curve_error(field, moving, fixed, [1.0, 1.0]) == 3
    field[0], field[1] = 2, 1  # along the curve is free, but its last point is carried beyond the end
    assert curve_error(field, moving, fixed, [1.0, 1.0]) == pytest.approx((11 + 2**0.5) / 12)
    assert curve_error(field, moving, fixed, [2.0, 2.0]) == pytest.approx(2 * (11 + 2**0.5) / 12)
    assert np.isnan(curve_error(field, moving, 2 * fixed, [1.0, 1.0]))


# What a site's files may be, and what documents are refused.


def site_of(folder: Path, labels: dict[str, np.ndarray], mapping: Any) -> Site:
    for name in ("moving", "fixed"):
        Image.fromarray(np.full((20, 20), 9, np.uint8)).save(folder / f"{name}.png")
    for name, array in labels.items():
        Image.fromarray(array).save(folder / f"{name}_labels.png")
    both = "moving_labels.png,fixed_labels.png"
    (folder / "manifest.csv").write_text(
        "patient_id,split,m,f,ml,fl\n"
        f"1,train,moving.png,fixed.png,{both}\n2,train,moving.png,fixed.png,,fixed_labels.png\n"
    )
    site = {"name": "n", "manifest": folder / "manifest.csv", "modalities": {"moving": "m", "fixed": "f"}}
    return Site.model_validate(site | ({"targets": {"align": mapping}} if mapping else {}))


BOTH = {"columns": {"moving": "ml", "fixed": "fl"}}


def test_pairs_without_label_maps_are_trained_on(tmp_path):
    labels = {"moving": np.full((20, 20), 2, np.uint8), "fixed": np.full((20, 20), 1, np.uint8)}
    model = model_with(structures=2)
    everything = load_dataset(site_of(tmp_path, labels, BOTH), model).everything
    assert everything.usable["align"].tolist() == [True, True]
    assert everything.targets["align"][0, :, 0, 0].tolist() == [2, 1]
    assert (everything.targets["align"][1] == -1).all()
    assert load_dataset(site_of(tmp_path, labels, None), model).everything.usable["align"].tolist() == [True, True]


@pytest.mark.parametrize(
    ("fixed", "mapping", "message"),
    [
        (np.full((20, 20), 3, np.uint8), BOTH, "row 2: the target of 'align' has a label id beyond the 2 'structures'"),
        (
            np.full((20, 21), 1, np.uint8),
            BOTH,
            "row 2: the target of 'align' differs in size from the image of 'fixed'",
        ),
        (np.full((20, 20), 1, np.uint8), "fl", "mapped by 'columns: {moving: NAME, fixed: NAME}'"),
    ],
)
def test_label_maps_that_do_not_fit_are_refused_with_the_reason(tmp_path, fixed, mapping, message):
    labels = {"moving": np.full((20, 20), 2, np.uint8), "fixed": fixed}
    with pytest.raises(MmfmError, match=message):
        load_dataset(site_of(tmp_path, labels, mapping), model_with(structures=2))


@pytest.mark.parametrize(
    ("head", "message"),
    [
        ({"fixed": "fxied"}, "heads.align.fixed: there is no modality 'fxied'; did you mean 'fixed'"),
        ({"fixed": "moving"}, "heads.align.fixed: is the moving image too"),
        ({"supervision": 1.0}, "heads.align.supervision: needs 'structures'"),
    ],
)
def test_documents_without_a_pair_are_refused(head, message):
    with pytest.raises(ValueError, match=message):
        model_with(**head)


def test_a_pair_is_stacked_by_one_encoder_and_never_half():
    document = model_with().model_dump(mode="json")
    document["modalities"]["fixed"]["optional"] = True
    with pytest.raises(ValueError, match="'fixed' cannot be optional"):
        Model.model_validate(document)
    document["modalities"]["fixed"]["optional"] = False
    single = document["encoders"]["pair"] | {"channels": []}
    apart = document | {"encoders": {"moving": single, "fixed": single}, "fusion": {"type": "concat"}}
    with pytest.raises(ValueError, match="no encoder stacks the pair"):
        Model.model_validate(apart)
