"""A site's ledger: what its patients have paid, in every federation. It is asked before a step is taken, and says no.

Append-only and hash-chained, in SQLite on the site's disk. A round is reserved before it trains, which is when it is
charged. It is released when its answer may leave, and withdrawn, the only way a charge ever shrinks, when it failed
before there was an answer. After a crash between the two nothing has left, and the same round may be taken again for
what was reserved; once released it never trains again. That is so for each holder: directories of the same patients
that share a ledger give answers of their own, with noise of their own, and patients pay for each.

The charges that count are composed by Renyi differential privacy, which holds for rounds that are chosen as one goes
(Feldman & Zrnic 2021), at orders pinned in `mmfm_core.privacy.accounting`.
"""

import hashlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, astuple, dataclass, replace
from pathlib import Path
from typing import Literal

from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import Charge, composed

Kind = Literal["reserved", "released", "withdrawn"]

BUSY_SECONDS = 30.0
GENESIS = "0" * 64

TABLE = """  -- the columns in the order of Entry's fields
CREATE TABLE IF NOT EXISTS entries (
    number INTEGER PRIMARY KEY, time REAL NOT NULL, kind TEXT NOT NULL, document TEXT NOT NULL, round INTEGER NOT NULL,
    holder TEXT NOT NULL,
    noise REAL NOT NULL, rate REAL NOT NULL, steps INTEGER NOT NULL, previous TEXT NOT NULL, hash TEXT NOT NULL UNIQUE
);
CREATE TRIGGER IF NOT EXISTS no_change BEFORE UPDATE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
CREATE TRIGGER IF NOT EXISTS no_removal BEFORE DELETE ON entries BEGIN SELECT RAISE(ABORT, 'append-only'); END;
"""


@dataclass(frozen=True)
class Entry:
    """One line. `hash` is of all other fields, `previous` the hash of the line before.

    Attributes:
        time: seconds since 1970.
        holder: who answers the round.
        noise, rate, steps: the round's `Charge`.
    """

    number: int
    time: float
    kind: Kind
    document: str
    round: int
    holder: str
    noise: float
    rate: float
    steps: int
    previous: str
    hash: str = ""

    def sealed(self) -> str:
        """The hash that the line must have."""
        content = {name: value for name, value in asdict(self).items() if name != "hash"}
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def charge(self) -> Charge:
        """What the round costs."""
        return Charge(self.noise, self.rate, self.steps)


@dataclass(frozen=True)
class Limit:
    """An epsilon at a delta, and whose it is, in words that a refusal uses."""

    epsilon: float
    delta: float
    whose: str


