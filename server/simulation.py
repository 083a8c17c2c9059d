"""`mmfm simulate`: a whole federation on one machine, each site in a directory as it would have at its hospital."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mmfm_core.artifacts import artifacts_of, collect
from mmfm_core.config import Federation, Site, load_federation, load_sites
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.strict import did_you_mean
from mmfm_core.data.cache import CACHE, sweep
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_text
from server import baselines
from server.apart import check_apart
from server.record import COMMAND_LOCK, Run
from server.sites import FEDERATION
from server.workers import Job, work

VERSIONS = ("mmfm", "flwr", "torch", "timm", "transformers")
FEATURES = ".features"
"""Beside the runs: the same images need not pass the same frozen trunk again in the next run. May be deleted."""

PLAIN: dict[str, Any] = {"highlight": False, "soft_wrap": True}


@dataclass(frozen=True)
class Request:
    """What the command was asked for."""

    federation: Path
    sites: Path
    run: Path | None
    engine: str
    workers: int
    seed: int | None
    baselines: bool
    resume: bool
    replace: bool


def simulate(request: Request, console: Console) -> None:
    """Carry out the command.

    Raises:
        MmfmError: a document is wrong, the run directory is in use, or a run failed.
    """
    if request.resume and request.replace:
        raise MmfmError("--resume goes on with a run and --replace deletes it; give one of them")
    if request.workers > 1 and request.engine != "in-process":
        raise MmfmError(f"--workers: the engine '{request.engine}' starts processes of its own; leave --workers out")
    federation, sites = load_documents(request.federation, request.sites)
    with console.status("Checking that sites share no patients"):
        check_apart(sites, str(request.sites))
    if request.seed is not None:
        federation = federation.model_copy(update={"seed": request.seed})
    directory = request.run or Path("runs") / federation.name
    run = Run(directory)
    if request.resume and not run.exists:
        raise MmfmError(f"{directory}: there is no run to go on with; leave --resume out, or name its place with --run")
    with run.locked(COMMAND_LOCK):
        if request.resume:
            _check_same(run, federation, sites)
        elif request.replace and run.exists:
            run.delete()
        chains = _chains(directory, federation, sites, request)
        console.print(
            f"Simulating [bold]{federation.name}[/]: {len(sites)} sites, in {escape(str(directory))}", **PLAIN
        )
        try:
            work(chains, console)
            finish(directory, console)
        except KeyboardInterrupt:
            console.print("Interrupted; nothing is lost. Go on with the same command and --resume.", **PLAIN)
            raise


def finish(directory: Path, console: Console) -> None:
    """Compare the methods that were run, write the report, and say where it is."""
    from server.comparison import compare
    from server.report import write_report
    from server.summary import print_comparison

    with console.status("Comparing, with intervals by bootstrap over patients"):
        comparison = compare(directory)
        page = write_report(directory)
    print_comparison(comparison, console)
    console.print(f"Report: [bold]{escape(str(page))}[/]", **PLAIN)


def load_documents(federation_file: Path, sites_file: Path) -> tuple[Federation, dict[str, Site]]:
    """Read both documents and check what they alone can tell, before any file of data is opened.

    Raises:
        MmfmError: a document is wrong, the federation needs more sites, or a site maps something that it does not know.
    """
    federation, sites = load_federation(federation_file), load_sites(sites_file)
    needed = federation.aggregation.min_sites
    if len(sites) < needed and any(stage.federated for stage in federation.stages):
        raise MmfmError(
            f"{federation_file}: aggregation.min_sites is {needed}, and {sites_file} has {len(sites)} sites; "
            "add sites or lower it"
        )
    for name, site in sites.items():
        if name == FEDERATION:
            raise MmfmError(f"{sites_file}: sites.{name}: this name stands for all sites together; give it another")
        for kind, mapped, known in (
            ("modalities", site.modalities, federation.model.modalities),
            ("targets", site.targets, federation.model.heads),
        ):
            stray = next((key for key in mapped if key not in known), None)
            if stray is not None:
                raise MmfmError(
                    f"{sites_file}: sites.{name}.{kind}.{stray}: the federation has none of this name; "
                    f"{did_you_mean(stray, known)}"
                )
    return federation, sites


def prepare(
    directory: Path, federation: Federation, sites: Mapping[str, Site], features: Path | None = None, **facts: Any
) -> Run:
    """Create a run, with one directory per site that holds its file and the document it approved.

    What sites make of their studies once (images decoded, features of frozen trunks) is kept in `features` where it is
    named, for all runs that share it.
    """
    from client import gates

    run = Run.create(
        directory,
        federation,
        seed=federation.seed,
        versions={name: version(name) for name in VERSIONS},
        **facts,
    )
    for name, site in sites.items():
        folder = directory / "sites" / name
        write_text(folder / "site.yaml", dump(site))
        gates.approve(folder / "approved", federation)
        if artifacts_of(federation.model):
            _link(folder / "artifacts", directory / "artifacts")
        if features:
            _link(folder / CACHE, features)
    run.update(status="prepared")
    return run


def _link(link: Path, place: Path) -> None:
    place.mkdir(parents=True, exist_ok=True)
    if not link.is_symlink():
        link.symlink_to(os.path.relpath(place, link.parent))


def _check_same(run: Run, federation: Federation, sites: Mapping[str, Site]) -> None:
    remedy = "start over with --replace, or name another place with --run"
    if run.facts["federation"] != sha256(federation):
        raise MmfmError(
            f"{run.directory}: this run began with another document or seed, and cannot go on with this one; {remedy}"
        )
    if run.facts["status"] == "preparing":
        return
    began_with = {path.parent.name: path.read_text() for path in run.directory.glob("sites/*/site.yaml")}
    for name in sorted({*began_with, *sites}):
        if name not in sites or began_with.get(name) != dump(sites[name]):
            raise MmfmError(
                f"{run.directory}: site '{name}' is not what it was when this run began; undo the change, {remedy}"
            )


def _chains(directory: Path, federation: Federation, sites: Mapping[str, Site], request: Request) -> list[list[Job]]:
    """Prepare (or find) the runs that are left to do; each chain of them gets a worker of its own."""
    engine = f"server.engines.{request.engine.replace('-', '_')}:simulate"
    chains = [[(Job("federation", engine, directory), federation, len(sites))]]
    if request.baselines and any(stage.federated for stage in federation.stages):
        alone, together = directory / "baselines" / "local-only", directory / "baselines" / "pooled"
        one_by_one = Job("local only", "server.engines.in_process:simulate", alone)
        all_in_one = Job("pooled", "server.engines.pooled:simulate", together)
        chains.append(
            [
                (one_by_one, baselines.local_only(federation), len(sites)),
                (all_in_one, baselines.pooled(federation, len(sites)), 1),
            ]
        )
    left, features = [], directory.parent / FEATURES
    sweep(features)
    for chain in chains:
        for job, document, expected in chain:
            if not request.resume or Run(job.directory).facts.get("status") in (None, "preparing"):
                prepare(job.directory, document, sites, features, engine=request.engine, expected_sites=expected)
                collect(document.model, request.federation.parent, job.directory / "artifacts")
            elif Run(job.directory).facts["status"] != "completed":
                Run(job.directory).update(status="prepared", cause=None)
        Run(chain[0][0].directory).update(workers=request.workers if chain is chains[0] else 1)
        left.append([job for job, _, _ in chain if Run(job.directory).facts["status"] != "completed"])
    return [chain for chain in left if chain]
