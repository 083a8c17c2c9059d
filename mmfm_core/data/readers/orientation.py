"""Volumes from any orientation to one."""

import numpy as np
from nibabel.affines import voxel_sizes
from nibabel.orientations import apply_orientation, io_orientation

from mmfm_core.data.readers.geometry import Volume
from mmfm_core.data.readers.refusals import check_finite
from mmfm_core.errors import MmfmError


def to_ras(voxels: np.ndarray, affine: np.ndarray) -> Volume:
    """Turn and flip axes (no resampling) to the nearest RAS+; `affine` [4, 4] takes an index to RAS mm.

    Raises:
        MmfmError: a flat volume, an affine that spans no space, or voxels that are no numbers.
    """
    if voxels.ndim != 3 or min(voxels.shape) < 2:
        raise MmfmError("is a single slice, not a volume; declare it as kind image2d, or name the whole series")
    axes = affine[:3, :3]
    lengths = np.linalg.norm(axes, axis=0)
    if not (np.isfinite(affine).all() and lengths.all() and abs(np.linalg.det(axes / lengths)) > 0.1):
        raise MmfmError("has an orientation (affine) that spans no space; convert it again from the original series")
    orientation = io_orientation(affine)
    size = voxel_sizes(affine)[np.argsort(orientation[:, 0])]
    turned = apply_orientation(voxels, orientation)
    return Volume(check_finite(np.ascontiguousarray(turned, dtype=np.float32)), (size[0], size[1], size[2]))
