"""The agent's own log: one JSON object a line, with what it is about, and no value that a library's error may hold."""

import json
import logging
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import UTC, datetime

from mmfm_core.errors import MmfmError

_about: ContextVar[dict[str, object]] = ContextVar("about", default={})  # noqa: B039 (never changed in place)


class JsonLines(logging.Formatter):
    """Time, level, site, document, round, text; of an unexpected error its kind and place in the code, not its text."""

    def __init__(self, site: str) -> None:
        super().__init__()
        self._site = site

    def format(self, record: logging.LogRecord) -> str:
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "site": self._site,
            **_about.get(),
            "text": record.getMessage(),
        }
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            # What pandas or torch say of a value they choke on is the value.
            line["error"] = str(error) if isinstance(error, MmfmError) else type(error).__name__
            frames = traceback.extract_tb(error.__traceback__)
            line["at"] = [f"{frame.filename}:{frame.lineno} {frame.name}" for frame in frames]
        return json.dumps(line, ensure_ascii=False)


def start(site: str) -> None:
    """From now on everything that is logged goes to standard error in this form, and so do warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines(site))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    logging.captureWarnings(True)


@contextmanager
def about(**what: object) -> Iterator[None]:
    """Name, in every line logged in this block, what it is about."""
    token = _about.set(_about.get() | what)
    try:
        yield
    finally:
        _about.reset(token)
