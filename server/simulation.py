"""`mmfm simulate`: a whole federation on one machine, each site in a directory as it would have at its hospital."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console

from mmfm_core.config import Federation, Site, load_federation, load_sites
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_text
from server import baselines
from server.display import Display, RunProgress
from server.record import Run
from server.workers import Job, start, stop

VERSIONS = ("mmfm", "flwr", "torch", "timm", "transformers")
REFRESH_SECONDS = 0.2
UNFINISHED = ("prepared", "running")


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    federation: Path
    sites: Path
    run: Path | None
    engine: str
    seed: int | None
    baselines: bool
    resume: bool
    replace: bool


def simulate(request: Request, console: Console) -> None:
    """Carry out the command.

    Raises:
        MmfmError: a document is wrong, the run directory is in use, or a run failed.
    """
    federation = load_federation(request.federation)
    if request.seed is not None:
        federation = federation.model_copy(update={"seed": request.seed})
    sites = load_sites(request.sites)
    check_documents(federation, sites)
    directory = request.run or Path("runs") / federation.name
    if request.resume:
        _check_same_document(Run.open(directory), federation)
    elif request.replace:
        Run.open(directory).delete()
    chains = _chains(directory, federation, sites, request)
    console.print(f"Simulating [bold]{federation.name}[/]: {len(sites)} sites, in {directory}", highlight=False)
    _work(chains, console)
    finish(directory, console)


def finish(directory: Path, console: Console) -> None:
    """Compare the methods that were run, write the report, and say where it is."""
    from server.comparison import compare
    from server.report import write_report
    from server.summary import print_comparison

    with console.status("Comparing, with intervals by bootstrap over patients"):
        comparison = compare(directory)
        page = write_report(directory)
    print_comparison(comparison, console)
    console.print(f"Report: [bold]{page}[/]", highlight=False, soft_wrap=True)


def check_documents(federation: Federation, sites: Mapping[str, Site]) -> None:
    """Check what the documents alone can tell, before any file of data is opened.

    Raises:
        MmfmError: fewer sites than the federation needs, or a site's file maps something that it does not know.
    """
    needed = federation.aggregation.min_sites
    if len(sites) < needed and any(stage.federated for stage in federation.stages):
        raise MmfmError(f"aggregation.min_sites is {needed}, and there are {len(sites)} sites; add sites or lower it")
    for name, site in sites.items():
        for kind, mapped, known in (
            ("modalities", site.modalities, federation.model.modalities),
            ("targets", site.targets, federation.model.heads),
        ):
            stray = next((key for key in mapped if key not in known), None)
            if stray is not None:
                raise MmfmError(f"site '{name}': {kind}.{stray}: {did_you_mean(stray, known)}")


def prepare(directory: Path, federation: Federation, sites: Mapping[str, Site], **facts: Any) -> Run:
    """Create a run, with one directory per site that holds its file and the document it approved."""
    from client import gates

    run = Run.create(
        directory,
        federation,
        seed=federation.seed,
        versions={name: version(name) for name in VERSIONS},
        **facts,
    )
    for name, site in sites.items():
        write_text(directory / "sites" / name / "site.yaml", dump(site))
        gates.approve(directory / "sites" / name / "approved", federation)
    run.update(status="prepared")
    return run


def _check_same_document(run: Run, federation: Federation) -> None:
    if run.facts["federation"] != sha256(federation):
        raise MmfmError(
            f"{run.directory}: this run began with another document or seed, and cannot go on with this one; "
            "start over with --replace, or name another place with --run"
        )


def _chains(directory: Path, federation: Federation, sites: Mapping[str, Site], request: Request) -> list[list[Job]]:
    """Prepare (or find) the runs that are left to do; each chain of them gets a worker of its own."""
    engine = f"server.engines.{request.engine.replace('-', '_')}:simulate"
    chains = [[(Job("federation", engine, directory), federation, len(sites))]]
    if request.baselines:
        alone, together = directory / "baselines" / "local-only", directory / "baselines" / "pooled"
        one_by_one = Job("local only", "server.engines.in_process:simulate", alone)
        all_in_one = Job("pooled", "server.engines.pooled:simulate", together)
        chains.append(
            [
                (one_by_one, baselines.local_only(federation), len(sites)),
                (all_in_one, baselines.pooled(federation, len(sites)), 1),
            ]
        )
    left = []
    for chain in chains:
        for job, document, expected in chain:
            if not request.resume or Run(job.directory).facts.get("status") in (None, "preparing"):
                prepare(job.directory, document, sites, engine=request.engine, expected_sites=expected)
        left.append([job for job, _, _ in chain if Run(job.directory).facts["status"] != "completed"])
    return [chain for chain in left if chain]


def _work(chains: list[list[Job]], console: Console) -> None:
    """Do all jobs, showing their progress; on Ctrl-C stop them so that they can be resumed."""
    runs = {job.title: Run(job.directory) for chain in chains for job in chain}
    shown = [
        RunProgress(title, run, len(rounds_of(run.federation)), run.facts["expected_sites"])
        for title, run in runs.items()
    ]
    processes = [start(chain) for chain in chains]
    try:
        with Display(shown, console) as display:
            while any(process.is_alive() for process in processes) and not any(p.exitcode for p in processes):
                display.refresh()
                time.sleep(REFRESH_SECONDS)
    except KeyboardInterrupt:
        stop(processes)
        for run in runs.values():
            if run.facts["status"] in UNFINISHED:
                run.update(status="interrupted", cause="stopped by Ctrl-C", finished=time.time())
        console.print("\nInterrupted; nothing is lost. Go on with the same command and --resume.")
        raise
    stop(processes)
    for title, run in runs.items():
        facts = run.facts
        if facts["status"] == "failed":
            raise MmfmError(facts["cause"])
        if facts["status"] != "completed" and any(process.exitcode for process in processes):
            run.update(status="failed", cause="its process was killed", finished=time.time())
            raise MmfmError(f"{run.directory}: the process of '{title}' was killed; go on with --resume")
