"""`mmfm coordinator run`, `resume`, `stop` and `list`: runs over the sites that are enrolled."""

import time
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path

from rich.console import Console

from mmfm_core.artifacts import collect
from mmfm_core.config import load_federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from server.bundle import write_bundle
from server.consortium.enrolling import registry_of
from server.consortium.link import FlowerRun, Link, connect
from server.consortium.settings import Consortium
from server.display import Display, RunProgress
from server.record import Run

REFRESH_SECONDS = 0.5
SETTLE_SECONDS = 5.0
SUBMIT_SECONDS = 60.0
STOP_SECONDS = 120.0
ENDED = ("completed", "failed", "interrupted")
VERSIONS = ("mmfm", "flwr", "torch", "timm", "transformers")


def begin(consortium: Consortium, federation_file: Path, directory: Path | None, *, replace: bool) -> Run:
    """Make a run's directory and submit it; returns at once.

    Raises:
        MmfmError: the document is wrong, the directory is in use, too few sites are enrolled, or the link is down.
    """
    federation = load_federation(federation_file)
    enrolled = registry_of(consortium).active()
    needed = federation.aggregation.min_sites
    if len(enrolled) < needed:
        raise MmfmError(
            f"{federation_file}: aggregation.min_sites is {needed}, and {len(enrolled)} sites are enrolled "
            f"({', '.join(sorted(enrolled)) or 'none'}); enrol more with 'mmfm coordinator enrol', or lower it"
        )
    place = (directory or consortium.runs / federation.name).resolve()
    with connect(consortium) as link:
        # Before anything is written: the link answers, and no ServerApp works on the run that is to be replaced.
        _check_idle(link.runs(), place)
        if Run(place).exists and replace:
            Run(place).delete()
        elif Run(place).checkpoint() is not None:
            raise MmfmError(
                f"{place}: a run is already here; go on with 'mmfm coordinator resume {place.name}', start over with "
                "--replace, or name another place with --run"
            )
        run = Run.create(
            place,
            federation,
            seed=federation.seed,
            versions={name: version(name) for name in VERSIONS},
            engine="sites",
            expected_sites=len(enrolled),
            registry=str(registry_of(consortium).path),
        )
        collect(federation.model, federation_file.parent, place / "artifacts")
        _submit(link, run, consortium)
    return run


def resume(consortium: Consortium, name: str) -> Run:
    """Submit a run again, which goes on from its last checkpoint; one that goes on by itself is left alone.

    Raises:
        MmfmError: there is no such run, it is completed, or the link is down.
    """
    run = find(consortium, name)
    with connect(consortium) as link:
        settle(run, _latest(link.runs()))
        status = run.facts["status"]
        if status == "completed":
            raise MmfmError(f"{run.directory}: this run is completed; 'mmfm report {run.directory}' shows it")
        if status in ENDED or run.facts.get("flower_run") is None:
            run.update(expected_sites=len(registry_of(consortium).active()))
            _submit(link, run, consortium)
    return run


def stop(consortium: Consortium, name: str) -> Run:
    """End a run between two of its steps; it can be resumed.

    Raises:
        MmfmError: there is no such run, it is over already, or it does not end.
    """
    run = find(consortium, name)
    with connect(consortium) as link:
        settle(run, _latest(link.runs()))
        if run.facts["status"] in ENDED:
            raise MmfmError(f"{run.directory}: this run is over: {run.facts['status']}")
        if run.facts.get("flower_run") is None:
            raise MmfmError(f"{run.directory}: this run is still handed to Flower's link; try again in a few seconds")
        link.stop(run.facts["flower_run"])
    end = time.monotonic() + STOP_SECONDS
    while True:
        try:
            with run.locked():  # which its ServerApp holds until it is gone
                run.update(status="interrupted", cause="stopped by 'mmfm coordinator stop'", finished=time.time())
                return run
        except MmfmError:
            if time.monotonic() > end:
                raise


