"""Readers: real files are read as other libraries read them, or refused with the reason; masks stay on their images."""

import os
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pydicom
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from pydicom.dataset import Dataset, FileDataset, FileMetaDataset
from pydicom.pixels.processing import apply_color_lut
from pydicom.uid import CTImageStorage, ExplicitVRLittleEndian, SegmentationStorage, generate_uid

from mmfm_core.config.modality import ImageModality, VolumeModality
from mmfm_core.data.readers import read_image, read_image_file, read_mask, read_volume, read_volume_file
from mmfm_core.data.readers.geometry import resample, resample_labels, steps
from mmfm_core.errors import MmfmError

DATA = Path(os.environ.get("MMFM_DATA", Path(__file__).parents[1] / "../shared/data"))
DICOM, NIFTI = DATA / "dicom_samples", DATA / "nifti_samples"
needs_data = pytest.mark.skipif(not DICOM.is_dir(), reason="the shared data is not here; name it by MMFM_DATA")
pytestmark = pytest.mark.filterwarnings("error")
RNG = np.random.default_rng(0)
LUMA = [0.299, 0.587, 0.114]

NO_PLACE = "without position"
ONE = "single slice"
SAMPLES = {  # sample -> why it is no image, why it is no volume; None where it is one
    "CT_small": (None, ONE),
    "MR_small": (None, ONE),
    "MR_small_RLE": (None, ONE),
    "MR_small_jpeg_ls_lossless": ("'JPEG-LS Lossless Image Compression'", "cannot be decoded here"),
    "MR_small_bigendian": (None, ONE),
    "JPEG2000": (None, NO_PLACE),
    "examples_palette": (None, NO_PLACE),
    "examples_rgb_color": (None, NO_PLACE),
    "examples_jpeg2k": (None, NO_PLACE),
    "rtdose": ("several frames", None),
    "waveform_ecg": ("without pixels", "without pixels"),
    "liver_1frame": ("is a segmentation", "is a segmentation"),
    "test-SR": ("without pixels", "without pixels"),
    "MR_truncated": ("truncated", "truncated"),
    "no_meta": ("file meta are missing", "file meta are missing"),
    "siemens_epi_0": ("mosaic", "mosaic"),
    "siemens_dwi_b0": ("mosaic", "mosaic"),
    "siemens_dwi_b1000": ("mosaic", "mosaic"),
    "ct_head_series": ("is a volume", None),
}


def refused(reason: str, path: Path, read: Callable[[], Any]) -> None:
    with pytest.raises(MmfmError, match=reason) as error:
        read()
    assert path.name.split(".")[0] not in str(error.value), "a file's name comes from a patient's record"
    assert str(error.value)[0].islower(), "the caller puts manifest and row in front"


def sample(name: str) -> Path:
    return DICOM / name if name == "ct_head_series" else DICOM / f"files/{name}.dcm"


@needs_data
def test_the_table_has_every_sample() -> None:
    names = {line.split(",")[0] for line in (DICOM / "manifest.csv").read_text().splitlines()[1:]}
    assert names == set(SAMPLES)


@needs_data
@pytest.mark.parametrize("name", SAMPLES)
@pytest.mark.parametrize("bare", [False, True], ids=["suffix", "bare"])
def test_dicom_samples_as_images(tmp_path: Path, name: str, bare: bool) -> None:
    path, reason = sample(name), SAMPLES[name][0]
    if bare and path.is_file() and name != "no_meta":
        path = Path(shutil.copyfile(path, tmp_path / name))
    if reason is not None:
        return refused(reason, path, lambda: read_image_file(path, (8, 8)))
    with warnings.catch_warnings(action="ignore"):
        dataset = pydicom.dcmread(path)
        pixels = dataset.pixel_array
        if dataset.PhotometricInterpretation == "PALETTE COLOR":
            pixels = apply_color_lut(pixels, dataset) / 65535
        elif pixels.ndim == 3:
            pixels = pixels / 255
    expected = pixels * float(dataset.get("RescaleSlope", 1)) + float(dataset.get("RescaleIntercept", 0))
    planes = expected[None] if expected.ndim == 2 else expected.transpose(2, 0, 1)
    size = (dataset.Rows, dataset.Columns)
    np.testing.assert_allclose(read_image_file(path, size, 3), np.broadcast_to(planes, (3, *size)), atol=1e-5)
    grey = expected[None] if expected.ndim == 2 else (expected @ LUMA)[None]
    np.testing.assert_allclose(read_image_file(path, size), grey, atol=1e-5)


