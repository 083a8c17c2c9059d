"""`mmfm site status`: what a site agreed to, what it did last, and whether its agent is there."""

import json
from collections import deque
from collections.abc import Iterator
from typing import Any

from client.egress import EGRESS, EgressLog
from client.enrol import day
from client.place import Place
from client.service import is_served
from mmfm_core import enrolment
from mmfm_core.config import load_federation
from mmfm_core.enrolment import Enrolment
from mmfm_core.errors import MmfmError


def lines(place: Place) -> Iterator[str]:
    """The status, line by line."""
    yield f"site      {place.site().name}, in {place.directory}"
    yield f"agent     {'listens' if is_served(place.socket) else 'does not answer'} at {place.socket}"
    yield f"joined    {_joined(place)}"
    log = EgressLog(place.directory / EGRESS)
    last: dict[str, dict[str, Any]] = {}
    for _, entry in log.entries():
        last[str(entry["document"])] = entry
    documents = sorted((place.directory / "approved").glob("*.yaml"))
    for path in documents:
        yield f"approved  {_approved(path.stem, last.get(path.stem), place)}"
    if not documents:
        yield "approved  nothing; `mmfm site approve FEDERATION.yaml`"
    number, head = log.head()
    yield f"egress    {number} entries, head {head}"


def shown(place: Place, last: int, whole: bool) -> Iterator[str]:
    """The newest entries of the egress log, the oldest of them first: whole as JSON, or a line each."""
    for number, entry in deque(log_of(place).entries(), last):
        yield json.dumps({"number": number, **entry}, ensure_ascii=False) if whole else _brief(number, entry)


def log_of(place: Place) -> EgressLog:
    """The site's egress log.

    Raises:
        MmfmError: there is none.
    """
    log = EgressLog(place.directory / EGRESS)
    if not log.path.is_file():
        raise MmfmError("there is no egress log: nothing has left yet, or it was removed", str(log.path))
    return log


def _brief(number: int, entry: dict[str, Any]) -> str:
    start = f"{number:6} {entry['time']} {str(entry['document'])[:12]:12} {entry['kind']}"
    if entry["kind"] == "Refusal":
        return f"{start}: {entry['reason']}"
    if entry["kind"] == "SiteDescription":
        return f"{start}: counts of {', '.join(entry['counts'])}"
    size = sum(tensor["bytes"] for tensor in entry["tensors"])
    metrics = ", ".join(sorted({figure["metric"] for figure in entry["metrics"]})) or "no figure"
    return f"{start} of round {entry['round']}: {len(entry['tensors'])} tensors, {size:,} bytes; {metrics}"


def _joined(place: Place) -> str:
    if not place.enrolment.is_file():
        return "no consortium yet; `mmfm site join ANSWER`"
    joined = enrolment.read(place.enrolment, Enrolment)
    return f"{joined.consortium} at {joined.address}, enrolled {day(joined.issued)}"


def _approved(document: str, last: dict[str, Any] | None, place: Place) -> str:
    try:
        name = load_federation(place.directory / "approved" / f"{document}.yaml").name
    except MmfmError:
        name = "(changed since; approve it again)"
    if last is None:
        return f"{document[:12]}  {name}: nobody asked for it yet"
    what = f"round {last['round']}" if last["round"] else "the description"
    outcome = f"refused: {last['reason']}" if last["kind"] == "Refusal" else "answered"
    return f"{document[:12]}  {name}: {what} {outcome}, {last['time']}"
