"""`mmfm site check`: whether a site could take part now; every finding says what was looked at, and the remedy."""

import resource
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import requires, version
from pathlib import Path
from typing import Literal

from packaging.requirements import Requirement

from client import limits
from client.place import Place
from mmfm_core.config import Federation, Site
from mmfm_core.errors import MmfmError
from mmfm_core.process import importing

GB = 10**9
ROOM = 2 * GB  # of disk: for the log, kept states and predictions of a small model

Level = Literal["ok", "warning", "failed"]


@dataclass(frozen=True)
class Finding:
    """One thing that was checked."""

    level: Level
    text: str


def check_site(place: Place) -> Iterator[Finding]:
    """What can be seen without the network: versions, data, disk, memory, and a step of each approved document."""
    yield from _attempt(_versions)
    try:
        site = place.site()
    except MmfmError as error:
        yield Finding("failed", str(error))
        return
    yield Finding("ok", f"{place.directory / 'site.yaml'}: this is '{site.name}'")
    yield from _attempt(lambda: _manifest(site))
    yield from _attempt(lambda: _disk(place.directory))
    yield from _attempt(lambda: _memory(site))
    documents = sorted((place.directory / "approved").glob("*.yaml"))
    if not documents:
        yield Finding("warning", "no document is approved yet: `mmfm site approve FEDERATION.yaml`, then check again")
    for path in documents:
        yield from _attempt(lambda path=path: _document(place, site, path.stem))  # type: ignore[misc]


def _attempt(check: Callable[[], Iterator[Finding]]) -> Iterator[Finding]:
    try:
        yield from check()
    except MmfmError as error:
        yield Finding("failed", str(error))


def _versions() -> Iterator[Finding]:
    needed = next(r for text in requires("mmfm") or [] if (r := Requirement(text)).name == "flwr")
    flwr = version("flwr")
    if flwr not in needed.specifier:
        yield Finding("failed", f"Flower {flwr} is installed, and mmfm needs {needed.specifier}; install it anew")
    else:
        yield Finding("ok", f"mmfm {version('mmfm')}, Flower {flwr}, torch {version('torch')}")


def _manifest(site: Site) -> Iterator[Finding]:
    from mmfm_core.data.table import Table

    table = Table(site)
    yield Finding("ok", f"{site.manifest}: {len(table)} studies of {len(set(table.patients))} patients")


def _disk(directory: Path) -> Iterator[Finding]:
    free = shutil.disk_usage(directory).free
    level: Level = "ok" if free > ROOM else "failed"
    remedy = "" if level == "ok" else f"; make room for {ROOM / GB:.0f} GB, or nothing may be written and nothing leave"
    yield Finding(level, f"{directory}: {free / GB:.1f} GB of disk are free{remedy}")


def _memory(site: Site) -> Iterator[Finding]:
    free, allowed = _available() / GB, site.limits.memory
    if allowed is None:
        yield Finding(
            "warning", f"{free:.1f} GB of memory are free; limits.memory would hold the agent to a part of it"
        )
    elif allowed > free:
        yield Finding(
            "warning", f"limits.memory allows {allowed:g} GB, and {free:.1f} GB are free; lower it, or make room"
        )
    else:
        yield Finding("ok", f"{free:.1f} GB of memory are free, and limits.memory allows {allowed:g}")


def _available() -> int:
    line = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemAvailable:"))
    return int(line.split()[1]) * 1024


def _document(place: Place, site: Site, document: str) -> Iterator[Finding]:
    """Everything that a round would need, short of the coordinator's tensors: every file is read, one step is made."""
    with importing():
        from client import gates
        from client.agent import Agent
        from mmfm_core.models.model import seeded
        from mmfm_core.training.steps import train

    federation = gates.approved(place.directory / "approved", document)
    named = f"'{federation.name}' ({document[:12]})"
    yield from _lacks(site, federation, named)
    limits.hold(site.limits, place.directory / "site.yaml")
    participation = Agent.open(place.directory).participate(document)
    yield Finding("ok", f"{named}: every row and file was read, {len(participation.dataset)} studies")
    yield Finding("ok", f"{named}: models compute on '{participation.model.device}' (device in site.yaml)")
    for stage in federation.stages:
        one = stage.model_copy(update={"local_steps": 1, "local_first": 0})
        names = [name for name, fate in participation.fates.items() if fate != "frozen"]
        started = time.monotonic()
        try:
            with seeded(federation.seed, "check"):
                train(participation.model, participation.dataset, one, names)
        except (MemoryError, RuntimeError) as error:  # what torch calls its own lack of memory
            problem = f"a step of stage '{stage.name}' does not fit into memory ({type(error).__name__})"
            yield Finding("failed", f"{named}: {problem}; raise limits.memory, or ask for a smaller batch_size")
            return
        took = time.monotonic() - started
        yield Finding(
            "ok", f"{named}: a step of stage '{stage.name}' takes {took:.1f} s, a round {stage.local_steps} such"
        )
        if site.limits.seconds and took * stage.local_steps > site.limits.seconds:
            yield Finding("failed", f"{named}: a round would exceed limits.seconds, {site.limits.seconds:g}; raise it")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    yield Finding("ok", f"{named}: {peak / GB:.1f} GB of memory at the peak")


def _lacks(site: Site, federation: Federation, named: str) -> Iterator[Finding]:
    for kind, mapped, asked in (
        ("modalities", site.modalities, federation.model.modalities),
        ("targets", site.targets, {name: h for name, h in federation.model.heads.items() if h.labels}),
    ):
        here = [name for name in asked if name in mapped]
        lacking = [name for name in asked if name not in mapped]
        without = f"; without {', '.join(lacking)}: map what this hospital has of it in site.yaml" if lacking else ""
        level: Level = "warning" if lacking else "ok"
        yield Finding(level, f"{named}: {kind}: {', '.join(here) or 'none'}{without}")
