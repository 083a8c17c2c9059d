"""The coordinator's and the researcher's commands. Heavy imports wait until a command needs them."""

import shlex
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from mmfm_core.errors import MmfmError
from mmfm_core.process import importing, one_thread

DEMO_DATA = Path("runs/demo-data")

FederationFile = Annotated[Path, typer.Argument(help="The federation's document (YAML).", show_default=False)]
SitesFile = Annotated[
    Path | None, typer.Option("--sites", help="The sites' file; by default NAME.sites.yaml beside NAME.yaml.")
]


class Engine(StrEnum):
    """Where the same two apps run."""

    IN_PROCESS = "in-process"
    RAY = "ray"
    SUPERLINK = "superlink"


def simulate(
    federation: FederationFile,
    sites: SitesFile = None,
    run: Annotated[Path | None, typer.Option("--run", help="Run directory; by default runs/NAME.")] = None,
    engine: Annotated[
        Engine,
        typer.Option(
            help="in-process: one process, no network. ray: Flower's simulation. "
            "superlink: Flower's own server and one node per site, on loopback."
        ),
    ] = Engine.IN_PROCESS,
    workers: Annotated[
        int, typer.Option(min=1, help="Processes that sites train in side by side (in-process); results are the same.")
    ] = 1,
    seed: Annotated[int | None, typer.Option(help="Replace the document's seed.")] = None,
    baselines: Annotated[
        bool, typer.Option(help="Also train each site alone and on pooled data, to compare with.")
    ] = True,
    resume: Annotated[bool, typer.Option("--resume", help="Go on with an interrupted run.")] = False,
    replace: Annotated[bool, typer.Option("--replace", help="Delete the run in the way first.")] = False,
) -> None:
    """Simulate a federation on this machine: every hospital, all rounds, a report at the end."""
    one_thread()
    with importing():
        from server.simulation import Request
        from server.simulation import simulate as run_simulation

    run_simulation(
        Request(
            federation, _sites_file(federation, sites), run, engine.value, workers, seed, baselines, resume, replace
        ),
        Console(),
    )


def plan(
    federation: FederationFile,
    sites: SitesFile = None,
    epsilon: Annotated[
        float | None, typer.Option(help="Also say which noise would protect each patient by this epsilon.")
    ] = None,
    noise: Annotated[float | None, typer.Option(help="Or which epsilon this noise multiplier would give.")] = None,
    delta: Annotated[float, typer.Option(help="The delta of either.")] = 1e-5,
) -> None:
    """Print what a federation would do: sites, parameters and their fate, bytes per round, minutes. Trains nothing."""
    one_thread()
    with importing():
        from server.plan import show_plan
        from server.privacy import Wish

    wish = None if epsilon is None and noise is None else Wish(epsilon, noise, delta)
    show_plan(federation, _sites_file(federation, sites), Console(), wish)


def survey(
    federation: FederationFile,
    sites: SitesFile = None,
    json: Annotated[Path | None, typer.Option("--json", help="Also write all of it into this file.")] = None,
) -> None:
    """Ask sites what they hold, before any round: modalities, labels, and where they differ more than by chance.

    Each site answers in counts that its file's `release.min_count` lets out. No image is opened and nothing is trained.
    """
    with importing():
        from server.survey import survey as run_survey

    run_survey(federation, _sites_file(federation, sites), json, Console())


def audit(
    federation: FederationFile,
    canaries: Annotated[int, typer.Option(min=100, help="Made-up patients of the one-run audit.")] = 2000,
    models: Annotated[int, typer.Option(min=4, help="Models of the membership inference.")] = 32,
    json: Annotated[Path | None, typer.Option("--json", help="Also write all figures into this file.")] = None,
) -> None:
    """Attack a document's privacy on made-up patients: what attacks find, and what the ledger says they may.

    Noise, rate, steps, clipping and method are the document's, and the code is that of a run; model and patients are
    made up so that they show the most. Exit code 1 if an attack finds more than is promised.
    """
    one_thread()
    with importing():
        from server.audit import audit as run_audit

    if not run_audit(federation, canaries, models, json, Console()):
        raise typer.Exit(1)


