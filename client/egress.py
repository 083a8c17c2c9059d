"""What left a site, written down before it leaves: append-only, hash-chained, verifiable without anybody's help.

Every entry's hash covers the entry and the hash before it, so that a changed, removed, inserted or reordered entry
breaks the chain. Only a tail that was cut off leaves a whole chain behind: it is seen against a head (the last hash)
that was noted elsewhere, which `verify` takes.
"""

import hashlib
import json
import os
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from dataclasses import asdict
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, RoundReply, RoundRequest, SiteDescription, text_of

EGRESS = "egress.sqlite"
"""Its name in a site's directory."""

FIRST = "0" * 64
BUSY_SECONDS = 30.0

SCHEMA = """
CREATE TABLE IF NOT EXISTS egress (number INTEGER PRIMARY KEY, entry TEXT NOT NULL, hash TEXT NOT NULL);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON egress BEGIN SELECT RAISE(ABORT, 'append only'); END;
CREATE TRIGGER IF NOT EXISTS no_removal BEFORE DELETE ON egress BEGIN SELECT RAISE(ABORT, 'append only'); END;
"""


class EgressLog:
    """The log of one site: a single SQLite file, whole after `kill -9` and power cuts, that can be copied and read."""

    def __init__(self, path: Path, durable: bool = True) -> None:
        self.path, self._durable = path, durable

    def append(self, answer: SiteDescription | RoundReply | Refusal, question: Describe | RoundRequest | None) -> str:
        """Write down an answer (durably, see `client.agent`) and return the new head.

        `question` is what asked for it, where it was read.

        Raises:
            MmfmError: it cannot be written, so the answer must not leave.
        """
        text = json.dumps(entry_of(answer, question), ensure_ascii=False)
        try:
            with closing(self._open()) as log:
                log.execute("BEGIN IMMEDIATE")  # two processes that append take turns
                number, head = _last(log)
                head = _hash(head, text)
                log.execute("INSERT INTO egress VALUES (?, ?, ?)", (number + 1, text, head))
                log.execute("COMMIT")
                return head
        except (sqlite3.Error, OSError) as error:
            problem = f"cannot be written ({error}); make room or mend the permissions: until then nothing may leave"
            raise MmfmError(problem, str(self.path)) from error

    def entries(self) -> Iterator[tuple[int, dict[str, Any]]]:
        """All entries with their numbers, the oldest first."""
        for number, text, _ in self._rows():
            try:
                yield number, json.loads(text)
            except ValueError as error:
                raise MmfmError(f"entry {number} is not what was written: it was changed", self._name) from error

    def head(self) -> tuple[int, str]:
        """The number and hash of the last entry; a site notes them elsewhere to be able to see a cut tail."""
        for number, _, head in self._rows("number DESC LIMIT 1"):
            return number, head
        return 0, FIRST

    def verify(self, noted: str | None = None) -> tuple[int, str]:
        """Check the whole chain; returns the head's number and hash.

        Args:
            noted: a head that was noted elsewhere earlier, which the chain must still hold.

        Raises:
            MmfmError: the first entry that is not as it was written, or the noted head is not in the chain.
        """
        count, head, found = 0, FIRST, noted in (None, FIRST)
        for expected, (number, text, stated) in enumerate(self._rows(), start=1):
            head = _hash(head, text)
            if number != expected:
                raise MmfmError(
                    f"entry {expected} was removed or moved: entry {number} stands in its place", self._name
                )
            if head != stated:
                raise MmfmError(
                    f"entry {number} is not what was written: it or the one before it was changed, moved or removed",
                    self._name,
                )
            count, found = number, found or head == noted
        if not found:
            raise MmfmError(
                f"the head {noted} that was noted is not in it: its end was cut off, or rewritten", self._name
            )
        return count, head

    @property
    def _name(self) -> str:
        return str(self.path)

    def _open(self) -> sqlite3.Connection:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        log = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        # EXTRA: a committed entry is on the disk, and so is the end of its journal.
        log.execute(f"PRAGMA synchronous={'EXTRA' if self._durable else 'OFF'}")
        log.executescript(SCHEMA)
        return log

    def _rows(self, order: str = "number") -> Iterator[tuple[int, str, str]]:
        if not self.path.is_file():
            return
        # Who may write takes back what a killed process left half-written; who may not can only read a log at rest.
        mode = "rw" if os.access(self.path, os.W_OK) else "ro"
        try:
            with closing(
                sqlite3.connect(f"{self.path.absolute().as_uri()}?mode={mode}", BUSY_SECONDS, uri=True)
            ) as log:
                yield from log.execute(f"SELECT number, entry, hash FROM egress ORDER BY {order}")  # noqa: S608 (ours)
        except sqlite3.Error as error:
            raise MmfmError(f"is damaged or cannot be read ({error}); restore it from a backup", self._name) from error


def entry_of(
    answer: SiteDescription | RoundReply | Refusal, question: Describe | RoundRequest | None
) -> dict[str, Any]:
    """What is written about an answer: names, shapes, sizes and hashes of all that left, and no value of a patient."""
    entry: dict[str, Any] = {
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "document": question.federation if question else None,
        "round": question.round if isinstance(question, RoundRequest) else None,
        "kind": type(answer).__name__,
        "sha256": hashlib.sha256(text_of(answer).encode()).hexdigest(),
    }
    if isinstance(answer, Refusal):
        return entry | {"reason": answer.reason}
    if isinstance(answer, SiteDescription):
        told = asdict(answer)
        return entry | {
            "counts": {name: told[name] for name in ("studies", "patients", "modalities", "targets", "tasks")},
            "notes": [str(note) for note in answer.notes],
        }
    tensors = [
        {
            "name": name,
            "dtype": _name(tensor.dtype),
            "shape": list(tensor.shape),
            "bytes": tensor.nbytes,
            "sha256": hashlib.sha256(np.ascontiguousarray(tensor).data).hexdigest(),
        }
        for name, tensor in answer.tensors.items()
    ]
    figures = [
        {"task": m.task, "model": m.model, "split": m.split, "metric": m.metric, "modalities": m.modalities, "n": m.n}
        for m in answer.metrics
    ]
    return (
        entry
        | {"tensors": tensors, "weights": answer.weights, "metrics": figures, "loss": answer.loss is not None}
        | {"epsilon": answer.epsilon, "seconds": answer.seconds}
    )


@cache
def _name(kind: np.dtype) -> str:
    return str(kind)  # which numpy makes up anew each time, in longer than it takes to hash a small tensor


def _last(log: sqlite3.Connection) -> tuple[int, str]:
    row = log.execute("SELECT number, hash FROM egress ORDER BY number DESC LIMIT 1").fetchone()
    return row or (0, FIRST)


def _hash(before: str, text: str) -> str:
    return hashlib.sha256(f"{before}\n{text}".encode()).hexdigest()