class Ledger:
    """The ledger in a file, which is made where there is none; its folder is not.

    Attributes:
        holder: who reserves, releases and withdraws through this object; the rounds of others count, and are theirs.
    """

    def __init__(self, path: Path, holder: str = "") -> None:
        self.path, self.holder = path, holder

    def reserve(self, document: str, number: int, charge: Charge, budget: Limit, planned: Limit) -> None:
        """Charge a round of a document before it trains.

        Args:
            budget: holds for everything in the ledger.
            planned: holds for this document alone.

        Raises:
            MmfmError: the round would go beyond either; it, or a later one, was answered before; or the ledger cannot
                be read or written.
        """
        with self._open() as database:
            entries = _locked(database, self.path)
            standing = charged(entries)
            before = standing.get((document, number, self.holder))
            if before and before.kind == "released":
                raise MmfmError(f"round {number} was answered before, and a round is paid for once")
            if any(key[::2] == (document, self.holder) and key[1] > number for key in standing):
                raise MmfmError(f"a round after {number} was taken before; what it began from is not computed again")
            if before:
                return  # it was cut off before it had an answer
            everything = [entry.charge for entry in standing.values()]
            own = [entry.charge for entry in standing.values() if entry.document == document]
            for limit, spent in ((planned, own), (budget, everything)):
                after = composed([*spent, charge], limit.delta)
                if after > limit.epsilon:
                    raise MmfmError(
                        f"round {number} would bring what patients have paid here from ε "
                        f"{composed(spent, limit.delta):.3f} to {after:.3f} at δ {limit.delta:g}, and {limit.whose} is "
                        f"ε {limit.epsilon:g}; nothing was computed"
                    )
            self._append(database, entries, "reserved", document, number, charge)

    def release(self, document: str, number: int) -> None:
        """Note that a reserved round has an answer, just before that may leave. Again is no harm."""
        self._settle(document, number, "released")

    def withdraw(self, document: str, number: int) -> None:
        """Take a reservation back: the round failed, and what it computed is gone."""
        self._settle(document, number, "withdrawn")

    def spent(self, delta: float, document: str | None = None) -> float:
        """What each patient has paid at most, in one document or in all."""
        standing = charged(self.entries()).values()
        return composed([entry.charge for entry in standing if document in (None, entry.document)], delta)

    def entries(self) -> list[Entry]:
        """All lines, oldest first; none where there is no ledger yet.

        Raises:
            MmfmError: the file cannot be read, or a line was changed, removed or put in.
        """
        if not self.path.is_file():
            return []
        with self._open() as database:
            return _read(database, self.path)

    def _settle(self, document: str, number: int, kind: Kind) -> None:
        with self._open() as database:
            entries = _locked(database, self.path)
            before = charged(entries).get((document, number, self.holder))
            if before is None or (kind, before.kind) == ("withdrawn", "released"):
                raise MmfmError(f"round {number} is not reserved; nothing may leave for it", str(self.path))
            if before.kind == "reserved":
                self._append(database, entries, kind, document, number, before.charge)

    def _append(
        self,
        database: sqlite3.Connection,
        entries: list[Entry],
        kind: Kind,
        document: str,
        number: int,
        charge: Charge,
    ) -> None:
        previous = entries[-1].hash if entries else GENESIS
        cost = (float(charge.noise), float(charge.rate), int(charge.steps))
        entry = Entry(len(entries) + 1, time.time(), kind, document, number, self.holder, *cost, previous)
        entry = replace(entry, hash=entry.sealed())
        places = ", ".join("?" * len(astuple(entry)))
        database.execute(f"INSERT INTO entries VALUES ({places})", astuple(entry))  # noqa: S608 (no value in it)
        database.execute("COMMIT")

    @contextmanager
    def _open(self) -> Iterator[sqlite3.Connection]:
        try:
            with closing(sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)) as database:
                database.executescript(f"PRAGMA journal_mode=WAL; PRAGMA synchronous=FULL; {TABLE}")
                yield database
        except (sqlite3.Error, OSError) as error:
            raise MmfmError(
                f"the ledger cannot be used ({error}); without it no private round is answered: make room, mend the "
                "permissions, or restore the file",
                str(self.path),
            ) from error


def charged(entries: Iterable[Entry]) -> dict[tuple[str, int, str], Entry]:
    """The last line of every round that counts, by document, round and holder: all but those withdrawn."""
    last = {(entry.document, entry.round, entry.holder): entry for entry in entries}
    return {key: entry for key, entry in last.items() if entry.kind != "withdrawn"}


def check(path: Path, entries: Iterable[Entry]) -> None:
    """Check that every line is what was written, and follows the one before. (What is cut off at the end leaves no
    trace here: note the last line's hash elsewhere.)

    Raises:
        MmfmError: the first line that is not.
    """
    previous = GENESIS
    for number, entry in enumerate(entries, 1):
        if (entry.number, entry.previous, entry.hash) != (number, previous, entry.sealed()):
            raise MmfmError(
                f"line {number} of the ledger was changed, or one before it is missing; no private round is answered "
                "until the file is restored from a backup",
                str(path),
            )
        previous = entry.hash


def _read(database: sqlite3.Connection, path: Path) -> list[Entry]:
    entries = [Entry(*row) for row in database.execute("SELECT * FROM entries ORDER BY number")]
    check(path, entries)
    return entries


def _locked(database: sqlite3.Connection, path: Path) -> list[Entry]:
    """All lines, and nobody else adds one before this connection commits or closes."""
    database.execute("BEGIN IMMEDIATE")
    return _read(database, path)