def compare(
    federation: FederationFile,
    sites: SitesFile = None,
    methods: Annotated[
        str, typer.Option(help="Names with commas between them, or 'all'; `adapted` is always run.")
    ] = "fedavg,fedprox,fedper,local-fusion,local-only",
    seeds: Annotated[int, typer.Option(min=1, help="Runs of each method.")] = 3,
    run: Annotated[Path | None, typer.Option("--run", help="Where; by default runs/compare-NAME.")] = None,
) -> None:
    """Run several methods on the same sites and say what differs beyond noise. The same command goes on after Ctrl-C.

    Methods: adapted (FedAvg + adaptation, which every other one is compared with), fedavg, fedprox, fedadam, fedyogi,
    scaffold, fedbn, fedper, fedrep, local-fusion, local-fusion-head, ditto, dual-lora, full-model; bounds: local-only,
    pooled.
    """
    one_thread()
    with importing():
        from server.compare import compare as run_comparison
        from server.methods import METHODS

    names = list(METHODS) if methods == "all" else [name.strip() for name in methods.split(",") if name.strip()]
    run_comparison(federation, _sites_file(federation, sites), names, seeds, run, Console())


def demo_data(
    folder: Annotated[Path, typer.Argument(help="Where to write the hospitals.")] = DEMO_DATA,
) -> None:
    """Generate four small hospitals that differ the way hospitals do (seconds, no network, always the same)."""
    from mmfm_core.data.demo import generate

    generate(folder)
    variable = "" if folder == DEMO_DATA else f"MMFM_DEMO={shlex.quote(str(folder.resolve()))} "
    _say(f"Four hospitals are in {folder}; next: {variable}mmfm simulate deploy/federations/demo.yaml")


def report(run: Annotated[Path, typer.Argument(help="A run directory.", show_default=False)]) -> None:
    """Write a run's report.html anew, also for a run that goes on or failed."""
    from server.record import Run
    from server.report import write_report

    _say(f"Report: {write_report(Run.open(run).directory)}")


def sha256(path: Annotated[Path, typer.Argument(help="A file or folder.", show_default=False)]) -> None:
    """Print the hash by which a document pins a file or folder (a vocabulary, a checkpoint)."""
    from mmfm_core.artifacts import sha256_of

    if not path.exists():
        raise MmfmError(f"{path}: there is no such file or folder")
    _say(sha256_of(path))


def vocabulary(
    manifest: Annotated[Path, typer.Argument(help="Public texts (CSV, Parquet or JSONL).", show_default=False)],
    out: Annotated[Path, typer.Option(help="Where to write the vocabulary.", show_default=False)],
    column: Annotated[list[str] | None, typer.Option(help="A column of texts, 'report' if none is given.")] = None,
    where: Annotated[list[str] | None, typer.Option(help="COLUMN=VALUE: only rows that have it.")] = None,
    size: Annotated[int, typer.Option(help="The most pieces it may have.")] = 2000,
    min_texts: Annotated[int, typer.Option(help="A word takes part if it stands in as many texts.")] = 5,
) -> None:
    """Make a WordPiece vocabulary from public texts, and print its hash. Never from texts that may not leave a site."""
    from mmfm_core.artifacts import sha256_of
    from mmfm_core.data.table import read_frame
    from mmfm_core.storage import write_text
    from mmfm_core.text.vocabulary import train_vocabulary

    frame = read_frame(manifest)
    columns = column or ["report"]
    wanted = [condition.partition("=")[::2] for condition in where or []]
    for name in [*columns, *(name for name, _ in wanted)]:
        if name not in frame.columns:
            raise MmfmError(f"{manifest}: there is no column '{name}'; compare it with the table's header")
    for name, value in wanted:
        frame = frame[frame[name] == value]
    write_text(out, train_vocabulary((text for name in columns for text in frame[name]), size, min_texts))
    _say(f"{out}: {len(out.read_text().splitlines())} pieces, sha256 {sha256_of(out)}")


def _sites_file(federation: Path, sites: Path | None) -> Path:
    beside = federation.with_name(f"{federation.stem}.sites.yaml")
    if sites is None and federation.is_file() and not beside.is_file():
        raise MmfmError(f"{beside}: there is no such file; name the sites' file with --sites")
    return sites or beside


def _say(text: str) -> None:
    Console().print(text, markup=False, highlight=False, soft_wrap=True)
