"""`mmfm plan`: what a federation would do, before anything trains."""

from pathlib import Path
from tempfile import TemporaryDirectory

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from client.gates import described
from mmfm_core.artifacts import collect
from mmfm_core.compression import bytes_of
from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.config.site import SPLITS
from mmfm_core.data.description import describe
from mmfm_core.data.manifest import read_manifest
from mmfm_core.models.model import full_model
from mmfm_core.models.parameters import CONTROL, Block, blocks_of, check_patterns, fates_of, matches
from mmfm_core.privacy.statement import statement
from mmfm_core.protocol import SiteDescription
from mmfm_core.storage import Tensors
from server.apart import check_apart
from server.cost import Seconds, cost_of_a_study
from server.display import duration
from server.privacy import Wish, beyond_budgets, choices, steps_of, table, warnings
from server.simulation import load_documents
from server.sites import check_sites, how_counts_are_told, one_class_sites
from server.strategy import Strategy

MB = 1e6
NOT_PRIVATE = "This document has no 'privacy': what leaves a site can in principle carry traces of single patients."


def show_plan(federation_file: Path, sites_file: Path, console: Console, wish: Wish | None = None) -> None:
    """Check everything that can be checked without training, and print the plan; with a wish for privacy, its price.

    Raises:
        MmfmError: the run would fail on a document or a manifest.
    """
    federation, files = load_documents(federation_file, sites_file)
    with console.status("Reading manifests and building the model"):
        check_apart(files, str(sites_file))
        with TemporaryDirectory() as folder:
            collect(federation.model, federation_file.parent, Path(folder))
            model = full_model(federation.model, federation.seed, Path(folder))
        state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
        check_patterns(federation, state)
        sites = [
            described(describe(name, read_manifest(site, federation.model), federation.model), site.release)
            for name, site in files.items()
        ]
        check_sites(federation, sites)
        cost = cost_of_a_study(model, federation)
    console.print(f"[bold]{federation.name}[/]  document sha256 {sha256(federation)}", highlight=False, soft_wrap=True)
    console.print(_sites_table(federation, sites))
    console.print(_labels_table(federation, sites))
    told = how_counts_are_told({site.site: site.min_count for site in sites})
    if told:
        console.print(told, markup=False, highlight=False)
    for site, sentence in one_class_sites(federation, sites):
        console.print(f"{site}: {sentence}", markup=False, highlight=False)
    console.print(_blocks_table(blocks_of(federation, state)))
    console.print(_traffic_table(state, federation, sites))
    console.print(_stages_table(federation))
    _print_times(federation, sites, cost, console)
    privacy = federation.privacy
    if privacy and not wish:
        wish = Wish(privacy.epsilon, None, privacy.delta)
    if wish:
        with console.status("Accounting"):
            found = choices(federation, state, sites, wish)
        console.print(table(found, wish, steps_of(federation)))
        for sentence in warnings(found, sites, wish):
            console.print(sentence, markup=False, highlight=False)
    if not privacy:
        console.print(NOT_PRIVATE, markup=False, highlight=False)
        return
    for sentence in beyond_budgets(federation, files):
        console.print(sentence, markup=False, highlight=False)
    for term, sentence in statement(federation):
        console.print(f"[bold]{term}.[/] {escape(sentence)}", highlight=False)


def _table(title: str, *columns: str, words: int) -> Table:
    """A table of which the first `words` columns are words and the others numbers."""
    table = Table(title=title, title_justify="left")
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index < words else "right", overflow="fold")
    return table


def _sites_table(federation: Federation, sites: list[SiteDescription]) -> Table:
    modalities = federation.model.modalities
    table = _table("Sites, and studies that have each modality", "site", "patients", *SPLITS, *modalities, words=1)
    for site in sites:
        total = sum(site.studies.values())
        shares = [f"{min(sum(site.modalities.get(m, {}).values()) / total, 1):.0%}" for m in modalities]
        splits = [str(site.studies[split]) for split in SPLITS]
        table.add_row(site.site, str(sum(site.patients.values())), *splits, *shares)
    return table


