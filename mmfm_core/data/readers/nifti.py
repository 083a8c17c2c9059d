"""NIfTI volumes."""

import logging
from pathlib import Path

import nibabel
import numpy as np
from nibabel.nifti1 import Nifti1Pair

from mmfm_core.data.readers.geometry import Volume
from mmfm_core.data.readers.orientation import to_ras
from mmfm_core.data.readers.refusals import check_size, reading
from mmfm_core.errors import MmfmError

# nibabel reports repairs of a header on the screen, with the header's values.
logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)


def read_nifti(path: Path, assume_oriented: bool = False) -> Volume:
    """A NIfTI (scl_slope and scl_inter applied) in RAS+.

    Args:
        assume_oriented: take the axes as stored for x, y, z of RAS+ where the header has neither sform nor qform.

    Raises:
        MmfmError: no orientation, several frames, one slice, no real numbers, NaN or infinite voxels, damage.
    """
    with reading("a NIfTI volume"):
        image = nibabel.load(path)
        if not isinstance(image, Nifti1Pair):  # of which Nifti2 is a subclass
            raise MmfmError("is no NIfTI file, whatever its suffix says; restore it, or convert it")
        if image.get_data_dtype().kind not in "iuf":
            raise MmfmError("holds complex or colour voxels; save it as one real number per voxel")
        shape = image.shape
        check_size(shape)
        if any(frames > 1 for frames in shape[3:]):
            raise MmfmError("holds several frames in time; save the one to read, or their mean, as its own file")
        header = image.header
        affine = image.affine
        if header["sform_code"] == 0 and header["qform_code"] == 0:
            if not assume_oriented:
                raise MmfmError(
                    "does not say how it is oriented (sform_code and qform_code are 0), so left and right are unknown; "
                    "set them, or declare 'assume_oriented: true' where its axes are known to be RAS+"
                )
            affine = np.diag([*header.get_zooms()[:3], 1.0])
        voxels = np.asarray(image.get_fdata(caching="unchanged", dtype=np.float32))
        return to_ras(voxels.reshape(shape[:3]), affine)
