"""Pixels of one DICOM file."""

import logging
from pathlib import Path

import numpy as np
from pydicom import Dataset, FileDataset, dcmread
from pydicom.errors import InvalidDicomError
from pydicom.pixels.decoders.base import get_decoder
from pydicom.pixels.processing import apply_color_lut, apply_modality_lut
from pydicom.pixels.utils import get_expected_length
from pydicom.uid import UID, SegmentationStorage

from mmfm_core.data.readers.refusals import check_size, reading
from mmfm_core.errors import MmfmError

# Beside its warnings pydicom logs them, with the header's values.
logging.getLogger("pydicom").setLevel(logging.CRITICAL + 1)


def open_dicom(path: Path) -> FileDataset:
    """A DICOM file that has pixels and a decoder for them.

    Raises:
        MmfmError: no file meta, no pixels, an unsupported transfer syntax, too few bytes of pixels, a Siemens mosaic.
    """
    with reading("DICOM"):
        try:
            dataset = dcmread(path)
        except InvalidDicomError as error:
            raise MmfmError(
                "is no complete DICOM file: the mark 'DICM' and the file meta are missing; export it again"
            ) from error
        if not any(keyword in dataset for keyword in ("PixelData", "FloatPixelData", "DoubleFloatPixelData")):
            raise MmfmError("is a DICOM object without pixels (a report, a waveform, a plan); name an image instead")
        syntax = dataset.file_meta.get("TransferSyntaxUID")
        if syntax is None:
            raise MmfmError("does not state its transfer syntax; export it again with complete file meta")
        _check_decoder(syntax)
        check_size((dataset.Rows, dataset.Columns, frame_count(dataset), dataset.SamplesPerPixel))
        native = not syntax.is_compressed and "PixelData" in dataset
        if native and len(dataset.PixelData) < get_expected_length(dataset):
            raise MmfmError("is truncated: it has fewer bytes of pixels than its size needs; export it again")
        if "MOSAIC" in dataset.get("ImageType", ()):
            raise MmfmError("is a Siemens mosaic, slices laid side by side in one picture; convert it to NIfTI")
        return dataset


def _check_decoder(syntax: UID) -> None:
    try:
        available = get_decoder(syntax).is_available
    except NotImplementedError:
        available = False
    if not available:
        # Only names of the standard are shown: a private identifier may say whose scanner it was.
        name = f"'{syntax.name}'" if syntax.name != str(syntax) else "a private transfer syntax"
        raise MmfmError(f"is stored as {name}, which cannot be decoded here; export it uncompressed")


def is_segmentation(dataset: Dataset) -> bool:
    """Whether the pixels are a DICOM SEG's."""
    return dataset.get("SOPClassUID") == SegmentationStorage or dataset.get("Modality") == "SEG"


def frame_count(dataset: Dataset) -> int:
    """Frames in the file; NumberOfFrames may be missing or empty where there is one."""
    return int(dataset.get("NumberOfFrames") or 1)


def attributes(dataset: Dataset, frame: int, group: str) -> Dataset:
    """Where a frame's attributes of a functional group are: its own, the shared, or (classic images) the file's."""
    per_frame = dataset.get("PerFrameFunctionalGroupsSequence") or [Dataset()] * (frame + 1)
    shared = dataset.get("SharedFunctionalGroupsSequence") or [Dataset()]
    for groups in (per_frame[frame], shared[0]):
        if groups.get(group):
            return groups[group][0]
    return dataset


def stored_frames(dataset: Dataset) -> tuple[np.ndarray, str]:
    """The frames as stored [F, R, C] or as RGB [F, R, C, 3], and their photometric interpretation."""
    pixels, properties = get_decoder(dataset.file_meta.TransferSyntaxUID).as_array(dataset)  # YBR becomes RGB
    tail = pixels.shape[-3:] if dataset.SamplesPerPixel == 3 else pixels.shape[-2:]
    return pixels.reshape(frame_count(dataset), *tail), str(properties["photometric_interpretation"])


def frames(dataset: Dataset) -> np.ndarray:
    """Grey frames in physical values, float32 [F, R, C]; colour in [0, 1], float32 [F, R, C, 3].

    MONOCHROME1 (small is white) is mirrored within the range of its stored bits, before slope and intercept.

    Raises:
        MmfmError: a segmentation, or colours in a space that is neither RGB, YBR nor a palette.
    """
    with reading("DICOM"):
        if is_segmentation(dataset):
            raise MmfmError(
                "is a segmentation (DICOM SEG), not an image; name one frame as a 2D mask, or convert it to NIfTI"
            )
        stored, photometric = stored_frames(dataset)
        if photometric == "PALETTE COLOR":
            stored = apply_color_lut(stored, dataset)
            return (stored / np.iinfo(stored.dtype).max).astype(np.float32)
        if photometric == "RGB":
            return (stored / (2**dataset.BitsStored - 1)).astype(np.float32)
        if photometric not in ("MONOCHROME1", "MONOCHROME2"):
            raise MmfmError("has colours in a space that is not supported; export it as RGB or MONOCHROME2")
        if photometric == "MONOCHROME1":
            stored = (-1 if dataset.PixelRepresentation else 2**dataset.BitsStored - 1) - stored.astype(np.int64)
        return np.stack([_physical(dataset, number, frame) for number, frame in enumerate(stored)])


def _physical(dataset: Dataset, number: int, frame: np.ndarray) -> np.ndarray:
    values = apply_modality_lut(frame, attributes(dataset, number, "PixelValueTransformationSequence"))
    return (values * float(dataset.get("DoseGridScaling", 1))).astype(np.float32)  # RTDOSE has its own slope


def segment(dataset: Dataset) -> np.ndarray:
    """A DICOM SEG of one frame as int64 [R, C]: the number of its segment, and 0.

    Raises:
        MmfmError: several frames, of which a SEG holds only those with something in them; or fractions.
    """
    with reading("DICOM SEG"):
        if frame_count(dataset) > 1 or dataset.get("SegmentationType", "BINARY") != "BINARY":
            raise MmfmError("is a DICOM SEG of several frames or of fractions; convert it to NIfTI on the image's grid")
        number = attributes(dataset, 0, "SegmentIdentificationSequence").get("ReferencedSegmentNumber", 1)
        return stored_frames(dataset)[0][0].astype(np.int64) * int(number)
