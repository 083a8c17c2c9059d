"""PNG, JPEG and numpy archives; and what a file without a suffix is."""

import re
from functools import lru_cache
from pathlib import Path
from zipfile import ZipFile

import numpy as np
from PIL import Image

from mmfm_core.data.readers.refusals import check_size, reading
from mmfm_core.errors import MmfmError

IN_ARCHIVE = re.compile(r"(?P<file>.+\.npz):(?P<array>\w+)\[(?P<index>\d+)\]")
"""`file.npz:array[index]`: one image of an array of images."""


def read_picture(path: Path) -> np.ndarray:
    """A PNG or JPEG as float32 [H, W] or [H, W, 3], in [0, 1] of the file's full scale."""
    with reading("a PNG or JPEG"), Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.mode == "I;16":
            return np.asarray(image, dtype=np.float32) / 65535
        grey = image.mode in ("1", "L", "LA")
        return np.asarray(image.convert("L" if grey else "RGB"), dtype=np.float32) / 255


def read_picture_labels(path: Path) -> np.ndarray:
    """The label ids [H, W] of a PNG as they are stored: grey levels, or indices into a palette."""
    with reading("a PNG"), Image.open(path, formats=("PNG", "JPEG")) as image:
        if image.format != "PNG":
            raise MmfmError("is a JPEG, whose compression changes label ids; save masks as PNG")
        if image.mode not in ("1", "L", "P", "I;16"):
            raise MmfmError("is a mask in colour; save one label id per pixel, as a grey PNG")
        return np.asarray(image).astype(np.int64)


def read_archived(path: Path) -> np.ndarray:
    """One item of `file.npz:array[index]`, as it is stored."""
    name = IN_ARCHIVE.fullmatch(str(path))
    assert name is not None
    file = Path(name["file"])
    with reading("a numpy archive"):
        items = _array(file, name["array"], file.stat().st_mtime_ns)
        if int(name["index"]) >= len(items):
            raise MmfmError("has an index beyond its array; mend the cell in the manifest")
        return items[int(name["index"])]


@lru_cache(maxsize=1)
def _array(file: Path, name: str, modified: int) -> np.ndarray:
    """The whole array: an archive is compressed, so that reading each of its images anew would unpack all of them."""
    with ZipFile(file) as packed:
        members = {member.filename: member.file_size for member in packed.infolist()}
    if f"{name}.npy" not in members:
        raise MmfmError("has no array of that name; mend the cell in the manifest")
    check_size((members[f"{name}.npy"],))
    with np.load(file, allow_pickle=False) as archive:
        return archive[name]


def is_dicom(path: Path) -> bool:
    """Whether the file bears the mark of DICOM, whatever it is called."""
    with path.open("rb") as file:
        return file.read(132)[128:] == b"DICM"
