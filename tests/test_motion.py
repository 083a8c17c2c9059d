"""Images that are turned, scaled and shifted in training, against scipy's resampling, and what lies on them."""

import math

import numpy as np
import pytest
import torch
from pydantic import ValidationError
from scipy import ndimage
from test_augmentation import STUDIES, batch_of, changed
from test_combinations import SIDE

from mmfm_core.config.modality import ImageModality, VolumeModality
from mmfm_core.models.augmentation import augmented
from mmfm_core.models.motion import STILL, draws, moved

MOVES = {"rotate": 25, "scale": 0.2, "shift": 0.15}


def smooth(size: tuple[int, ...], studies: int = 1) -> torch.Tensor:
    """Images [B, 1, *size] without edges, so that two ways to read between pixels agree."""
    rng = np.random.default_rng(0)
    images = [ndimage.gaussian_filter(rng.normal(size=size), [side / 8 for side in size]) for _ in range(studies)]
    return torch.from_numpy(np.stack(images)).float()[:, None] * 100


@pytest.mark.parametrize("angle", [1.0, -0.5])
def test_an_image_is_turned_scaled_and_shifted_as_by_scipy(angle):
    height, width = size = (48, 64)
    image = smooth(size)
    drawn = torch.zeros(1, 3, 3)
    drawn[0, 0, 0], drawn[0, 1, :2], drawn[0, 2, :2] = angle, torch.tensor([0.5, -1.0]), torch.tensor([0.6, -0.8])
    form = ImageModality.model_validate({"kind": "image2d", "size": size, "augment": MOVES})
    found = moved(image, drawn, form)[0, 0].numpy()

    radians = math.radians(25 * angle)
    rotation = np.array([[math.cos(radians), -math.sin(radians)], [math.sin(radians), math.cos(radians)]])
    reading = rotation @ np.diag([1 - 0.2, 1 + 0.1])  # of rows and columns; x is the last axis and drawn first
    centre = (np.array(size) - 1) / 2
    shift = np.array([-0.8 * 0.15 * height, 0.6 * 0.15 * width])
    offset = centre - reading @ centre + shift
    expected = ndimage.affine_transform(image[0, 0].numpy(), reading, offset, order=1, mode="nearest")
    np.testing.assert_allclose(found, expected, atol=1e-3 * np.ptp(expected))
    assert np.abs(expected - image[0, 0].numpy()).max() > 0.2 * np.ptp(expected)


@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_volume_is_turned_in_millimetres(axis):
    """A ball stays a ball, though its voxels are twice as high as wide, and is not where it was."""
    size, spacing = (40, 40, 20), (1.0, 1.0, 2.0)
    places = [(torch.arange(side) - (side - 1) / 2) * step for side, step in zip(size, spacing, strict=True)]
    grid = torch.stack(torch.meshgrid(*places, indexing="ij"))
    centre = torch.tensor([8.0, -7.0, 6.0])[:, None, None, None]
    ball = (-(grid - centre).square().sum(0) / 18).exp()[None, None]
    drawn = torch.zeros(1, 3, 3)
    drawn[0, 0, axis] = 1
    form = VolumeModality.model_validate(
        {"kind": "volume3d", "size": size, "spacing": spacing, "augment": {"rotate": 40}}
    )
    found = moved(ball, drawn, form)[0, 0]
    weight = found / found.sum()
    middle = (weight * grid).flatten(1).sum(1)
    spread = (weight * (grid - middle[:, None, None, None]).square()).flatten(1).sum(1).sqrt()
    torch.testing.assert_close(spread, torch.full((3,), 3.0), atol=0.15, rtol=0)
    turned = middle - centre.flatten()
    assert middle.norm() == pytest.approx(float(centre.norm()), abs=0.1)
    assert turned.norm() > 3
    assert (turned.abs() < 0.1).sum() == 1  # along the axis that it is turned around


def test_masks_and_registered_images_are_moved_together():
    torch.manual_seed(0)
    images = smooth((SIDE, SIDE), STUDIES)
    after = augmented(batch_of(images, (images[:, 0] > 0).short()), changed("segmentation", MOVES))
    torch.testing.assert_close(after.inputs["side"], 2 * after.inputs["front"])
    sure = after.inputs["front"][:, 0].abs() > 0.5 * images.std()  # not at an edge of the mask
    assert torch.equal(after.targets["task"][sure] > 0, after.inputs["front"][:, 0][sure] > 0)
    still = torch.isclose(after.inputs["front"], images, atol=1e-3).flatten(1).all(1)
    assert 0 < still.sum() < 2 * STILL * STUDIES


def test_draws_are_uniform_and_some_studies_stay():
    torch.manual_seed(0)
    drawn = draws(20_000, torch.device("cpu"))
    still = (drawn == 0).flatten(1).all(1)
    assert float(still.float().mean()) == pytest.approx(STILL, abs=0.01)
    assert drawn.abs().max() <= 1
    torch.testing.assert_close(drawn[~still].std(0), torch.full((3, 3), 3**-0.5), atol=0.01, rtol=0)
    correlations = np.corrcoef(drawn[~still].flatten(1).T.numpy()) - np.eye(9)
    assert np.abs(correlations).max() < 0.04


def test_places_are_exact_where_the_model_computes_in_half_precision():
    torch.manual_seed(0)
    form = VolumeModality.model_validate({"kind": "volume3d", "size": (16, 16, 16), "augment": MOVES})
    image, drawn = torch.randn(4, 1, 16, 16, 16), draws(4, torch.device("cpu"))
    with torch.autocast("cpu", torch.bfloat16):
        found = moved(image, drawn, form)
    torch.testing.assert_close(found, moved(image, drawn, form))


def test_what_cannot_be_moved_is_refused():
    with pytest.raises(ValidationError, match="boxes are mirrored with their image, but not turned"):
        changed("detection", {"rotate": 5})
    for task in ("segmentation", "registration"):
        with pytest.raises(ValidationError, match="are moved alike"):
            changed(task, {"shift": 0.1}, ("front",))
    with pytest.raises(ValidationError, match=r"augment\.rotate"):
        changed("classification", {"rotate": -5})


def test_a_study_without_an_augment_that_moves_is_not_resampled():
    images = smooth((SIDE, SIDE), 4)
    after = augmented(batch_of(images, (images[:, 0] > 0).short()), changed("segmentation", {"rotate": 0}))
    assert torch.equal(after.inputs["front"], images)
