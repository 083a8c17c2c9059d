"""DICOM slices to a volume: a series, or the frames of one file."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydicom import Dataset

from mmfm_core.data.readers.dicom import attributes, frames, open_dicom
from mmfm_core.data.readers.files import is_dicom
from mmfm_core.data.readers.geometry import LUMINANCE, Volume
from mmfm_core.data.readers.orientation import to_ras
from mmfm_core.data.readers.refusals import check_size, reading
from mmfm_core.errors import MmfmError

TOLERANCE = 0.1
"""By which a slice may miss its place on the straight line of slices, in slice distances. One missing slice inside
moves some slice by a third of the distance or more; rounded headers stay below a tenth."""


@dataclass(frozen=True)
class Slice:
    """One frame in the patient's space (LPS+, mm).

    Attributes:
        pixels: float32 [R, C].
        position: centre of the first pixel [3].
        cosines: directions along a row and along a column [2, 3].
        spacing: distance between rows and between columns.
    """

    pixels: np.ndarray
    position: np.ndarray
    cosines: np.ndarray
    spacing: tuple[float, float]


def read_multiframe(path: Path) -> Volume:
    """The frames of one DICOM file as a volume in RAS+; colour as luminance.

    Raises:
        MmfmError: see `read_series`.
    """
    with reading("a DICOM volume"):
        return _stack(_slices(open_dicom(path)))


def read_series(folder: Path) -> Volume:
    """The DICOM series in a folder as a volume in RAS+, in the order of the slices' positions.

    Raises:
        MmfmError: a file is no readable DICOM image, there are several series, slices lie at one place, are missing
            or uneven, differ in size or direction, or have no position.
    """
    with reading("a DICOM series"):
        paths = sorted(p for p in folder.iterdir() if p.name != "DICOMDIR" and not p.name.startswith("."))
        if not all(path.is_file() and is_dicom(path) for path in paths):
            raise MmfmError("is a folder with something in it that is no DICOM file; keep one series in a folder")
        files = [open_dicom(path) for path in paths]
        if len({file.get("SeriesInstanceUID") for file in files}) > 1:
            raise MmfmError("is a folder with several DICOM series; keep one series in a folder")
        check_size((sum(len(file.get("PixelData", b"")) for file in files),))
        return _stack([part for file in files for part in _slices(file)])


def _slices(dataset: Dataset) -> list[Slice]:
    pixels = frames(dataset)
    grey = pixels @ LUMINANCE if pixels.ndim == 4 else pixels
    return [_slice(dataset, number, frame) for number, frame in enumerate(grey)]


def _slice(dataset: Dataset, number: int, pixels: np.ndarray) -> Slice:
    place = attributes(dataset, number, "PlanePositionSequence").get("ImagePositionPatient")
    direction = attributes(dataset, number, "PlaneOrientationSequence").get("ImageOrientationPatient")
    spacing = attributes(dataset, number, "PixelMeasuresSequence").get("PixelSpacing")
    if not (place and direction and spacing):
        raise MmfmError("has frames without position, direction or spacing: no volume; is it a film, or one picture?")
    position, cosines = np.array(place, float), np.array(direction, float).reshape(2, 3)
    if offsets := dataset.get("GridFrameOffsetVector"):  # RTDOSE: one position, and offsets along the normal
        position = position + np.cross(*cosines) * (float(offsets[number]) - float(offsets[0]))
    return Slice(pixels, position, cosines, (float(spacing[0]), float(spacing[1])))


def _stack(slices: list[Slice]) -> Volume:
    if len(slices) < 2:
        raise MmfmError("is a single slice, not a volume; declare it as kind image2d, or name the whole series")
    first = slices[0]
    for other in slices:
        same = other.pixels.shape == first.pixels.shape and np.allclose(other.spacing, first.spacing, rtol=1e-3)
        if not (same and np.allclose(other.cosines, first.cosines, atol=1e-3)):
            raise MmfmError("has slices of unlike size, spacing or direction (a localizer?); keep one stack of slices")
    normal = np.cross(*first.cosines)
    slices = sorted(slices, key=lambda part: float(part.position @ normal))
    positions = np.array([part.position for part in slices])
    step = (positions[-1] - positions[0]) / (len(slices) - 1)
    distance = float(step @ normal)
    gaps = np.diff(positions @ normal)
    if gaps.min() <= 0.01 * np.median(gaps) or distance <= 0:
        raise MmfmError("has two slices at one place (several phases or echoes); keep one of them in a folder")
    places = positions[0] + np.arange(len(slices))[:, None] * step
    if np.linalg.norm(positions - places, axis=1).max() > TOLERANCE * distance:
        raise MmfmError("has missing or unevenly spaced slices; export the whole series, or resample it to a NIfTI")
    affine = np.eye(4)
    row, column = first.spacing
    # Columns: one pixel along a row, one along a column, one slice. DICOM counts to the left and the back (LPS).
    affine[:3] = np.column_stack([first.cosines[0] * column, first.cosines[1] * row, step, positions[0]])
    affine[:2] *= -1
    return to_ras(np.stack([part.pixels for part in slices]).transpose(2, 1, 0), affine)
