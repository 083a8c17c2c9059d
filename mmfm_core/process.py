"""How a process that computes takes a machine: the one place that decides its threads and its memory."""

import ctypes
import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager

TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3  # of glibc's mallopt(3)
KEPT = 1 << 30
LARGEST_KEPT = 32 << 20  # glibc takes no more


def one_thread() -> None:
    """Compute in one thread, unless the environment says otherwise; before torch is imported, which asks once.

    Threads of several processes fight for the cores, at ten times the cost; and a check must not take the machine.
    """
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    keep_memory()


def keep_memory() -> None:
    """Keep up to 1 GiB of freed memory for the next step, instead of giving it back and asking for it again.

    With glibc's own thresholds each training step of images does that, page by page. Other C libraries have no such
    thresholds, and are left alone.
    """
    adjust = getattr(ctypes.CDLL(None), "mallopt", None)
    if adjust is not None:
        adjust(TRIM_THRESHOLD, KEPT)
        adjust(MMAP_THRESHOLD, LARGEST_KEPT)


@contextmanager
def importing() -> Iterator[None]:
    """Import large libraries inside it: among the million objects they make, no garbage is looked for, now or later.

    Python would look a hundred times on the way, in every full collection of a training, and once more at the end; and
    a forked process would copy what it looks at. The remedy is that of Python's documentation of `gc.freeze`.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
