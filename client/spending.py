"""`mmfm site ledger`: what this site's patients have paid, for people and as a file for an auditor."""

from collections.abc import Iterator
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from client.place import Place
from client.private import LEDGER
from mmfm_core.config import load_federation
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import composed
from mmfm_core.privacy.ledger import Ledger, charged
from mmfm_core.storage import write_json


def ledger_of(place: Place) -> Ledger:
    """The site's ledger."""
    return Ledger(place.site().ledger or place.directory / LEDGER)


def shown(place: Place) -> Iterator[str]:
    """What is spent and left, in all and by document."""
    ledger, budget = ledger_of(place), place.site().budget
    standing = charged(ledger.entries())
    spent = composed([entry.charge for entry in standing.values()], budget.delta)
    yield f"ledger    {ledger.path}"
    yield f"budget    ε {budget.epsilon:g} at δ {budget.delta:g} for each patient, over all documents"
    yield f"spent     ε {spent:.3f}"
    for document in dict.fromkeys(entry.document for entry in standing.values()):
        rounds = [entry for entry in standing.values() if entry.document == document]
        unanswered = sum(entry.kind == "reserved" for entry in rounds)
        cost = composed([entry.charge for entry in rounds], budget.delta)
        steps = sum(entry.steps for entry in rounds)
        cut_off = f", {unanswered} of them without an answer yet" if unanswered else ""
        yield (
            f"document  {document[:12]}  {_name(place, document)}: ε {cost:.3f} alone, {len(rounds)} rounds with "
            f"{steps} steps{cut_off}, the last one {_moment(max(entry.time for entry in rounds))}"
        )


def verified(place: Place) -> str:
    """That every line is as it was written, and the last one's hash, to be noted elsewhere."""
    entries = ledger_of(place).entries()
    head = entries[-1].hash if entries else "none"
    return (
        f"{len(entries)} lines, each as it was written. The last one's hash: {head}. A ledger whose end was cut off is "
        "whole too: compare this hash with the one that you noted before."
    )


def export(place: Place, path: Path) -> int:
    """Write all lines as JSON, with the hashes by which anybody can check them; returns how many."""
    entries = ledger_of(place).entries()
    write_json(path, [asdict(entry) for entry in entries])
    return len(entries)


def _name(place: Place, document: str) -> str:
    try:
        return load_federation(place.directory / "approved" / f"{document}.yaml").name
    except MmfmError:
        return "(approved no more)"


def _moment(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds")