def follow(consortium: Consortium, run: Run, console: Console) -> None:
    """Show a run's progress until it ends; Ctrl-C ends only the showing.

    Raises:
        MmfmError: the run failed.
    """
    progress = RunProgress(run.facts["name"], run, len(rounds_of(run.federation)), max(run.facts["expected_sites"], 1))
    settled = time.monotonic()
    with Display([progress], console) as display:
        while run.facts["status"] not in ENDED:
            display.refresh()
            time.sleep(REFRESH_SECONDS)
            if time.monotonic() - settled > SETTLE_SECONDS:
                settled = time.monotonic()
                try:
                    with connect(consortium) as link:
                        settle(run, _latest(link.runs()))
                except MmfmError:  # the link may be restarting; the run goes on without it for a while
                    continue
    if run.facts["status"] != "completed":
        raise MmfmError(f"{run.facts['cause']}; then 'mmfm coordinator resume {run.facts['name']}'")


def find(consortium: Consortium, name: str) -> Run:
    """A run by its name or its directory.

    Raises:
        MmfmError: there is none.
    """
    for directory in (consortium.runs / name, Path(name)):
        if Run(directory).exists:
            return Run(directory.resolve())
    known = sorted(path.name for path in consortium.runs.glob("*") if Run(path).exists)
    raise MmfmError(f"'{name}' is no run of this coordinator; known: {', '.join(known) or 'none'}")


def known_runs(consortium: Consortium, submitted: list[FlowerRun]) -> list[Run]:
    """Every run: those in the coordinator's own folder, and those that were put elsewhere."""
    places = {path for path in consortium.runs.glob("*") if path.is_dir()} | {each.directory for each in submitted}
    return [run for run in map(Run, sorted(places)) if run.exists]


def settle(run: Run, latest: Mapping[Path, FlowerRun]) -> None:
    """Write down that a run failed whose ServerApp is gone: killed, or never started.

    Args:
        latest: the last submission of each run directory.
    """
    facts = run.facts
    if facts["status"] in ENDED:
        return
    number, found = facts.get("flower_run"), latest.get(run.directory)
    if number is None or found is None or found.number != number:
        # `latest` may be older than the submission.
        if time.time() - facts.get("submitting", facts["started"]) > SUBMIT_SECONDS:
            lost = "Flower's database does not know this run any more"
            _fail(run, lost if number else "the run was never handed to Flower's link, because the command was killed")
    elif found.finished:
        _fail(run, f"the run's ServerApp ended without a word{': ' if found.details else ''}{found.details}")


def settle_all(consortium: Consortium, link: Link) -> list[Run]:
    """Settle every run; returns them."""
    submitted = link.runs()
    runs = known_runs(consortium, submitted)
    for run in runs:
        settle(run, _latest(submitted))
    return runs


def _fail(run: Run, cause: str) -> None:
    # The ServerApp writes its outcome before Flower takes note of its end: whoever holds the lock is still writing.
    try:
        with run.locked():
            if run.facts["status"] not in ENDED:
                run.update(status="failed", cause=cause, finished=time.time())
                run.tell(cause, level="warning")
    except MmfmError:
        return


def _submit(link: Link, run: Run, consortium: Consortium) -> None:
    with run.locked():
        run.update(status="starting", cause=None, flower_run=None, submitting=time.time())
    bundle = consortium.flower / "bundles" / sha256(run.federation)
    write_bundle(bundle, run)
    number = link.start(bundle, run.directory)
    run.update(flower_run=number)


def _check_idle(submitted: list[FlowerRun], place: Path) -> None:
    busy = _latest(submitted).get(place)
    if busy and not busy.finished:
        raise MmfmError(f"{place}: this run goes on; stop it first with 'mmfm coordinator stop {place}'")


def _latest(submitted: list[FlowerRun]) -> dict[Path, FlowerRun]:
    return {each.directory: each for each in submitted}
