"""One way out of a file that cannot be read: a sentence that holds nothing of what is in the file."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np

from mmfm_core.errors import MmfmError

LARGEST = 2**29
"""Values in one image or volume (2 GiB as float32): a damaged header can ask for any amount of memory."""


@contextmanager
def reading(kind: str) -> Iterator[None]:
    """Turn whatever a library raises on a damaged file into a sentence.

    Raises:
        MmfmError: always for an error inside; its text starts with a verb, the caller names manifest and row.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the libraries' warnings quote values of the header
            yield
    except MmfmError:
        raise
    except Exception as error:  # decoders raise what they like: KeyError, struct.error, zlib.error, ...
        raise MmfmError(
            f"cannot be read as {kind} ({type(error).__name__}); restore the file, or empty its cell in the manifest"
        ) from error


def check_size(shape: tuple[int, ...]) -> None:
    """Refuse, before memory is asked for, what no scanner makes."""
    if np.prod(shape, dtype=float) > LARGEST:
        raise MmfmError("claims more than 2^29 voxels; its header is damaged, or crop the image")


def check_finite(values: np.ndarray) -> np.ndarray:
    """`values`, all of them numbers."""
    if not np.isfinite(values).all():
        raise MmfmError("holds NaN or infinite voxels; replace them (by 0 outside the body) and save it again")
    return values
