"""A site's folder of what it derived from its patients: what nothing has used for long is deleted.

A patient who is taken out of a manifest leaves decoded images and features behind, and so does every modality that a
document does not use any more.
"""

import logging
import os
import time
from contextlib import suppress
from pathlib import Path

CACHE = "cache"
"""Its name in the site's directory."""

KEPT_DAYS = 90
"""Longer than a run, whose agent may open a file once at its beginning, and again only when it is restarted."""

DERIVED = {".npy", ".safetensors"}

log = logging.getLogger(__name__)


def used(path: Path) -> None:
    """Note that a file of the cache was used now. By its time of change: that of reading is not kept everywhere."""
    with suppress(OSError):  # a cache that cannot be written to is read all the same
        os.utime(path)


def sweep(cache: Path) -> None:
    """Delete the files that were not used for `KEPT_DAYS`."""
    limit = time.time() - KEPT_DAYS * 24 * 60 * 60
    gone = 0
    for path in cache.rglob("*"):
        with suppress(OSError):  # another process was faster
            if path.suffix in DERIVED and path.stat().st_mtime < limit:
                path.unlink()
                gone += 1
    if gone:
        log.info("%d files in %s were not used for %d days, and are deleted", gone, cache, KEPT_DAYS)