@needs_data
@pytest.mark.parametrize("name", SAMPLES)
def test_dicom_samples_as_volumes(name: str) -> None:
    path, reason = sample(name), SAMPLES[name][1]
    if reason is not None:
        return refused(reason, path, lambda: read_volume_file(path, (8, 8, 8)))
    if name == "rtdose":
        dose = pydicom.dcmread(path)
        expected = (dose.pixel_array * float(dose.DoseGridScaling)).transpose(2, 1, 0)
    else:
        slices = sorted((pydicom.dcmread(p) for p in path.iterdir()), key=lambda s: float(s.ImagePositionPatient[2]))
        expected = np.stack([s.pixel_array * s.RescaleSlope + s.RescaleIntercept for s in slices]).transpose(2, 1, 0)
    # Rows run to the left and columns to the back in both: RAS+ turns both around.
    np.testing.assert_allclose(read_volume_file(path, expected.shape)[0], expected[::-1, ::-1], rtol=1e-5)


@needs_data
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("anatomical.nii", None),
        ("ct_head.nii.gz", None),
        ("statmap_10426.nii.gz", None),
        ("functional.nii", "several frames"),
        ("example4d.nii.gz", "several frames"),
    ],
)
def test_nifti_samples(name: str, reason: str | None) -> None:
    path = NIFTI / name
    refused("is a volume", path, lambda: read_image_file(path, (8, 8)))
    if reason is not None:
        return refused(reason, path, lambda: read_volume_file(path, (8, 8, 8)))
    expected = nibabel.as_closest_canonical(nibabel.load(path)).get_fdata()
    np.testing.assert_allclose(read_volume_file(path, expected.shape)[0], expected, rtol=1e-5, atol=1e-5)
    assert np.isfinite(read_volume_file(path, (24, 20, 16), (4, 4, 4))).all()


def slice_of(pixels: np.ndarray, position: Sequence[float] = (0, 0, 0), **changes: Any) -> FileDataset:
    """A CT slice in memory; `changes` set or (None) drop attributes."""
    meta = FileMetaDataset()
    meta.TransferSyntaxUID, meta.MediaStorageSOPClassUID = ExplicitVRLittleEndian, CTImageStorage
    meta.MediaStorageSOPInstanceUID = generate_uid()
    dataset = FileDataset("", {}, file_meta=meta, preamble=b"\0" * 128)
    dataset.SOPClassUID, dataset.SOPInstanceUID, dataset.Modality = CTImageStorage, generate_uid(), "CT"
    dataset.SeriesInstanceUID = "1.2.3"
    dataset.ImagePositionPatient, dataset.ImageOrientationPatient = list(position), [1, 0, 0, 0, 1, 0]
    dataset.PixelSpacing = [2.0, 3.0]  # rows 2 mm apart, columns 3 mm
    dataset.set_pixel_data(pixels, "MONOCHROME2", pixels.dtype.itemsize * 8)
    for key, value in changes.items():
        setattr(dataset, key, value)
    return dataset


def series(folder: Path, volume: np.ndarray, gap: float = 4.0, **changes: Any) -> Path:
    """A DICOM series of `volume` [slices, rows, columns], its files named in a shuffled order."""
    folder.mkdir(exist_ok=True)
    for name, (index, pixels) in zip(RNG.permutation(len(volume)), enumerate(volume), strict=True):
        slice_of(pixels, (10, 20, 30 + gap * index), **changes).save_as(folder / f"PATIENT{name}")
    return folder


def nifti(path: Path, voxels: np.ndarray, affine: np.ndarray | None = None, code: int = 1) -> Path:
    image = nibabel.Nifti1Image(voxels, np.eye(4) if affine is None else affine)
    image.set_sform(image.affine, code)
    image.set_qform(None, 0)
    image.to_filename(path)
    return path


def overwrite(path: Path, offset: int, values: np.ndarray) -> None:
    data = bytearray(path.read_bytes())
    data[offset : offset + values.nbytes] = values.tobytes()
    path.write_bytes(data)


PIXELS = RNG.integers(0, 4000, (6, 5), np.uint16)
VOXELS = RNG.integers(0, 1000, (6, 5, 4)).astype(np.int16)


