"""Random changes of images in training: what belongs together stays together, and nothing else changes."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from test_combinations import SIDE, document

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.augmentation import augmented
from mmfm_core.models.model import full_model

STUDIES = 64


def changed(task: str, augment: Mapping[str, Any], images: tuple[str, ...] = ("front", "side"), **more: Any) -> Model:
    described = document(task, "joint")
    for name in images:
        described["modalities"] = described["modalities"] | {name: described["modalities"][name] | {"augment": augment}}
    return Model.model_validate(described | more)


def batch_of(images: torch.Tensor, target: torch.Tensor) -> Batch:
    here = torch.ones(len(images), dtype=torch.bool)
    inputs = {"front": images, "side": 2 * images}
    return Batch(inputs, dict.fromkeys(inputs, here), {"task": target}, {"task": here})


@pytest.mark.parametrize("mirror", [["x"], ["y"], ["x", "y"]])
def test_masks_and_registered_images_are_mirrored_together(mirror):
    torch.manual_seed(0)
    images = torch.randn(STUDIES, 1, SIDE, SIDE)
    batch = batch_of(images, (images[:, 0] > 0).short())
    after = augmented(batch, changed("segmentation", {"mirror": mirror}))
    assert torch.equal(after.inputs["side"], 2 * after.inputs["front"])
    assert torch.equal(after.targets["task"], (after.inputs["front"][:, 0] > 0).short())
    forms = {"": images, "x": images.flip(-1), "y": images.flip(-2), "xy": images.flip(-1, -2)}
    seen = [
        next(n for n, form in forms.items() if torch.equal(form[i], after.inputs["front"][i])) for i in range(STUDIES)
    ]
    expected = {"", *mirror, "".join(mirror)}
    assert set(seen) == expected
    assert min(seen.count(form) for form in expected) > STUDIES / len(expected) / 3  # each about equally often


def test_boxes_stay_on_what_they_mark():
    torch.manual_seed(0)
    images, boxes = torch.zeros(STUDIES, 1, SIDE, SIDE), torch.full((STUDIES, 3, 5), -1.0)
    images[:, :, 2:5, 7:13] = 1  # rows 2 to 5, columns 7 to 13
    boxes[:, 0] = torch.tensor([1, 7 / SIDE, 2 / SIDE, 13 / SIDE, 5 / SIDE])
    after = augmented(batch_of(images, boxes), changed("detection", {"mirror": ["x", "y"]}))
    places = set()
    for image, rows in zip(after.inputs["front"], after.targets["task"], strict=True):
        assert rows[0, 0] == 1
        x0, y0, x1, y1 = (rows[0, 1:] * SIDE).round().int().tolist()
        expected = torch.zeros(1, SIDE, SIDE)
        expected[:, y0:y1, x0:x1] = 1
        assert torch.equal(image, expected)
        assert (rows[1:] == -1).all()
        places.add((x0, y0))
    assert len(places) == 4


def test_a_volume_is_mirrored_along_the_axis_that_is_named():
    form = {"kind": "volume3d", "size": [8, 8, 8], "augment": {"mirror": ["x"]}}
    encoder = {"type": "vit3d", "patch_size": 4, "depth": 1}
    head = {"type": "segmentation", "classes": ["background", "lesion"], "width": 2}
    parts = {"modalities": {"front": form}, "encoders": {"front": encoder}, "heads": {"task": head}}
    model = Model.model_validate({"dim": 12, "fusion": {"type": "joint"}, **parts})
    torch.manual_seed(0)
    volumes = torch.randn(STUDIES, 1, 8, 8, 8)
    here = torch.ones(STUDIES, dtype=torch.bool)
    after = augmented(Batch({"front": volumes}, {"front": here}, {"task": (volumes[:, 0] > 0).short()}, {}), model)
    mirrored = ~(after.inputs["front"] == volumes).flatten(1).all(1)
    assert torch.equal(
        after.inputs["front"], torch.where(mirrored[:, None, None, None, None], volumes.flip(2), volumes)
    )
    assert torch.equal(after.targets["task"], (after.inputs["front"][:, 0] > 0).short())


def test_brightness_contrast_and_noise_are_as_large_as_they_say():
    torch.manual_seed(0)
    studies, side = 4000, 16
    ramp = torch.linspace(-1, 1, side).repeat(studies, 1, side, 1)
    batch = batch_of(ramp, torch.zeros(studies, dtype=torch.long))
    after = augmented(batch, changed("classification", {"contrast": 0.3, "brightness": 0.5}, ("front",)))
    assert torch.equal(after.inputs["side"], batch.inputs["side"])  # it did not ask for it
    design = np.stack([ramp[0].flatten().numpy(), np.ones(side * side)], 1)
    factor, shift = np.linalg.lstsq(design, after.inputs["front"].flatten(1).numpy().T, rcond=None)[0]
    np.testing.assert_allclose(design @ [factor, shift], after.inputs["front"].flatten(1).numpy().T, atol=1e-5)
    for found, centre, reach in ((factor, 1, 0.3), (shift, 0, 0.5)):
        assert abs(found - centre).max() <= reach + 1e-5
        assert abs(found.mean() - centre) < 4 * reach / (3 * studies) ** 0.5
        assert found.std() == pytest.approx(reach / 3**0.5, rel=0.05)  # of a uniform draw
    assert abs(np.corrcoef(factor, shift)[0, 1]) < 0.07
    noisy = augmented(batch, changed("classification", {"noise": 0.1}, ("front",))).inputs["front"] - ramp
    assert float(noisy.std()) == pytest.approx(0.1, rel=0.02)


def test_only_training_changes_images_and_every_step_anew():
    config = changed("classification", {"brightness": 1.0})
    model = full_model(config, seed=0)
    images = torch.randn(8, 1, SIDE, SIDE)
    batch = batch_of(images, torch.zeros(8, dtype=torch.long))
    batch.inputs["note"], batch.present["note"] = torch.full((8, 12), 5), torch.zeros(8, dtype=torch.bool)
    model.fusion.modality_dropout = 0.0
    with torch.no_grad():
        first, second = (model.eval().losses(batch, ["task"])["task"] for _ in range(2))
        third, fourth = (model.train().losses(batch, ["task"])["task"] for _ in range(2))
    assert torch.equal(first, second)
    assert not torch.equal(third, fourth)
    assert torch.equal(batch.inputs["front"], images)


def test_what_cannot_be_mirrored_is_refused():
    with pytest.raises(ValidationError, match="an image has the axes x and y"):
        changed("classification", {"mirror": ["z"]})
    for task in ("segmentation", "registration"):
        with pytest.raises(ValidationError, match="are moved alike"):
            changed(task, {"mirror": ["x"]}, ("front",))
