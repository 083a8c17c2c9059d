"""Which reader a file's name asks for; and the refusal of a volume where an image is wanted, or the reverse.

pydicom and nibabel are imported where such a file is met: a site without them starts faster.
"""

from pathlib import Path
from typing import Literal

import numpy as np

from mmfm_core.data.readers.files import IN_ARCHIVE, is_dicom, read_archived, read_picture, read_picture_labels
from mmfm_core.data.readers.geometry import Spacing, Volume
from mmfm_core.data.readers.refusals import check_finite, reading
from mmfm_core.errors import MmfmError

Source = Literal["picture", "archive", "dicom", "series", "nifti"]

LARGEST_LABEL = 2**24
"""Up to which float32 voxels hold whole numbers exactly."""


def read_pixels(path: Path) -> tuple[np.ndarray, bool]:
    """An image as float32 [H, W] or [H, W, 3], and whether its values are physical (else in [0, 1])."""
    match _source(path):
        case "picture":
            return read_picture(path), False
        case "archive":
            return _archived_pixels(read_archived(path))
        case "dicom":
            from mmfm_core.data.readers.dicom import frames, open_dicom

            pixels = frames(open_dicom(path))
            if len(pixels) > 1:
                raise MmfmError("is a DICOM file of several frames; declare the modality as kind volume3d")
            return check_finite(pixels[0]), pixels.ndim == 3
        case _:
            raise MmfmError("is a volume; declare the modality as kind volume3d, or name a slice saved as an image")


def read_voxels(path: Path, assume_oriented: bool) -> Volume:
    """A volume in RAS+."""
    match _source(path):
        case "nifti":
            from mmfm_core.data.readers.nifti import read_nifti

            return read_nifti(path, assume_oriented)
        case "series" | "dicom" as source:
            from mmfm_core.data.readers.dicom_volume import read_multiframe, read_series

            return read_series(path) if source == "series" else read_multiframe(path)
        case _:
            raise MmfmError("is an image, not a volume; declare the modality as kind image2d")


def read_labels(path: Path, dimensions: int, assume_oriented: bool) -> tuple[np.ndarray, Spacing | None]:
    """Label ids int64 [H, W] or [x, y, z] (RAS+), and the spacing of a volume."""
    source = _source(path)
    if dimensions == 3:
        volume = read_voxels(path, assume_oriented)
        return _whole(volume.voxels, 3), volume.spacing
    if source == "picture":
        return read_picture_labels(path), None
    if source == "archive":
        return _whole(read_archived(path), 2), None
    if source == "dicom":
        from mmfm_core.data.readers.dicom import is_segmentation, open_dicom, segment

        dataset = open_dicom(path)
        if is_segmentation(dataset):
            return segment(dataset), None
    return _whole(read_pixels(path)[0], 2), None


def files_of(path: Path) -> list[Path]:
    """The files that are read for a cell's path: of an archive's item the archive, of a series all of its folder."""
    if archived := IN_ARCHIVE.fullmatch(str(path)):
        return [Path(archived["file"])]
    return sorted(path.iterdir()) if path.is_dir() else [path]


def _source(path: Path) -> Source:
    name = path.name.lower()
    if IN_ARCHIVE.fullmatch(str(path)):
        return "archive"
    if name.endswith(".npz"):
        raise MmfmError("is a numpy archive; name one image of it, as in file.npz:array[index]")
    if name.endswith((".nii", ".nii.gz")):
        return "nifti"
    if name.endswith((".png", ".jpg", ".jpeg")):
        return "picture"
    if name.endswith(".dcm"):
        return "dicom"
    if path.is_dir():
        return "series"
    with reading("an image"):
        return "dicom" if is_dicom(path) else "picture"


def _archived_pixels(item: np.ndarray) -> tuple[np.ndarray, bool]:
    if (
        not item.size
        or item.dtype.kind not in "biuf"
        or not (item.ndim == 2 or (item.ndim == 3 and item.shape[2] == 3))
    ):
        raise MmfmError("is no image: an item of the array must be [H, W] or [H, W, 3] numbers")
    if item.dtype == np.uint8:
        return item.astype(np.float32) / 255, False
    return check_finite(item.astype(np.float32)), item.dtype != np.bool_


def _whole(values: np.ndarray, dimensions: int) -> np.ndarray:
    if values.size and values.ndim == dimensions and values.dtype.kind in "biuf":
        rounded = np.rint(values.astype(np.float64))
        # A stored scale factor leaves rounding errors; half a label is another matter. NaN fails both comparisons.
        if np.abs(values - rounded).max() <= 1e-3 and np.abs(rounded).max() <= LARGEST_LABEL:
            return rounded.astype(np.int64)
    raise MmfmError("has values that are no label ids (whole numbers up to 2^24); name a mask, not an image")