def test_slope_and_intercept_give_physical_values_and_the_window_maps_them(tmp_path: Path) -> None:
    slice_of(PIXELS, RescaleSlope=0.5, RescaleIntercept=-1000).save_as(tmp_path / "a.dcm")
    physical = PIXELS * 0.5 - 1000
    np.testing.assert_allclose(read_image_file(tmp_path / "a.dcm", (6, 5))[0], physical, rtol=1e-6)
    modality = ImageModality(kind="image2d", size=(6, 5), window=(-500, 500))
    np.testing.assert_allclose(
        read_image(tmp_path / "a.dcm", modality)[0], np.clip((physical + 500) / 1000, 0, 1), atol=1e-6
    )


def test_pixels_that_are_no_numbers_are_refused(tmp_path: Path) -> None:
    dataset = slice_of(PIXELS, BitsAllocated=32)
    del dataset.PixelData
    for values in (PIXELS / 7, np.where(PIXELS > 2000, np.nan, PIXELS)):
        dataset.FloatPixelData = values.astype("<f4").tobytes()
        dataset.save_as(tmp_path / "PATIENT.dcm")
        if np.isfinite(values).all():
            np.testing.assert_allclose(read_image_file(tmp_path / "PATIENT.dcm", (6, 5))[0], values, rtol=1e-6)
        else:
            refused("NaN", tmp_path / "PATIENT", lambda: read_image_file(tmp_path / "PATIENT.dcm", (6, 5)))


def test_what_libraries_say_of_a_header_reaches_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    dataset = slice_of(PIXELS)
    dataset.PixelData += b"PATIENT!"
    dataset.save_as(tmp_path / "a.dcm")
    with pytest.warns(UserWarning, match="excess"):
        _ = dataset.pixel_array
    caplog.clear()
    np.testing.assert_array_equal(read_image_file(tmp_path / "a.dcm", (6, 5))[0], PIXELS)
    path = nifti(tmp_path / "a.nii", VOXELS)
    overwrite(path, 80, np.array([-1], "<f4"))  # pixdim[1]: nibabel reports its repair
    np.testing.assert_array_equal(read_volume_file(path, (6, 5, 4))[0], VOXELS)
    assert not caplog.records


@pytest.mark.parametrize("dtype", [np.uint16, np.int16])
def test_monochrome1_is_mirrored_in_the_range_of_its_bits(tmp_path: Path, dtype: type) -> None:
    pixels = PIXELS.astype(dtype)
    slice_of(pixels, PhotometricInterpretation="MONOCHROME1", RescaleSlope=2, RescaleIntercept=7).save_as(
        tmp_path / "a.dcm"
    )
    limits = np.iinfo(dtype)
    expected = (limits.max + limits.min - pixels.astype(float)) * 2 + 7
    np.testing.assert_allclose(read_image_file(tmp_path / "a.dcm", (6, 5))[0], expected)


def test_ybr_is_read_as_the_rgb_it_stands_for(tmp_path: Path) -> None:
    pixels = RNG.integers(64, 192, (6, 5, 3), np.uint8)
    dataset = slice_of(PIXELS)
    dataset.set_pixel_data(pixels, "YBR_FULL", 8)
    dataset.save_as(tmp_path / "a.dcm")
    y, cb, cr = pixels.astype(float).transpose(2, 0, 1) - np.array([0, 128, 128])[:, None, None]
    rgb = np.stack([y + 1.402 * cr, y - 0.344136 * cb - 0.714136 * cr, y + 1.772 * cb]).clip(0, 255)
    np.testing.assert_allclose(read_image_file(tmp_path / "a.dcm", (6, 5), 3), rgb / 255, atol=1.01 / 255)


def test_a_series_in_any_order_is_one_volume(tmp_path: Path) -> None:
    stored = VOXELS.transpose(2, 1, 0)  # [slices, rows, columns]
    folder = series(tmp_path / "s", stored, RescaleSlope=1, RescaleIntercept=-1024)
    (folder / ".hidden").write_text("")
    read = read_volume_file(folder, (6, 5, 4))
    np.testing.assert_allclose(read[0], VOXELS[::-1, ::-1] - 1024.0)
    spaced = read_volume_file(folder, (6, 5, 4), (3, 2, 4))  # column spacing is x, row spacing is y, the gap is z
    np.testing.assert_allclose(spaced, read, rtol=1e-5)


