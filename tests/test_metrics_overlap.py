"""Dice and surface distance, against counting voxels and measuring every pair of surface voxels."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import binary_erosion

from mmfm_core.metrics.overlap import dice, hausdorff95, over_classes

pytestmark = pytest.mark.filterwarnings("error")


def dice_by_counting(predicted, target, label):
    one, other = predicted == label, target == label
    total = one.sum() + other.sum()
    return 2 * (one & other).sum() / total if total else np.nan


def distance_by_pairs(one, other, spacing):
    """The surface of a region is what erosion takes from it."""
    surfaces = [np.argwhere(each & ~binary_erosion(each)) * spacing for each in (one, other)]
    distances = np.linalg.norm(surfaces[0][:, None] - surfaces[1][None], axis=-1)
    return max(np.quantile(distances.min(axis), 0.95) for axis in (0, 1))


def maps(rng, sizes, classes):
    """Studies of unlike sizes, in blocks so that there are regions rather than noise, and classes that are absent."""
    for size in sizes:
        blocks = rng.integers(0, classes, [-(-length // 3) for length in size])
        blocks[rng.random(blocks.shape) < 0.4] = 0
        for axis, length in enumerate(size):
            blocks = np.repeat(blocks, 3, axis).take(np.arange(length), axis)
        yield torch.from_numpy(blocks)


SIZES = [[(9, 12), (7, 5), (6, 6)], [(6, 7, 8), (5, 5, 9)]]


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES))
def test_dice_is_twice_the_shared_voxels_over_all(seed, sizes):
    rng = np.random.default_rng(seed)
    predicted, target = list(maps(rng, sizes, 4)), list(maps(rng, sizes, 4))
    found = dice(iter(predicted), iter(target), classes=4)
    pairs = [(one.numpy(), other.numpy()) for one, other in zip(predicted, target, strict=True)]
    expected = [[dice_by_counting(one, other, label) for label in (1, 2, 3)] for one, other in pairs]
    np.testing.assert_allclose(found, expected, atol=1e-6)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from(SIZES))
def test_hausdorff_is_the_percentile_over_pairs_of_surface_voxels(seed, sizes):
    rng = np.random.default_rng(seed)
    predicted, target = list(maps(rng, sizes, 3)), list(maps(rng, sizes, 3))
    spacings = rng.uniform(0.5, 3, (len(sizes), len(sizes[0])))
    found = hausdorff95(predicted, target, classes=3, spacings=spacings.tolist())
    for study, spacing in enumerate(spacings):
        for label in (1, 2):
            one, other = predicted[study].numpy() == label, target[study].numpy() == label
            if one.any() and other.any():
                expected = distance_by_pairs(one, other, spacing)
            else:
                expected = np.linalg.norm(one.shape * spacing) if one.any() or other.any() else np.nan
            assert found[study, label - 1] == pytest.approx(expected, rel=1e-5, nan_ok=True)


def test_an_absent_class_is_undefined_only_where_nobody_sees_it():
    empty, dot = torch.zeros(4, 3, dtype=torch.long), torch.zeros(4, 3, dtype=torch.long)
    dot[1, 1] = 1
    predicted, target = [empty, dot, empty, dot], [empty, empty, dot, dot]
    np.testing.assert_array_equal(dice(predicted, target, classes=2), [[np.nan], [0], [0], [1]])
    np.testing.assert_array_equal(hausdorff95(predicted, target, classes=2), [[np.nan], [5], [5], [0]])


def test_the_statistic_weighs_classes_alike():
    per_study = np.array([[1.0, np.nan], [0.0, 0.4], [np.nan, np.nan]])
    np.testing.assert_allclose(over_classes(per_study)(np.array([[1.0, 1, 1], [3, 1, 5]])), [0.45, 0.575])


def test_nothing_is_measured_of_no_study():
    assert dice([], [], classes=3).shape == hausdorff95([], [], classes=3).shape == (0, 2)


def test_a_study_without_a_true_map_is_an_error():
    with pytest.raises(ValueError, match="zip"):
        dice([torch.zeros(2, 2).long()], [], classes=2)
