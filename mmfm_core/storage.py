"""Files that are whole or absent: written under another name, flushed to the disk, then renamed."""

import hashlib
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import load, save

from mmfm_core.errors import MmfmError

Tensors = dict[str, np.ndarray]


def write_text(path: Path, text: str) -> None:
    """Write a text file atomically."""
    _write(path, text.encode())


def write_secret(path: Path, data: bytes) -> None:
    """Write a key or another secret atomically; at no moment can anybody but its owner read it."""
    _write(path, data, mode=0o600)


def write_json(path: Path, data: Any) -> None:
    """Write a JSON file atomically."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def packed(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Tensors as the content of a safetensors file."""
    return save({name: np.asarray(array, order="C") for name, array in tensors.items()})


def unpacked(data: bytes) -> Tensors:
    """Tensors from the content of a safetensors file, which are whole or an exception of undocumented type."""
    return dict(sorted(load(data).items()))  # the library's own order is never the same twice


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], durable: bool = True) -> None:
    """Write a safetensors file atomically; where it is not `durable`, a power cut may take it."""
    _write(path, packed(tensors), durable=durable)


def read_tensors(path: Path) -> Tensors:
    """Read a safetensors file.

    Raises:
        MmfmError: the file cannot be read or is damaged.
    """
    try:
        return unpacked(path.read_bytes())
    except OSError as error:
        raise MmfmError(f"cannot be read ({error.strerror})", str(path)) from error
    except Exception as error:
        raise MmfmError("is not a whole safetensors file; restore it or remove it", str(path)) from error


def finite(tensor: np.ndarray) -> bool:
    """Whether all values are finite."""
    if tensor.dtype.kind not in "fc":
        return True
    # The sum of squares is not finite if any value is not; it may also overflow, and then all are looked at.
    return math.isfinite(abs(np.vdot(tensor, tensor))) or bool(np.isfinite(tensor).all())


def digest(tensors: Mapping[str, np.ndarray]) -> str:
    """The sha256 of tensors with their names, types and shapes."""
    hashed = hashlib.sha256()
    for name in sorted(tensors):
        array = np.ascontiguousarray(tensors[name])
        hashed.update(f"{name} {array.dtype} {array.shape} ".encode())
        hashed.update(array.data)
    return hashed.hexdigest()


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it appears under `path`, replacing what stood there, only if the block ends well."""
    partial, replaced = path.with_name(f".partial-{path.name}"), path.with_name(f".replaced-{path.name}")
    for left_over in (partial, replaced):
        shutil.rmtree(left_over, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        yield partial
        if path.exists():
            path.rename(replaced)  # deleting it takes a while, in which half of it could be found
        partial.rename(path)
        flush(path.parent)  # a rename is durable only once its folder is on the disk
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        for left_over in (partial, replaced):
            shutil.rmtree(left_over, ignore_errors=True)


@contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """A file to make; it appears under `path`, replacing what stood there, only if the block ends well."""
    partial = path.with_name(f".partial-{path.name}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.unlink(missing_ok=True)  # what a crash left may have another mode
        yield partial
        if durable:
            flush(partial)
        partial.replace(path)
        if durable:
            flush(path.parent)
    except OSError as error:
        raise _cannot_write(path, error) from error
    finally:
        with suppress(OSError):
            partial.unlink()  # of what failed, or was asked to end in the middle of it


def _write(path: Path, data: bytes, mode: int = 0o666, durable: bool = True) -> None:
    with (
        whole_file(path, durable) as partial,
        open(partial, "xb", opener=lambda name, flags: os.open(name, flags, mode)) as file,
    ):
        file.write(data)


def flush(path: Path) -> None:
    """Have a file or folder on the disk when this returns."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError) -> MmfmError:
    return MmfmError(f"cannot be written ({error.strerror}); make room or mend the permissions, then go on", str(path))