def enhanced(volume: np.ndarray, positions: Sequence[float]) -> FileDataset:
    """A multi-frame file with positions, spacing and slopes in functional groups; frame k has slope k + 1."""
    dataset = slice_of(volume[0])
    for key in ("ImagePositionPatient", "ImageOrientationPatient", "PixelSpacing"):
        delattr(dataset, key)
    dataset.set_pixel_data(volume, "MONOCHROME2", 16)

    def group(**attributes: Any) -> list[Dataset]:
        item = Dataset()
        for key, value in attributes.items():
            setattr(item, key, value)
        return [item]

    dataset.SharedFunctionalGroupsSequence = group(
        PlaneOrientationSequence=group(ImageOrientationPatient=[1, 0, 0, 0, 1, 0]),
        PixelMeasuresSequence=group(PixelSpacing=[2, 3]),
    )
    dataset.PerFrameFunctionalGroupsSequence = [
        group(
            PlanePositionSequence=group(ImagePositionPatient=[0, 0, z]),
            PixelValueTransformationSequence=group(RescaleSlope=k + 1, RescaleIntercept=0, RescaleType="US"),
        )[0]
        for k, z in enumerate(positions)
    ]
    return dataset


def test_frames_take_place_and_slope_from_their_own_groups(tmp_path: Path) -> None:
    stored = VOXELS.transpose(2, 1, 0)
    enhanced(stored, [12, 0, 8, 4]).save_as(tmp_path / "a.dcm")
    expected = (stored * np.array([1, 2, 3, 4])[:, None, None])[[1, 3, 2, 0]].transpose(2, 1, 0)[::-1, ::-1]
    np.testing.assert_allclose(read_volume_file(tmp_path / "a.dcm", (6, 5, 4), (3, 2, 4))[0], expected, rtol=1e-5)


def test_frames_in_colour_are_a_volume_of_their_luminance(tmp_path: Path) -> None:
    colours = RNG.integers(0, 256, (4, 5, 6, 3), np.uint8)
    dataset = enhanced(VOXELS.transpose(2, 1, 0), [0, 4, 8, 12])
    dataset.set_pixel_data(colours, "RGB", 8)
    dataset.save_as(tmp_path / "a.dcm")
    expected = (colours @ np.array(LUMA) / 255).transpose(2, 1, 0)[::-1, ::-1]
    np.testing.assert_allclose(read_volume_file(tmp_path / "a.dcm", (6, 5, 4))[0], expected, atol=1e-6)


@pytest.mark.parametrize(
    ("spoil", "reason"),
    [
        (lambda f: (f / "PATIENT2").unlink(), "missing or unevenly"),
        (lambda f: slice_of(VOXELS[:, :, 0].T, (10, 20, 34)).save_as(f / "PATIENT9"), "two slices at one place"),
        (lambda f: slice_of(VOXELS[:, :, 0].T, (10, 20, 51), SeriesInstanceUID="1.9").save_as(f / "P9"), "several"),
        (lambda f: slice_of(VOXELS[:5, :, 0].T, (10, 20, 50)).save_as(f / "P9"), "unlike size"),
        (
            lambda f: slice_of(VOXELS[:, :, 0].T, (10, 20, 50), ImageOrientationPatient=[0, 1, 0, 0, 0, 1]).save_as(
                f / "P9"
            ),
            "direction",
        ),
        (lambda f: (f / "PATIENT.txt").write_text("notes"), "no DICOM file"),
        (lambda f: [p.unlink() for p in sorted(f.iterdir())[1:]], "single slice"),
    ],
    ids=["missing", "duplicate", "mixed", "sizes", "directions", "other-file", "alone"],
)
def test_what_is_no_even_stack_is_refused(tmp_path: Path, spoil: Callable[[Path], Any], reason: str) -> None:
    folder = tmp_path / "PATIENT"
    folder.mkdir()
    for index in range(5):
        slice_of(VOXELS[:, :, 0].T, (10, 20, 30 + 4 * index)).save_as(folder / f"PATIENT{index}")
    assert read_volume_file(folder, (6, 5, 5)).shape == (1, 6, 5, 5)
    spoil(folder)
    refused(reason, folder, lambda: read_volume_file(folder, (6, 5, 5)))


