"""Image, volume and mask files to arrays, told apart by their names.

| name | read as |
|---|---|
| `.png`, `.jpg`, `.jpeg` | image |
| `.dcm`, or any file with the mark of DICOM | image, or a volume of several frames |
| a folder | volume: one DICOM series |
| `.nii`, `.nii.gz` | volume |
| `file.npz:array[index]` | image: one item of an array in a numpy archive |

PNG, JPEG, colour and 8-bit arrays are read as [0, 1] of their full scale, and no window applies to them. DICOM, NIfTI
and other arrays are read as physical values (Hounsfield units, say); a window (low, high) clips and maps them to
[0, 1].

Errors name no file, since its name comes from a patient's record: the caller adds manifest and row.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmfm_core.config.modality import ImageModality, VolumeModality
from mmfm_core.data.readers.geometry import LUMINANCE, Spacing, resample, resample_labels, steps
from mmfm_core.data.readers.sources import read_labels, read_pixels, read_voxels

Window = tuple[float, float] | None


def read_image(path: Path, modality: ImageModality) -> np.ndarray:
    """The image of a modality, float32 [C, H, W]; see `read_image_file`."""
    return read_image_file(path, modality.size, modality.channels, modality.window)


def read_volume(path: Path, modality: VolumeModality) -> np.ndarray:
    """The volume of a modality, float32 [1, D, H, W]; see `read_volume_file`."""
    return read_volume_file(path, modality.size, modality.spacing, modality.window, modality.assume_oriented)


def read_image_file(path: Path, size: tuple[int, int], channels: int = 1, window: Window = None) -> np.ndarray:
    """A 2D image as float32 [C, H, W], rows and columns as stored, the whole of it resized with antialiasing.

    Colour becomes luminance where `channels` is 1; grey is repeated where it is 3.

    Raises:
        MmfmError: the file is damaged, a volume, a segmentation, without pixels, or cannot be decoded here.
    """
    pixels, physical = read_pixels(path)
    if pixels.ndim == 3 and channels == 1:
        pixels = pixels @ LUMINANCE
    if physical:
        pixels = _windowed(pixels, window)
    planes = [pixels] if pixels.ndim == 2 else list(pixels.transpose(2, 0, 1))
    resized = np.stack([resample(plane, size, steps(plane.shape, size)) for plane in planes])
    return np.broadcast_to(resized, (channels, *size)).astype(np.float32)


def read_volume_file(
    path: Path,
    size: tuple[int, int, int],
    spacing: Spacing | None = None,
    window: Window = None,
    assume_oriented: bool = False,
) -> np.ndarray:
    """A volume as float32 [1, D, H, W]; D, H, W run along x, y, z of RAS+ (to the right, the front, the head).

    With `spacing` (mm along x, y, z) it is resampled to that and cropped, or padded with zeros, about its centre to
    `size`; without, the whole of it is resized. Padding is 0 after the window, which is its low end: CT without a
    window would be padded with water.

    Raises:
        MmfmError: the file is damaged, a single image, has no orientation (unless `assume_oriented`), has NaN voxels,
            lacks slices, mixes series, or cannot be decoded here.
    """
    volume = read_voxels(path, assume_oriented)
    voxels = _windowed(volume.voxels, window)
    return resample(voxels, size, steps(voxels.shape, size, volume.spacing, spacing))[None]


def read_mask(
    path: Path, size: Sequence[int], spacing: Spacing | None = None, assume_oriented: bool = False
) -> np.ndarray:
    """Label ids, int64 of `size` [H, W] or [D, H, W], nearest neighbour at the coordinates of the image's pixels.

    A mask on the same grid as its image, read with the same `size` and `spacing`, stays aligned with it.

    Raises:
        MmfmError: as for images; also a JPEG, colours, or values that are no whole numbers.
    """
    labels, have = read_labels(path, len(size), assume_oriented)
    return resample_labels(labels, size, steps(labels.shape, size, have, spacing))


def _windowed(values: np.ndarray, window: Window) -> np.ndarray:
    if window is None:
        return values
    low, high = window
    return ((np.clip(values, low, high) - low) / (high - low)).astype(np.float32)
