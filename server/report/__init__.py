"""`report.html`: one file, for people who were not there, made from the run's records and never from a prediction."""

import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from mmfm_core.config import Federation
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.statement import statement
from mmfm_core.storage import write_text
from server.record import Run, read_lines
from server.report import history, wording
from server.report.further import others_of, subsets_of
from server.report.results import Line, read_results
from server.sites import how_counts_are_told

NEWEST_EVENTS = 200


def write_report(run_directory: Path) -> Path:
    """Write `report.html` into a run directory, also of a run that goes on or failed, and return its path.

    Raises:
        MmfmError: there is no run, or one of its files is damaged.
    """
    run = Run(run_directory)
    if not run.facts:
        raise MmfmError(f"{run_directory}: there is no run here (run.json is missing); name a run's directory")
    path = run_directory / "report.html"
    write_text(path, render(run))
    return path


def render(run: Run) -> str:
    """The page."""
    federation, facts = run.federation, run.facts
    lines, events = _lines(run.metrics), _lines(run.events)
    sites = facts.get("sites") or {}
    tasks = read_results(run.directory, federation, sites, lines)
    simulated = (run.directory / "comparison.json").is_file()
    done = history.done_rounds(lines)
    by_stage, by_round = history.traffic_of(lines)
    status, told = wording.state(facts, done)
    ranked = sorted(events, key=lambda event: (event["level"] == "info", -event["time"]))
    page = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    page.filters |= {
        "figure": wording.figure,
        "signed": wording.signed,
        "size": wording.size,
        "moment": _moment,
        "breakable": _breakable,
    }
    return page.get_template("template.html").render(
        name=facts.get("name", federation.name),
        status=status,
        told=told,
        opening=wording.opening(federation, facts, done, simulated),
        noised=not simulated and federation.privacy is not None and federation.privacy.figures == "noised",
        tasks=tasks,
        others={task.task: others_of(task.task, federation, lines) for task in tasks},
        subsets={task.task: subsets_of(task.task, federation, lines) for task in tasks},
        findings=wording.findings,
        labels=wording.LABELS,
        meanings=wording.meanings(federation),
        metrics=wording.METRICS,
        pair_label=wording.pair_label,
        number=wording.number,
        listed=wording.listed,
        federation=federation,
        facts=facts,
        sites=sites,
        holdings=history.holdings_of(federation, sites),
        rounding=how_counts_are_told({name: facts.get("min_count", 1) for name, facts in sites.items()}),
        balance=history.balance_of(federation, sites),
        by_stage=by_stage,
        by_round=by_round,
        total=history.total(by_stage),
        leading={head: federation.metrics_of(head)[0] for head in federation.model.heads},
        percent=wording.percent,
        ranking=wording.RANKING,
        blocks=facts.get("blocks") or [],
        holders_of=partial(history.holders_of, federation=federation, sites=sites),
        shared_bytes=history.shared_bytes(facts.get("blocks") or [], federation, sites),
        statement=statement(federation) if federation.privacy else [],
        paid=history.paid_by(lines),
        events=ranked[:NEWEST_EVENTS],
        untold=len(ranked[NEWEST_EVENTS:]),
        document=dump(federation),
        intact=sha256(federation) == facts.get("federation"),
        written=time.time(),
        **_figures(federation, facts, lines, tasks),
    )


def _figures(federation: Federation, facts: dict[str, Any], lines: list[Line], tasks: list[Any]) -> dict[str, Any]:
    from server.report import figures  # matplotlib, which nothing else on the coordinator needs

    drawn = history.curves_of(federation, lines)
    adapting = tuple(this.number for this in rounds_of(federation) if this.stage and not this.stage.federated)
    validated = [value for site in drawn for points in site.validation.values() for _, value in points]
    draw = partial(
        figures.curves,
        rounds=max([facts.get("rounds") or 0, *(line["round"] for line in lines), 1]),
        adapting=adapting,
        highest_loss=max((v for site in drawn for points in site.loss.values() for _, v in points), default=0.0) or 1.0,
        lowest_value=min([0.5, *validated]) - 0.02,
        tasks=tuple(federation.model.heads),
    )
    return {
        "validated": bool(validated),
        "adapting": bool(adapting),
        "task_legend": figures.task_legend(federation.model.heads),
        "forests": {task.task: figures.forest(task, f"forest-{task.task}") for task in tasks},
        "curves": [(site, draw(site, f"curves-{index}")) for index, site in enumerate(drawn)],
    }


def _lines(path: Path) -> list[Line]:
    try:
        return list(read_lines(path))
    except ValueError as error:
        raise MmfmError(f"{path}: holds a line that is not JSON; remove that line") from error


def _breakable(name: str) -> Markup:
    """A long name may be broken after its underscores; elsewhere it would break in the middle of a word."""
    return escape(name).replace("_", Markup("_<wbr>"))


def _moment(seconds: float | None) -> str:
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")