@pytest.mark.parametrize("missing", [1, 2, 3])
@pytest.mark.parametrize("length", [5, 9, 40])
def test_one_missing_slice_is_found_anywhere_inside(tmp_path: Path, length: int, missing: int) -> None:
    folder = series(tmp_path / "PATIENT", np.zeros((length, 3, 2), np.int16) + np.arange(2, dtype=np.int16))
    places = {float(pydicom.dcmread(path).ImagePositionPatient[2]): path for path in folder.iterdir()}
    sorted(places.items())[missing * (length - 2) // 3][1].unlink()
    refused("missing or unevenly", folder, lambda: read_volume_file(folder, (2, 3, 4)))


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 0, 2)])
@pytest.mark.parametrize("flips", [(1, 1, 1), (-1, 1, 1), (-1, -1, -1)])
def test_however_a_volume_is_stored_it_is_read_the_same(
    tmp_path: Path, order: tuple[int, ...], flips: tuple[int, ...]
) -> None:
    spacing = np.array([1.0, 2.0, 3.0])
    affine = np.diag([*spacing, 1.0])
    expected = read_volume_file(nifti(tmp_path / "a.nii", VOXELS, affine), (8, 8, 8), (1.5, 1.5, 1.5))
    stored = VOXELS[tuple(slice(None, None, f) for f in flips)].transpose(order)
    turned = np.eye(4)
    turned[:3, :3] = np.diag(spacing * flips)[:, order]
    turned[:3, 3] = [(n - 1) * s if f < 0 else 0 for n, s, f in zip(VOXELS.shape, spacing, flips, strict=True)]
    modality = VolumeModality(kind="volume3d", size=(8, 8, 8), spacing=(1.5, 1.5, 1.5))
    np.testing.assert_allclose(read_volume(nifti(tmp_path / "b.nii.gz", stored, turned), modality), expected)


