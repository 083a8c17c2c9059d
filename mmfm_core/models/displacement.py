"""From what a network predicts of a pair of images to a displacement field, and the descent that refines it.

A displacement [B, d, *size] is in voxels: point x of the fixed image is shown by point x + displacement(x) of the
moving one, as in `monai.networks.blocks.Warp`.
"""

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.models import _torchvision_ops  # noqa: F401  (monai imports torchvision)

from monai.networks.blocks import DVF2DDF, Warp  # isort: skip

AFFINE_RATE, VELOCITY_RATE = 0.01, 0.1
"""Of the descent: relative to half the image's side, and in half-resolution voxels."""


@dataclass(frozen=True)
class Motion:
    """Parameters of a transform; all zero is the identity.

    Attributes:
        affine: [B, d, d + 1], what an affine map of coordinates in [-1, 1] adds to the identity.
        velocity: [B, d, *half of size], in half-resolution voxels; None of an affine transform.
    """

    affine: Tensor
    velocity: Tensor | None


class Displacement(nn.Module):
    """A motion as a displacement: an affine map after a dense one.

    Diffeomorphic, the dense map is a stationary velocity integrated by scaling and squaring at half resolution
    (Dalca et al., MedIA 57, 2019); otherwise the velocity is taken as the displacement.
    """

    def __init__(self, diffeomorphic: bool) -> None:
        super().__init__()
        with quiet():
            self.integrate = DVF2DDF(padding_mode="border") if diffeomorphic else nn.Identity()

    def forward(self, motion: Motion, size: tuple[int, ...]) -> Tensor:
        """[B, d, *size]."""
        axes = (torch.linspace(-1, 1, side, device=motion.affine.device) for side in size)
        grid = torch.stack(torch.meshgrid(*axes, indexing="ij")).to(motion.affine)
        scale = grid.new_tensor([(side - 1) / 2 for side in size]).view(-1, *[1] * len(size))
        dense = grid.new_zeros(len(motion.affine), *grid.shape)
        if motion.velocity is not None:
            dense = 2 * doubled(self.integrate(motion.velocity))
        points = grid + dense / scale
        matrix, shift = motion.affine[..., :-1], motion.affine[..., -1]
        moved = (matrix @ points.flatten(2)).reshape(points.shape) + shift.view(*shift.shape, *[1] * len(size))
        return dense + moved * scale


def refined(motion: Motion, cost: Callable[..., Tensor], images: Sequence[Tensor], steps: int) -> Motion:
    """The motion after `steps` of Adam on `cost(motion, *images)` ([B]) of each pair itself: instance optimisation.

    The dense part moves by a coarser grid of control points, interpolated linearly, so that it stays smooth. No pair
    depends on the others. Source: Balakrishnan et al., IEEE TMI 38(8), 2019, section V-B.
    """
    with torch.inference_mode(False), torch.enable_grad():
        # Copies, because tensors made in inference mode cannot take part in a gradient.
        images = [image.clone() for image in images]
        start = Motion(motion.affine.clone(), None if motion.velocity is None else motion.velocity.clone())
        affine = torch.zeros_like(start.affine, requires_grad=True)
        groups = [{"params": [affine], "lr": AFFINE_RATE}]
        control: Tensor | None = None
        if start.velocity is not None:
            coarse = [max(side // 2, 1) for side in start.velocity.shape[2:]]
            control = start.velocity.new_zeros(*start.velocity.shape[:2], *coarse).requires_grad_()
            groups.append({"params": [control], "lr": VELOCITY_RATE})

        def moved() -> Motion:
            if control is None or start.velocity is None:
                return Motion(start.affine + affine, None)
            return Motion(start.affine + affine, start.velocity + doubled(control, start.velocity.shape[2:]))

        optimizer = torch.optim.Adam(groups)
        for _ in range(steps):
            optimizer.zero_grad()
            torch.autograd.backward(
                cost(moved(), *images).sum(), inputs=[affine] if control is None else [affine, control]
            )
            optimizer.step()
        result = moved()
    return Motion(result.affine.detach(), None if result.velocity is None else result.velocity.detach())


def bending_energy(field: Tensor) -> Tensor:
    """Mean squared second derivative of each field, [B, d, *size] -> [B]; zero of an affine map.

    Rueckert et al., IEEE TMI 18(8), 1999, equation 8. Not monai's, which indexes by lists as torch 2.9 no longer does.
    """
    axes = range(2, field.ndim)
    squares = [field.diff(dim=i).diff(dim=j).square().flatten(1).mean(1) for i in axes for j in axes]
    return torch.stack(squares).sum(0)


def doubled(x: Tensor, size: torch.Size | None = None) -> Tensor:
    """[B, C, *half] -> [B, C, *size], twice as large where no size is given, interpolated linearly."""
    mode = "bilinear" if x.ndim == 4 else "trilinear"
    return F.interpolate(x, size=size, scale_factor=2 if size is None else None, mode=mode)


def halved(x: Tensor) -> Tensor:
    """[B, C, *size] -> [B, C, *half], each value the mean of its 4 or 8."""
    return F.avg_pool2d(x, 2) if x.ndim == 4 else F.avg_pool3d(x, 2)


def linear_warp() -> Warp:
    """Linear interpolation; the border continued beyond the image."""
    with quiet():
        return Warp()


def unit(image: Tensor) -> Tensor:
    """Each study's intensities [B, ...] scaled to [0, 1]: what monai's mutual information expects."""
    each = image.flatten(1)
    low, high = (t.view(-1, *[1] * (image.ndim - 1)) for t in (each.amin(1), each.amax(1)))
    scaled: Tensor = (image - low) / (high - low).clamp(min=1e-6)
    return scaled


@contextmanager
def quiet() -> Iterator[None]:
    """monai's Warp warns, whenever one is made, that its optional compiled operators are absent."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*Using PyTorch native grid_sample")
        yield


def curve_error(displacement: Tensor, moving: Tensor, fixed: Tensor, spacing: Sequence[float]) -> float:
    """Mean distance from where the points of a fixed label arrive to the nearest of the same label in the moving map.

    For labels of one point it is the target registration error; along a curve nobody knows which point belongs to
    which. The mean over the points of a label, then over the labels that both maps have; NaN where there is none.

    Args:
        displacement: [d, *size], in voxels.
        moving, fixed: label maps [*size], integer.
        spacing: [d], size of a voxel along each axis in mm; ones measure in pixels.
    """
    step = torch.as_tensor(spacing, dtype=torch.float64)
    errors = []
    for label in set(fixed.unique().tolist()) & set(moving.unique().tolist()) - {0}:
        points, goal = (fixed == label).nonzero(), (moving == label).nonzero()
        arrived = points + displacement[(slice(None), *points.T)].T.double()
        errors.append(float(torch.cdist(arrived * step, goal * step).amin(1).mean()))
    return sum(errors) / len(errors) if errors else float("nan")
