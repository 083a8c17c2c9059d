"""Deformations, against maps whose determinant, landmarks and labels are known in closed form."""

import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_core.metrics.deformation import (
    folding,
    jacobian_determinant,
    landmark_errors,
    log_jacobian_sd,
    warp_labels,
    warped_dice,
)

from monai.networks.blocks import Warp  # isort: skip

SIZES = st.sampled_from([(5, 7), (4, 6, 5)])


def grid(size):
    return torch.stack(torch.meshgrid(*(torch.arange(length).double() for length in size), indexing="ij"))


def affine_field(matrix, offset, size):
    points = grid(size)
    return torch.einsum("ij,j...->i...", matrix, points) + offset.view(-1, *[1] * len(size)) - points


@given(SIZES)
def test_where_nothing_moves_volume_stays(size):
    determinant = jacobian_determinant(torch.zeros(len(size), *size))
    assert determinant.shape == size
    assert (determinant == 1).all()
    assert (folding(determinant), log_jacobian_sd(determinant)) == (0, 0)


@given(st.integers(0, 2**32 - 1), SIZES)
def test_an_affine_map_changes_volume_by_its_determinant(seed, size):
    rng = np.random.default_rng(seed)
    matrix, offset = torch.from_numpy(rng.normal(size=(len(size),) * 2)), torch.from_numpy(rng.normal(size=len(size)))
    determinant = jacobian_determinant(affine_field(matrix, offset, size))
    np.testing.assert_allclose(determinant, np.full(size, np.linalg.det(matrix.numpy())), atol=1e-9)


@pytest.mark.filterwarnings("error")
@given(SIZES)
def test_a_mirror_folds_everywhere(size):
    mirror = torch.eye(len(size), dtype=torch.float64)
    mirror[0, 0] = -1
    determinant = jacobian_determinant(affine_field(mirror, torch.zeros(len(size)), size))
    assert folding(determinant) == 1
    assert np.isnan(log_jacobian_sd(determinant))


def test_folding_and_spread_are_shares_of_what_is_counted():
    determinant = torch.tensor([[1.0, np.e, 0.0], [-2.0, np.e**2, torch.nan]])
    assert folding(determinant) == 0.5
    assert log_jacobian_sd(determinant) == pytest.approx(np.std([0, 1, 2]))


def test_a_product_map_has_the_product_of_its_slopes():
    x, y = grid((9, 8))
    determinant = jacobian_determinant(torch.stack([0.1 * x**2, -0.05 * y**2]))
    # The central difference of a square is exact.
    expected = (1 + 0.2 * x) * (1 - 0.1 * y)
    np.testing.assert_allclose(determinant[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-12)


@given(st.integers(0, 2**32 - 1), SIZES)
def test_landmarks_that_follow_the_map_have_no_error_and_others_their_distance(seed, size):
    rng = np.random.default_rng(seed)
    dimensions = len(size)
    matrix, offset = rng.normal(size=(dimensions, dimensions)), rng.normal(size=dimensions)
    field = affine_field(torch.from_numpy(matrix), torch.from_numpy(offset), size)
    fixed = rng.uniform(0, np.array(size) - 1, (6, dimensions))
    moving = fixed @ matrix.T + offset
    spacing = rng.uniform(0.5, 3, dimensions)
    np.testing.assert_allclose(landmark_errors(field, fixed, moving, spacing.tolist()), 0, atol=1e-9)
    astray = rng.normal(size=(6, dimensions))
    expected = np.sqrt(((astray * spacing) ** 2).sum(1))
    np.testing.assert_allclose(landmark_errors(field, fixed, moving + astray, spacing.tolist()), expected)


def test_without_landmarks_there_are_no_errors():
    assert landmark_errors(torch.zeros(2, 4, 4), np.zeros((0, 2)), np.zeros((0, 2)), [1, 1]).shape == (0,)


@settings(deadline=None)
@given(st.integers(0, 2**32 - 1), SIZES)
def test_labels_are_warped_as_monai_warps_them(seed, size):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, 4, size, generator=generator)
    field = 2 * torch.randn(len(size), *size, generator=generator)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*native grid_sample")
        warp = Warp(mode="nearest", padding_mode="zeros")
    expected = warp(labels[None, None].double(), field[None].double())[0, 0]
    assert torch.equal(warp_labels(labels, field).double(), expected)


def test_labels_come_from_where_the_field_points_and_background_from_beyond():
    labels = torch.arange(1, 13).view(3, 4)
    field = torch.zeros(2, 3, 4)
    field[1] = 1  # one column to the right
    field[0, 0, 0] = torch.nan
    expected = [[0, 3, 4, 0], [6, 7, 8, 0], [10, 11, 12, 0]]
    assert warp_labels(labels, field).tolist() == expected


def test_registration_brings_the_labels_together():
    fixed, moving = torch.zeros(8, 8, dtype=torch.long), torch.zeros(8, 8, dtype=torch.long)
    fixed[2:4, 2:4], moving[3:5, 2:4] = 1, 1
    still, moved = torch.zeros(2, 8, 8), torch.zeros(2, 8, 8)
    moved[0] = 1
    found = warped_dice([still, moved], [moving, moving], [fixed, fixed], classes=2)
    np.testing.assert_allclose(found, [[0.5], [1]])