def test_a_trailing_single_frame_is_a_volume(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", VOXELS[..., None])
    np.testing.assert_array_equal(read_volume_file(path, VOXELS.shape)[0], VOXELS)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_voxels_that_are_no_numbers_are_refused(tmp_path: Path, bad: float) -> None:
    voxels = VOXELS.astype(np.float32)
    voxels[1, 2, 3] = bad
    path = nifti(tmp_path / "PATIENT.nii", voxels)
    refused("NaN or infinite", path, lambda: read_volume_file(path, (6, 5, 4)))


def test_a_volume_without_orientation_is_read_only_on_request(tmp_path: Path) -> None:
    path = nifti(tmp_path / "PATIENT.nii", VOXELS, np.diag([2.0, 2.0, 2.0, 1.0]), code=0)
    refused("how it is oriented", path, lambda: read_volume_file(path, (6, 5, 4)))
    refused("how it is oriented", path, lambda: read_mask(path, (6, 5, 4)))
    np.testing.assert_array_equal(read_volume_file(path, (6, 5, 4), assume_oriented=True)[0], VOXELS)
    modality = VolumeModality(kind="volume3d", size=(6, 5, 4), spacing=(2, 2, 2), assume_oriented=True)
    np.testing.assert_array_equal(read_volume(path, modality)[0], VOXELS)


@pytest.mark.parametrize(
    ("save", "reason"),
    [
        (lambda p: nifti(p, VOXELS[..., :1]), "single slice"),
        (lambda p: nifti(p, np.stack([VOXELS] * 2, -1)), "several frames"),
        (lambda p: nifti(p, VOXELS.astype(np.complex64)), "complex"),
        (lambda p: overwrite(nifti(p, VOXELS), 312, np.zeros(4, "<f4")), "spans no space"),  # srow_z
        (lambda p: p.write_bytes(nifti(p, VOXELS).read_bytes()[:500]), "cannot be read as a NIfTI"),
        (lambda p: p.write_text("PATIENT"), "cannot be read as a NIfTI"),
    ],
    ids=["slice", "time", "complex", "flat", "truncated", "text"],
)
def test_what_is_no_nifti_volume_is_refused(tmp_path: Path, save: Callable[[Path], Any], reason: str) -> None:
    save(tmp_path / "PATIENT.nii")
    refused(reason, tmp_path / "PATIENT", lambda: read_volume_file(tmp_path / "PATIENT.nii", (4, 4, 4)))


def test_a_header_that_asks_for_all_memory_is_refused(tmp_path: Path) -> None:
    path = nifti(tmp_path / "PATIENT.nii", VOXELS)
    overwrite(path, 42, np.array([32000] * 3, "<i2"))  # dim[1..3]
    refused("2\\^29 voxels", path, lambda: read_volume_file(path, (4, 4, 4)))


@pytest.mark.parametrize("kind", ["nifti", "dicom"])
def test_damaged_bytes_are_always_a_sentence(tmp_path: Path, kind: str) -> None:
    path = tmp_path / ("a.nii" if kind == "nifti" else "a.dcm")
    if kind == "nifti":
        nifti(path, VOXELS)
    else:
        slice_of(PIXELS, RescaleSlope=2, RescaleIntercept=3).save_as(path)
    whole, refusals = np.frombuffer(path.read_bytes(), np.uint8), 0
    for number in range(400):
        data = whole.copy()
        data[RNG.integers(0, min(len(data), 600), 3)] = RNG.integers(0, 256, 3)
        path.write_bytes(data[: RNG.integers(0, len(data))] if number % 5 == 0 else data)
        try:
            read = read_volume_file(path, (3, 3, 3)) if kind == "nifti" else read_image_file(path, (3, 3))
            assert np.isfinite(read).all()
        except MmfmError:
            refusals += 1
    assert refusals > 80


def archive(path: Path, **arrays: np.ndarray) -> Path:
    np.savez_compressed(path, **arrays)  # type: ignore[arg-type]
    return path


def test_one_image_of_a_numpy_archive(tmp_path: Path) -> None:
    bytes_, floats = RNG.integers(0, 256, (3, 6, 5), np.uint8), RNG.normal(size=(2, 6, 5))
    colours = RNG.integers(0, 256, (2, 6, 5, 3), np.uint8)
    file = archive(tmp_path / "a.npz", train=bytes_, ct=floats, colours=colours, bits=bytes_ > 127)
    np.testing.assert_allclose(read_image_file(Path(f"{file}:train[2]"), (6, 5), window=(3, 4))[0], bytes_[2] / 255)
    np.testing.assert_allclose(
        read_image_file(Path(f"{file}:ct[1]"), (6, 5), window=(-1, 1))[0], np.clip(floats[1] / 2 + 0.5, 0, 1), atol=1e-6
    )
    np.testing.assert_allclose(
        read_image_file(Path(f"{file}:colours[0]"), (6, 5), 3), colours[0].transpose(2, 0, 1) / 255
    )
    np.testing.assert_array_equal(read_mask(Path(f"{file}:train[2]"), (6, 5)), bytes_[2])
    np.testing.assert_array_equal(read_image_file(Path(f"{file}:bits[0]"), (6, 5), window=(3, 4))[0], bytes_[0] > 127)
    archive(file, train=255 - bytes_)
    os.utime(file, ns=(1, 1))
    np.testing.assert_allclose(read_image_file(Path(f"{file}:train[2]"), (6, 5))[0], (255 - bytes_[2]) / 255)


@pytest.mark.parametrize(
    ("cell", "reason"),
    [
        ("PATIENT.npz", "file.npz:array"),
        ("PATIENT.npz:PATIENT_2[0]", "has no array"),
        ("PATIENT.npz:PATIENT_1[3]", "index beyond"),
        ("PATIENT.npz:pickled[0]", "cannot be read as a numpy archive \\(ValueError\\)"),
        ("PATIENT.npz:flat[0]", "is no image"),
        ("PATIENT.npz:words[0]", "is no image"),
        ("PATIENT.npz:nan[0]", "NaN"),
        ("missing.npz:train[0]", "cannot be read as a numpy archive"),
    ],
)
def test_what_an_archive_does_not_hold_is_refused(tmp_path: Path, cell: str, reason: str) -> None:
    arrays = {
        "PATIENT_1": np.zeros((3, 4, 4), np.uint8),
        "pickled": np.array([{}], object),
        "flat": np.zeros((3, 4)),
        "words": np.array([[["a"]]]),
        "nan": np.full((1, 2, 2), np.nan),
    }
    archive(tmp_path / "PATIENT.npz", **arrays)
    refused(reason, tmp_path / "PATIENT", lambda: read_image_file(tmp_path / cell, (4, 4)))


def test_images_and_volumes_are_not_taken_for_each_other(tmp_path: Path) -> None:
    Image.fromarray(PIXELS).save(tmp_path / "PATIENT.png")
    slice_of(PIXELS).save_as(tmp_path / "PATIENT.dcm")
    archive(tmp_path / "PATIENT.npz", a=PIXELS[None])
    enhanced(VOXELS.transpose(2, 1, 0), [0, 1, 2, 3]).save_as(tmp_path / "PATIENT4.dcm")
    for name, reason in (("PATIENT.png", "kind image2d"), ("PATIENT.dcm", "kind image2d")):
        refused(reason, tmp_path / "PATIENT", lambda path=tmp_path / name: read_volume_file(path, (4, 4, 4)))
    cell = Path(f"{tmp_path}/PATIENT.npz:a[0]")
    refused("kind image2d", tmp_path / "PATIENT", lambda: read_volume_file(cell, (4, 4, 4)))
    for name in ("PATIENT4.dcm", series(tmp_path / "PATIENTS", VOXELS.transpose(2, 1, 0)).name):
        refused("kind volume3d", tmp_path / "PATIENT", lambda path=tmp_path / name: read_image_file(path, (4, 4)))


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, bool])
def test_png_masks_keep_their_ids(tmp_path: Path, dtype: type) -> None:
    labels = RNG.integers(0, 2 if dtype is bool else np.iinfo(dtype).max, (9, 6)).astype(dtype)
    Image.fromarray(labels).save(tmp_path / "m.png")
    read = read_mask(tmp_path / "m.png", (5, 13))
    assert read.dtype == np.int64
    # Pillow's modes for bits and 16 bits do not resize alike; as 32-bit integers all do.
    expected = Image.fromarray(labels.astype(np.int32)).resize((13, 5), Image.Resampling.NEAREST)
    np.testing.assert_array_equal(read, np.asarray(expected))


