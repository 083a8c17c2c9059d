"""A modality's images or volumes, decoded once: in memory, or in a file of the site's cache where they are many.

A hospital has more films than memory. What is in the file is mapped, not read: the system reads the rows of a batch
when they are asked for, or while the batch before is computed with, keeps them as long as it has room, and a restarted
agent decodes nothing.
"""

import ctypes
import fcntl
import hashlib
import logging
import math
import mmap
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm_core.config.modality import ImageModality, Normalization, PixelModality
from mmfm_core.config.site import Site
from mmfm_core.data.cache import used
from mmfm_core.data.manifest import Study
from mmfm_core.data.readers import read_image, read_volume
from mmfm_core.data.readers.sources import files_of
from mmfm_core.errors import MmfmError
from mmfm_core.storage import whole_file

IN_MEMORY = 2**29
"""Bytes of one modality at a site; beyond them its images lie in a file."""

PATIENCE = 2.0  # seconds without a word
LIBC = ctypes.CDLL(None)
FORM = "1"
"""Of what is in a file: another one where decoding changes."""

log = logging.getLogger(__name__)


def decoded(
    site: Site, studies: Sequence[Study], name: str, modality: PixelModality, fit: Tensor, cache: Path | None
) -> Tensor:
    """The images of a modality, normalised, float32 [N, C, H, W] or volumes [N, 1, D, H, W]; zero where absent.

    Args:
        fit: the studies ([N] bool) whose mean and deviation count where the modality is normalised by its site.
        cache: the site's folder for what it derives from its patients. Without one everything is in memory. A file in
            it may be deleted at any time; a changed image, manifest or modality is decoded into a new one.

    Raises:
        MmfmError: an image cannot be read, see `read_image` and `read_volume`; the disk has no room for all; or
            what lies in the cache is damaged.
    """
    channels = modality.channels if isinstance(modality, ImageModality) else 1
    shape = (len(studies), channels, *modality.size)
    size = 4 * math.prod(shape)
    if cache is None or size <= IN_MEMORY:
        images = torch.zeros(shape)
        _decode(site, studies, name, modality, fit, images)
        return images
    path = cache / "images" / f"{_key(studies, name, modality, fit)}.npy"
    with _locked(path.parent):
        if not path.exists():
            log.info("decoding the images of '%s' into %s, %.1f GB", name, path, size / 1e9)
            with whole_file(path) as partial:
                array = np.lib.format.open_memmap(partial, "w+", np.float32, shape)
                with partial.open("rb+") as file:
                    # A mapped file that outgrows its disk kills the process that writes to it, without a word.
                    os.posix_fallocate(file.fileno(), 0, partial.stat().st_size)
                _decode(site, studies, name, modality, fit, torch.from_numpy(array))
                array.flush()
    used(path)
    return _mapped(path)


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold a cache, which runs of one simulation share."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("w")
    except OSError as error:
        raise MmfmError(
            f"cannot be written ({error.strerror}); mend the permissions, then go on", str(folder)
        ) from error
    with lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def _mapped(path: Path) -> Tensor:
    try:
        # Not copied on writing: the system would count all of it as this process' memory, which a site limits.
        array = np.load(path, mmap_mode="r")
    except (OSError, ValueError) as error:
        raise MmfmError("is damaged; remove it, and what was in it is decoded anew", str(path)) from error
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of a tensor that cannot be written to, which nobody does
        return torch.from_numpy(array)


def foresee(images: Tensor, rows: Sequence[int]) -> None:
    """Have the system read rows of images that lie in a file, beside whatever is done until they are asked for.

    By madvise(2), which Python has for maps that it made itself alone. Where it finds nothing to read it does nothing.
    """
    if images.nbytes <= IN_MEMORY:
        return
    each = images.nbytes // len(images)
    for row in rows:
        start = images.data_ptr() + row * each
        page = start - start % mmap.PAGESIZE
        LIBC.madvise(ctypes.c_void_p(page), ctypes.c_size_t(start + each - page), mmap.MADV_WILLNEED)


def _decode(
    site: Site, studies: Sequence[Study], name: str, modality: PixelModality, fit: Tensor, images: Tensor
) -> None:
    rows = [row for row, study in enumerate(studies) if name in study.inputs]
    said = time.monotonic()
    for number, row in enumerate(rows):
        images[row] = torch.from_numpy(_read(site, studies[row], name, modality))
        if modality.normalize in ("study", "foreground"):
            part = images[row] if modality.normalize == "study" else _foreground(images[row])
            _normalise(images[row], float(part.mean()), float(part.std()))
        if time.monotonic() - said > PATIENCE:
            log.info("images of '%s': %d of %d read", name, number + 1, len(rows))
            said = time.monotonic()
    if isinstance(modality.normalize, Normalization):
        mean, std = modality.normalize.mean, modality.normalize.std
    elif modality.normalize == "site":
        mean, std = _moments(images, fit.nonzero().flatten().tolist())
    else:
        return
    for row in rows:
        _normalise(images[row], mean, std)


def _read(site: Site, study: Study, name: str, modality: PixelModality) -> np.ndarray:
    path = study.inputs[name]
    assert isinstance(path, Path)
    try:
        return read_image(path, modality) if isinstance(modality, ImageModality) else read_volume(path, modality)
    except MmfmError as error:
        where = f"{site.manifest}, row {study.row}"
        raise MmfmError(f"the image of '{name}' {error}", where) from error


def _normalise(image: Tensor, mean: float, std: float) -> None:
    image.sub_(mean).div_(max(std, 1e-6))


def _foreground(image: Tensor) -> Tensor:
    """The values above the mean; all of them where one colour fills the image."""
    bright = image[image > image.mean()]
    return bright if len(bright) > 1 else image


def _moments(images: Tensor, rows: Sequence[int]) -> tuple[float, float]:
    """Mean and standard deviation of all values of the rows, one image in memory at a time."""
    count = len(rows) * images[0].numel()
    mean = sum(float(images[row].double().sum()) for row in rows) / count
    squares = sum(float((images[row].double() - mean).square().sum()) for row in rows)
    return mean, math.sqrt(squares / max(count - 1, 1))


def _key(studies: Sequence[Study], name: str, modality: PixelModality, fit: Tensor) -> str:
    """Changes with all that decides what is decoded; of a file its path, size and time, as `make` has it."""
    digest = hashlib.sha256(f"{FORM} {modality.model_dump_json(exclude={'augment', 'optional'})}".encode())
    digest.update(fit.numpy().tobytes())
    for study in studies:
        path = study.inputs.get(name)
        digest.update(f"{path} {_state_of(path) if isinstance(path, Path) else ''}|".encode())
    return digest.hexdigest()


def _state_of(path: Path) -> list[tuple[str, int, int]]:
    try:
        return [(file.name, (state := file.stat()).st_size, state.st_mtime_ns) for file in files_of(path)]
    except OSError:
        return []  # reading it will tell what is wrong
