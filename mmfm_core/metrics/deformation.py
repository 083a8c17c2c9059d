"""Metrics of registration: how plausible a displacement field is, and how well it brings points and labels together.

A displacement [d, *size] is in voxels; its channel i is along axis i. Point x of the fixed image is shown by point
x + displacement(x) of the moving image, as in `monai.networks.blocks.Warp`.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.metrics.overlap import dice
from mmfm_core.metrics.ranking import Floats


def jacobian_determinant(displacement: Tensor) -> Tensor:
    """Local change of volume [*size] of the map x + displacement(x), by central differences (one-sided at the border).

    One is rigid, below one shrinks, zero or less folds. Each axis has at least two voxels.
    """
    dimensions = displacement.shape[0]
    axes = list(range(dimensions))
    rows = [torch.stack(torch.gradient(channel, dim=axes), dim=-1) for channel in displacement.double()]
    return torch.linalg.det(torch.stack(rows, dim=-2) + torch.eye(dimensions, dtype=torch.float64))


def folding(determinant: Tensor) -> float:
    """Share of voxels whose Jacobian determinant is not positive: there the map is not one to one."""
    return float((~(determinant > 0)).double().mean())


def log_jacobian_sd(determinant: Tensor) -> float:
    """Standard deviation of log J over the voxels where J is positive: 0 is rigid; NaN where no voxel is.

    Source: Leow et al., IEEE TMI 26(6), 2007; used by Learn2Reg, Hering et al., IEEE TMI 42(3), 2023.
    """
    positive = determinant[determinant > 0]
    return float(positive.log().std(correction=0)) if len(positive) else float("nan")


def landmark_errors(displacement: Tensor, fixed: Floats, moving: Floats, spacing: Sequence[float]) -> Floats:
    """Target registration error of each landmark, [L]: its distance, after registration, from where it belongs.

    Args:
        displacement: [d, *size], in voxels; interpolated linearly, and continued beyond the image as at its border.
        fixed: landmarks [L, d] in voxels of the fixed image.
        moving: the same landmarks [L, d] in voxels of the moving image.
        spacing: [d], size of a moving voxel along each axis in mm; ones measure in pixels.

    Source: Fitzpatrick and West, IEEE TMI 20(9), 2001.
    """
    arrived = fixed + _sample(displacement, fixed)
    return np.linalg.norm((arrived - moving) * np.asarray(spacing), axis=1)


def warp_labels(labels: Tensor, displacement: Tensor) -> Tensor:
    """Label map [*size] of the moving image on the grid of the fixed one: nearest voxel, background beyond the image.

    Ours, because monai's Warp warns at each use without its compiled operators, and rounds labels through float.
    """
    grid = torch.stack(torch.meshgrid(*(torch.arange(size) for size in displacement.shape[1:]), indexing="ij"))
    sizes = torch.tensor(labels.shape).view(-1, *[1] * labels.ndim)
    source = (grid + displacement.double()).round().nan_to_num(-1)
    inside = ((source >= 0) & (source < sizes)).all(0)
    nearest = torch.where(inside, source, 0).long()
    return torch.where(inside, labels[tuple(nearest)], 0)


def warped_dice(
    displacements: Iterable[Tensor], moving: Iterable[Tensor], fixed: Iterable[Tensor], classes: int
) -> Floats:
    """Dice [N, classes - 1] of the moving label maps, warped, with the fixed ones; NaN as in `overlap.dice`."""
    warped = (warp_labels(labels, field) for labels, field in zip(moving, displacements, strict=True))
    return dice(warped, fixed, classes)


def _sample(displacement: Tensor, points: Floats) -> Floats:
    """Displacement [L, d] at points [L, d]."""
    last = torch.tensor(displacement.shape[1:], dtype=torch.float64) - 1
    grid = (2 * torch.from_numpy(points).double() / last - 1).flip(-1)  # torch wants the last axis first, in -1 to 1
    grid = grid.view(1, *[1] * (len(last) - 1), *grid.shape)
    sampled = F.grid_sample(displacement[None].double(), grid, padding_mode="border", align_corners=True)
    result: Floats = sampled.reshape(len(last), -1).T.numpy()
    return result