def test_what_is_no_mask_is_refused(tmp_path: Path) -> None:
    Image.fromarray(np.zeros((4, 4), np.uint8)).save(tmp_path / "PATIENT.jpg")
    refused("JPEG", tmp_path / "PATIENT", lambda: read_mask(tmp_path / "PATIENT.jpg", (4, 4)))
    Image.fromarray(np.zeros((4, 4, 3), np.uint8)).save(tmp_path / "PATIENT.png")
    refused("in colour", tmp_path / "PATIENT", lambda: read_mask(tmp_path / "PATIENT.png", (4, 4)))
    halves = nifti(tmp_path / "PATIENT.nii", VOXELS / 2)
    refused("no label ids", halves, lambda: read_mask(halves, (6, 5, 4)))


@needs_data
def test_a_dicom_segmentation_is_a_mask() -> None:
    path = sample("liver_1frame")
    np.testing.assert_array_equal(read_mask(path, (512, 512)), pydicom.dcmread(path).pixel_array)


@needs_data
def test_a_segment_keeps_its_number(tmp_path: Path) -> None:
    dataset = pydicom.dcmread(sample("liver_1frame"))
    frame = dataset.PerFrameFunctionalGroupsSequence[0]
    frame.SegmentIdentificationSequence[0].ReferencedSegmentNumber = 3
    dataset.save_as(tmp_path / "a.dcm")
    np.testing.assert_array_equal(read_mask(tmp_path / "a.dcm", (512, 512)), dataset.pixel_array * 3)


def test_a_segmentation_of_several_frames_is_no_mask(tmp_path: Path) -> None:
    dataset = enhanced(VOXELS.transpose(2, 1, 0), [0, 1, 2, 3])
    dataset.SOPClassUID, dataset.Modality = SegmentationStorage, "SEG"
    dataset.save_as(tmp_path / "PATIENT.dcm")
    refused("convert it to NIfTI", tmp_path / "PATIENT", lambda: read_mask(tmp_path / "PATIENT.dcm", (6, 5)))
    refused("convert it to NIfTI", tmp_path / "PATIENT", lambda: read_mask(tmp_path / "PATIENT.dcm", (6, 5, 4)))


@pytest.mark.parametrize("spacing", [None, (1.5, 1.5, 1.5), (4.0, 3.0, 2.0)])
def test_a_mask_stays_on_its_image(tmp_path: Path, spacing: tuple[float, float, float] | None) -> None:
    """The mask is half of where a smooth image exceeds a level; after any resampling it still is."""
    grid = np.stack(np.meshgrid(*(np.linspace(-1, 1, n) for n in (40, 30, 24)), indexing="ij"))
    ball = 1 - np.sqrt(((grid - np.array([0.3, -0.2, 0.1])[:, None, None, None]) ** 2).sum(0))
    affine = np.array([[0, 0, -2.0, 50], [1.5, 0, 0, -3], [0, 2.5, 0, 9], [0, 0, 0, 1]])
    image = nifti(tmp_path / "i.nii.gz", ball.astype(np.float32), affine)
    mask = nifti(tmp_path / "m.nii.gz", (ball > 0.5).astype(np.uint8) * 7, affine)
    read, labels = read_volume_file(image, (26, 33, 31), spacing)[0], read_mask(mask, (26, 33, 31), spacing)
    assert set(np.unique(labels)) == {0, 7}
    assert (labels == 7).sum() > 200
    disagree = ((read > 0.5) != (labels == 7)) & (np.abs(read - 0.5) > 0.1)  # but for half a voxel at the rim
    assert not disagree.any()


