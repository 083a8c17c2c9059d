"""A study's images turned, scaled and shifted together, with the maps that lie on them."""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config.modality import Augment, PixelModality

STILL = 0.2
"""The share of studies that stay as they are: to read between pixels blurs, and what is tested is not blurred."""


def draws(studies: int, device: torch.device) -> Tensor:
    """How each study is moved, between -1 and 1 of what its images allow: angle, scale, shift of each axis, [B, 3, 3].

    Uniform, from torch's generator, like all that a site draws in training. One draw serves all images of a study,
    those in 2D by the first angle and the first two axes.
    """
    moved = torch.rand(studies, 1, 1, device=device) >= STILL
    return torch.where(moved, 2 * torch.rand(studies, 3, 3, device=device) - 1, 0.0)


def moved(x: Tensor, drawn: Tensor, form: PixelModality, labels: bool = False) -> Tensor:
    """Images [B, C, *size], or maps of label ids [B, *any, *size], moved as `drawn` and their `augment` say.

    An image is read between pixels, a map of `labels` at the nearest; what comes in from outside repeats the border.
    """
    change, axes = form.augment, len(form.size)
    if change is None or not change.moves:
        return x
    channels = x.reshape(len(x), -1, *x.shape[-axes:])
    with torch.autocast(x.device.type, enabled=False):  # a place in half precision is pixels away
        grid = F.affine_grid(_matrices(drawn, change, form), list(channels.shape), align_corners=False)
        # Label ids are small whole numbers, which float32 holds as they are.
        found = F.grid_sample(
            channels.float(), grid, "nearest" if labels else "bilinear", padding_mode="border", align_corners=False
        )
    return found.reshape(x.shape).to(x.dtype)


def _matrices(drawn: Tensor, change: Augment, form: PixelModality) -> Tensor:
    """From where in the unmoved image each place is read, in `affine_grid`'s coordinates, [B, axes, axes + 1].

    These run from -1 to 1 along each axis, the last axis first; an angle is of millimetres, or of pixels where no
    spacing is known.
    """
    axes = len(form.size)
    angles, scales, shifts = drawn.unbind(1)
    turn = torch.linalg.matrix_exp(_generators(angles, axes) * math.radians(change.rotate))
    spacing = getattr(form, "spacing", None) or (1.0,) * axes
    half = drawn.new_tensor([side * step for side, step in zip(form.size, spacing, strict=True)][::-1])
    turn = turn * (1 + change.scale * scales[:, None, :axes])
    return torch.cat([turn * half / half[:, None], 2 * change.shift * shifts[:, :axes, None]], 2)


def _generators(angles: Tensor, axes: int) -> Tensor:
    """Antisymmetric matrices [B, axes, axes] whose exponentials are rotations by `angles` [B, 3]."""
    planes = [(0, 1), (0, 2), (1, 2)][: 1 if axes == 2 else 3]
    matrix = angles.new_zeros(len(angles), axes, axes)
    for angle, (a, b) in zip(angles.unbind(1), planes, strict=False):
        matrix[:, a, b], matrix[:, b, a] = angle, -angle
    return matrix
