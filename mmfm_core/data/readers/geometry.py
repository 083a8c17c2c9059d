"""Grids: spacing and size. Images and masks go through the same coordinates, so that they stay aligned.

Written here because no library at hand resamples volumes with antialiasing to an exact spacing: torch antialiases two
axes only, and scipy's and monai's zooms round the spacing to a whole number of voxels.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

Spacing = tuple[float, float, float]

LUMINANCE = np.array([0.299, 0.587, 0.114], dtype=np.float32)
"""ITU-R BT.601: what PNG and JPEG readers use."""


@dataclass(frozen=True)
class Volume:
    """A volume whose axes run to the patient's right, front and head (RAS+).

    Attributes:
        voxels: float32 [x, y, z].
        spacing: voxel size in mm along x, y, z.
    """

    voxels: np.ndarray
    spacing: Spacing


def steps(
    shape: Sequence[int], size: Sequence[int], old: Sequence[float] | None = None, new: Sequence[float] | None = None
) -> list[float]:
    """Source voxels per target voxel along each axis: a change of spacing, or the whole of `shape` into `size`."""
    if old is None or new is None:
        return [have / want for have, want in zip(shape, size, strict=True)]
    return [n / o for o, n in zip(old, new, strict=True)]


def resample(values: np.ndarray, size: Sequence[int], step: Sequence[float]) -> np.ndarray:
    """Linear interpolation about the centre, antialiased where `step` > 1; zero where the target leaves the source.

    The separable triangle filter of Pillow's BILINEAR, for any number of axes. float32 [*shape] -> [*size].
    """
    for axis, (length, pixels, width) in enumerate(zip(values.shape, size, step, strict=True)):
        if (length, width) != (pixels, 1):
            values = np.moveaxis(np.tensordot(_weights(length, pixels, width), values, (1, axis)), 0, axis)
    return np.ascontiguousarray(values)


def resample_labels(labels: np.ndarray, size: Sequence[int], step: Sequence[float]) -> np.ndarray:
    """The nearest label at the very coordinates of `resample`; 0 where the target leaves the source."""
    for axis, (length, pixels, width) in enumerate(zip(labels.shape, size, step, strict=True)):
        at = _coordinates(length, pixels, width)
        # Halves go up, as in Pillow's NEAREST; numpy rounds them to even, which skips voxels.
        nearest = np.clip(np.floor(at + 0.5).astype(int), 0, length - 1)
        column = _inside(at, length).reshape([-1 if a == axis else 1 for a in range(labels.ndim)])
        labels = np.where(column, labels.take(nearest, axis), 0)
    return labels


@lru_cache(maxsize=16)  # the images of a modality mostly have one size
def _weights(length: int, pixels: int, width: float) -> np.ndarray:
    at = _coordinates(length, pixels, width)
    weights = np.maximum(0, 1 - np.abs(at[:, None] - np.arange(length)) / max(width, 1))
    weights *= _inside(at, length)[:, None]
    weights /= np.maximum(weights.sum(1, keepdims=True), 1e-9)
    return weights.astype(np.float32)


def _coordinates(length: int, pixels: int, step: float) -> np.ndarray:
    """Centres of the target's pixels in the source's; the middles of both coincide."""
    return (np.arange(pixels) - (pixels - 1) / 2) * step + (length - 1) / 2


def _inside(at: np.ndarray, length: int) -> np.ndarray:
    return (at > -0.5 - 1e-6) & (at < length - 0.5 + 1e-6)