def test_spacing_crops_and_pads_about_the_centre(tmp_path: Path) -> None:
    path = nifti(tmp_path / "a.nii", VOXELS + 1000, np.diag([2.0, 2.0, 2.0, 1.0]))
    read = read_volume_file(path, (4, 5, 8), (2, 2, 2))[0]
    np.testing.assert_array_equal(read[..., 2:6], VOXELS[1:5] + 1000)
    assert not read[..., :2].any()
    assert not read[..., 6:].any()
    windowed = read_volume_file(path, (4, 5, 8), (2, 2, 2), window=(900, 2100))[0]
    np.testing.assert_allclose(windowed[..., 2:6], (VOXELS[1:5] + 100) / 1200, atol=1e-6)
    assert not windowed[..., :2].any(), "padding is the low end of the window"


@pytest.mark.parametrize("size", [(7, 5), (32, 40), (16, 9), (40, 50)])
def test_images_are_resized_as_pillow_does(size: tuple[int, int]) -> None:
    image = RNG.normal(size=(20, 25)).astype(np.float32)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    np.testing.assert_allclose(resample(image, size, steps(image.shape, size)), expected, atol=1e-5)


@pytest.mark.parametrize("size", [(4, 9, 11), (20, 6, 16)])
def test_volumes_are_resized_as_torch_does_in_two_passes(size: tuple[int, int, int]) -> None:
    """torch antialiases two axes at a time; the filter is separable."""
    volume = RNG.normal(size=(10, 12, 8)).astype(np.float32)
    resize = torch.nn.functional.interpolate
    planes = resize(torch.tensor(volume)[None], size[1:], mode="bilinear", antialias=True)[0]
    flat = resize(planes.flatten(1)[None, None], (size[0], size[1] * size[2]), mode="bilinear", antialias=True)
    expected = flat.reshape(size).numpy()
    np.testing.assert_allclose(resample(volume, size, steps(volume.shape, size)), expected, atol=1e-5)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.integers(1, 9), st.booleans())
def test_padding_and_then_cropping_gives_back_the_image(h: int, w: int, dh: int, dw: int, labels: bool) -> None:
    """Even differences: an odd one moves the centre by half a pixel."""
    image = np.arange(1, h * w + 1).reshape(h, w)
    change: Callable[..., np.ndarray] = resample_labels if labels else resample
    larger = change(image if labels else image.astype(np.float32), (h + 2 * dh, w + 2 * dw), (1.0, 1.0))
    assert larger.sum() == image.sum()
    np.testing.assert_array_equal(larger[dh : dh + h, dw : dw + w], image)
    np.testing.assert_array_equal(change(larger, (h, w), (1.0, 1.0)), image)


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.2, 5))
def test_what_lies_outside_is_zero_and_does_not_bleed(length: int, pixels: int, step: float) -> None:
    read = resample(np.ones(length, np.float32), (pixels,), (step,))
    outside = np.abs(np.arange(pixels) - (pixels - 1) / 2) * step - length / 2  # from the source's edge
    np.testing.assert_allclose(read[outside < -1e-5], 1, rtol=1e-6)
    assert not read[outside > 1e-5].any()


@given(st.integers(1, 12), st.integers(1, 12), st.floats(0.2, 5))
def test_labels_are_the_nearest_and_nothing_else(length: int, pixels: int, step: float) -> None:
    labels = np.arange(1, length + 1)
    read = resample_labels(labels, (pixels,), (step,))
    for index, label in enumerate(read):
        at = (index - (pixels - 1) / 2) * step + (length - 1) / 2
        nearest = np.abs(np.arange(length) - at)
        if label == 0:
            assert nearest.min() > 0.5 - 1e-5
        else:
            assert nearest[label - 1] <= nearest.min() + 1e-9