def _labels_table(federation: Federation, sites: list[SiteDescription]) -> Table:
    table = _table("Training labels", "site", *federation.model.heads, words=1)
    for site in sites:
        labels = [
            escape(", ".join(f"{count} {name}" for name, count in site.targets[head]["train"].items()))
            if head in site.targets
            else "–"
            for head in federation.model.heads
        ]
        table.add_row(site.site, *labels)
    return table


def _blocks_table(blocks: list[Block]) -> Table:
    table = _table("Parameters", "block", "fate", "parameters", "MB", words=2)
    for block in blocks:
        table.add_row(block.block, block.fate, f"{block.parameters:,}", f"{block.bytes / MB:.3f}")
    table.add_section()
    for fate in ("shared", "local", "frozen"):
        inside = [block for block in blocks if block.fate == fate]
        if inside:
            table.add_row(
                "total", fate, f"{sum(b.parameters for b in inside):,}", f"{sum(b.bytes for b in inside) / MB:.3f}"
            )
    table.caption, table.caption_justify = (
        "shared leaves the site; local stays and is trained; frozen never changes",
        "left",
    )
    return table


def _traffic_table(state: Tensors, federation: Federation, sites: list[SiteDescription]) -> Table:
    """Bytes per site: every federated round sends down what it holds, and up what the stage trains of that."""
    fates = fates_of(federation, state)
    strategy = Strategy(federation, {name: state[name] for name, fate in fates.items() if fate == "shared"})
    rounds = rounds_of(federation)
    columns = ("site", "down per round", "up per round", "down in all", "up in all")
    table = _table("Traffic per site, MB", *columns, words=1)
    known = dict(enumerate(sites))
    drawn = {this.number: strategy.drawn(known, this) for this in rounds}
    wire = federation.aggregation.wire
    for node, site in known.items():
        downs, ups = [0], [0]
        for this in rounds:
            if node in drawn[this.number]:
                sent = {name: strategy.state_for(this)[name] for name in strategy.tensors_for(site, this)}
                downs.append(bytes_of(sent, wire.state))
                trained = this.stage.train if this.stage and this.returns_tensors else ()
                back = {name: tensor for name, tensor in sent.items() if matches(name.removeprefix(CONTROL), trained)}
                ups.append(bytes_of(back, wire.update))
        cells = (max(downs), max(ups), sum(downs), sum(ups))
        table.add_row(site.site, *(f"{value / MB:.3f}" for value in cells))
    return table


def _stages_table(federation: Federation) -> Table:
    columns = ("stage", "where", "rounds", "steps a round", "tasks", "trains")
    table = _table("Stages", *columns, words=len(columns))
    for stage in federation.stages:
        together = f"{federation.aggregation.sites_per_round or 'all'} sites together"
        where = together if stage.federated else "each site for itself"
        table.add_row(
            stage.name,
            where,
            str(stage.rounds),
            f"{stage.local_steps} of {stage.batch_size} studies",
            ", ".join(stage.tasks),
            escape(", ".join(stage.train)),
        )
    return table


def _print_times(federation: Federation, sites: list[SiteDescription], cost: Seconds, console: Console) -> None:
    share = min(
        1.0, (federation.aggregation.sites_per_round or len(sites)) / len(sites)
    )  # of federated rounds, a site's
    steps = sum(
        (share if stage.federated else 1) * stage.rounds * stage.local_steps * stage.batch_size
        for stage in federation.stages
    )
    # A forward pass costs about a third of a training step.
    evaluated = [sum(site.studies[split] for r in rounds_of(federation) for split in r.evaluates) / 3 for site in sites]
    per_site = [
        (steps + evaluations) * cost.step + sum(site.studies.values()) * cost.once
        for site, evaluations in zip(sites, evaluated, strict=True)
    ]
    federated = [stage for stage in federation.stages if stage.federated]
    bounds = (1 + share) * len(sites) * sum(s.rounds * s.local_steps * s.batch_size for s in federated) * cost.step
    simulated, beside, busiest = duration(sum(per_site)), duration(bounds), duration(max(per_site))
    lines = (
        f"{len(rounds_of(federation))} rounds. Estimated on this machine: {simulated} to simulate them in turn, and",
        f"{beside} beside them for the local-only and pooled baselines; {busiest} of computing at the busiest site of",
        "a real federation.",
    )
    console.print(" ".join(lines), highlight=False)
