"""`mmfm compare`: methods times seeds on one machine, and what their differences say."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.markup import escape

from mmfm_core.artifacts import collect
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import sha256
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_json, write_text
from server import verdict
from server.apart import check_apart
from server.coordinator import initial_state
from server.evidence import Cost, Evidence, of_leading, read_predictions
from server.methods import METHODS, REFERENCE, apply
from server.record import Run, read_lines
from server.simulation import FEATURES, PLAIN, load_documents, prepare
from server.sites import FEDERATION
from server.workers import Job, work

WORKERS = 2


def compare(
    federation_file: Path,
    sites_file: Path,
    methods: Sequence[str],
    seeds: int,
    directory: Path | None,
    console: Console,
) -> None:
    """Run what is missing, then write `compare.md`, `compare.json` and `compare.svg` into the directory.

    Raises:
        MmfmError: a document is wrong, a method is unknown or does not fit, or a run failed.
    """
    federation, sites = load_documents(federation_file, sites_file)
    with console.status("Checking that sites share no patients"):
        check_apart(sites, str(sites_file))
    asked = [REFERENCE, *(name for name in dict.fromkeys(methods) if name != REFERENCE)]
    for name in asked:
        if name not in METHODS:
            raise MmfmError(f"--methods: there is no '{name}'; {did_you_mean(name, METHODS)}")
    documents = {n: apply(n, federation, len(sites)) for n in asked if not METHODS[n].run}
    directory = directory or Path("runs") / f"compare-{federation.name}"
    collect(federation.model, federation_file.parent, directory / "artifacts")
    for name, document in documents.items():
        _check(name, document, directory / "artifacts")
    console.print(
        f"Comparing {len(asked)} methods, {_seeds(seeds)} each, on {len(sites)} sites, in {escape(str(directory))}; "
        "runs that are finished are kept",
        **PLAIN,
    )
    for seed in range(seeds):
        jobs = [
            job
            for name, document in documents.items()
            if (job := _job(directory, name, document, seed, sites, federation_file))
        ]
        # Longest first would be better, but nobody knows how long a method takes before it ran.
        work([jobs[start::WORKERS] for start in range(min(WORKERS, len(jobs), os.cpu_count() or 1))], console)
    with console.status("Comparing, with intervals by bootstrap over patients"):
        found = [e for head in federation.model.heads if (e := _evidence(directory, federation, head, asked, seeds))]
        costs = {name: _cost(directory, METHODS[name].run or name, seeds) for name in asked}
    _tell(directory, found, costs, federation.name, seeds, console)


def _seeds(number: int) -> str:
    return f"{number} seed{'s' * (number != 1)}"


def _check(name: str, document: Federation, artifacts: Path) -> None:
    try:
        initial_state(document, artifacts)
    except MmfmError as error:
        if name == REFERENCE:
            raise
        raise MmfmError(f"--methods: '{name}' does not fit this document: {error}; leave it out") from error


def _job(
    directory: Path, name: str, document: Federation, seed: int, sites: dict[str, Site], federation_file: Path
) -> Job | None:
    document = document.model_copy(update={"seed": seed})
    place = directory / name / f"seed-{seed}"
    run, pooled = Run(place), METHODS[name].bound == "pooled"
    if run.exists and run.facts["federation"] != sha256(document):
        raise MmfmError(
            f"{place}: this run was made with another document; name another place with --run, or delete this one"
        )
    if run.facts.get("status") == "completed":
        return None
    if run.facts.get("status") in (None, "preparing"):
        prepare(
            place,
            document,
            sites,
            directory / FEATURES,
            engine="in-process",
            expected_sites=1 if pooled else len(sites),
        )
        collect(document.model, federation_file.parent, place / "artifacts")
    else:
        run.update(status="prepared", cause=None)
    engine = "server.engines.pooled:simulate" if pooled else "server.engines.in_process:simulate"
    return Job(f"{name}, seed {seed}", engine, place)


def _evidence(
    directory: Path, federation: Federation, head: str, methods: Sequence[str], seeds: int
) -> Evidence | None:
    found: dict[str, dict[str, list[Any]]] = {}
    for name in methods:
        states = ("shared",) if METHODS[name].run else ("adapted", "shared")
        runs = [directory / (METHODS[name].run or name) / f"seed-{seed}" for seed in range(seeds)]
        tables = [read_predictions(run, head, states) for run in runs]
        found[name] = {site: [table[site] for table in tables] for site in tables[0]}
    sites = set.intersection(*(set(by_site) for by_site in found.values()))
    if not sites:
        return None
    found = {name: {site: by_site[site] for site in sorted(sites)} for name, by_site in found.items()}
    return of_leading(federation.model.heads[head], head, federation.metrics_of(head), found)


def _cost(directory: Path, name: str, seeds: int) -> Cost:
    totals = {"seconds": 0.0, "bytes_up": 0.0, "bytes_down": 0.0}
    for seed in range(seeds):
        for line in read_lines(Run(directory / name / f"seed-{seed}").metrics):
            if line["site"] == FEDERATION and line["metric"] in totals:
                totals[line["metric"]] += line["value"] / seeds
    sent = 0.0 if METHODS[name].bound else (totals["bytes_up"] + totals["bytes_down"]) / 1e6
    return Cost(totals["seconds"] / 60, sent)


def _tell(
    directory: Path, found: Sequence[Evidence], costs: dict[str, Cost], name: str, seeds: int, console: Console
) -> None:
    page = [f"# {name}: methods compared, {_seeds(seeds)}\n"]
    for each in found:
        console.print(verdict.terminal_table(each, costs))
        sentences = verdict.sentences(each)
        for sentence in sentences:
            console.print(sentence, **PLAIN, markup=False)
        page += [verdict.markdown_table(each, costs), "", *(f"- {sentence}" for sentence in sentences), ""]
    write_text(directory / "compare.md", "\n".join(page))
    write_json(directory / "compare.json", [verdict.numbers(each, costs) for each in found])
    write_text(directory / "compare.svg", verdict.plot(found))
    console.print(f"Table: [bold]{escape(str(directory / 'compare.md'))}[/], plot beside it", **PLAIN)
