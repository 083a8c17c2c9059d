"""Methods side by side, per site, with paired intervals: only a simulation can see every site's predictions."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from client.predictions import path_of
from client.simulated import site_directories
from mmfm_core.config.part import HeadConfig
from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, draws, estimate
from mmfm_core.storage import write_json
from server.record import Run

SOURCES = {
    "local-only": ("baselines/local-only", "adapted"),
    "fedavg": (".", "shared"),
    "adapted": (".", "adapted"),
    "pooled": ("baselines/pooled", "shared"),
}
"""Method -> the run it comes from, inside the run directory, and which of that run's states."""

DIFFERENCES = (("adapted", "fedavg"), ("adapted", "local-only"))
WITHOUT_ADAPTATION = (("fedavg", "local-only"),)

Value = dict[str, float | None]
Table = dict[str, pd.DataFrame]
Measured = Statistic | float | None


def compare(directory: Path) -> dict[str, Any]:
    """Compare every method that was run, and write `comparison.json` into the run directory."""
    federation = Run.open(directory).federation
    sites = [folder.name for folder in site_directories(directory / "sites")]
    tasks = []
    for task, head in federation.model.heads.items():
        tables = {site: table for site in sites if (table := _predictions(directory, site, task))}
        if tables:
            metric = federation.metrics_of(task)[0]
            tasks.append({"task": task, "metric": metric} | _compare_task(tables, head, metric))
    methods = [
        method for method in SOURCES if any(method in site["results"] for task in tasks for site in task["sites"])
    ]
    result = {"methods": methods, "tasks": tasks}
    write_json(directory / "comparison.json", result)
    return result


def _predictions(directory: Path, site: str, task: str) -> Table:
    """Method -> the site's predictions on its test studies."""
    runs = {method: (Run(directory / run), state) for method, (run, state) in SOURCES.items()}
    paths = {
        method: path_of(run.directory / "sites" / site, run.facts["federation"], task, state)
        for method, (run, state) in runs.items()
        if run.exists
    }
    return {m: pd.read_csv(path, dtype={"study": str, "patient": str}) for m, path in paths.items() if path.is_file()}


def _compare_task(tables: Mapping[str, Table], head: HeadConfig, metric: str) -> dict[str, Any]:
    sites = [_compare_site(site, table, head, metric) for site, table in tables.items()]
    methods = [method for method in SOURCES if all(method in table for table in tables.values())]
    everyone = {
        method: pd.concat(
            [table[method].assign(patient=site + "/" + table[method]["patient"]) for site, table in tables.items()],
            ignore_index=True,
        )
        for method in methods
    }
    defined = {m: [s["results"][m]["value"] for s in sites if s["results"][m]["value"] is not None] for m in methods}
    return {
        "sites": sites,
        "mean_of_sites": {m: float(np.mean(values)) if values else None for m, values in defined.items()},
        "worst_site": {m: min(values) if values else None for m, values in defined.items()},
        "all_patients": {
            m: _estimate(head.statistic(metric, table), draws(list(table["patient"]))) for m, table in everyone.items()
        },
    }


def _compare_site(site: str, table: Table, head: HeadConfig, metric: str) -> dict[str, Any]:
    first = next(iter(table.values()))
    statistics = {method: head.statistic(metric, predictions) for method, predictions in table.items()}
    weights = draws(list(first["patient"]))
    return {
        "site": site,
        "studies": len(first),
        "patients": int(first["patient"].nunique()),
        "classes": head.counts(first),
        "results": {method: _estimate(statistic, weights) for method, statistic in statistics.items()},
        "differences": {
            f"{a} - {b}": _estimate(_difference(statistics[a], statistics[b]), weights)
            for a, b in (DIFFERENCES if "adapted" in statistics else WITHOUT_ADAPTATION)
            if a in statistics and b in statistics
        },
    }


def _difference(a: Measured, b: Measured) -> Measured:
    if a is None or b is None:
        return None
    if callable(a) and callable(b):
        return lambda weights: a(weights) - b(weights)  # the same patients are drawn for both
    assert isinstance(a, float) and isinstance(b, float)
    return a - b


def _estimate(statistic: Measured, weights: Floats) -> Value:
    figures = estimate(statistic, weights) if callable(statistic) else (statistic, None, None)
    known = (None if figure is None or math.isnan(figure) else figure for figure in figures)
    return dict(zip(("value", "low", "high"), known, strict=True))
