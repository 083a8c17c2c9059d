"""Methods side by side, per site, with paired intervals: only a simulation can see every site's predictions."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from client.app import site_directories
from mmfm_core.storage import write_json
from mmfm_core.tasks.ranking import auroc, interval, patient_resamples, undefined
from server.record import Run

SOURCES = {
    "local-only": ("baselines/local-only", "adapted"),
    "fedavg": (".", "shared"),
    "adapted": (".", "adapted"),
    "pooled": ("baselines/pooled", "shared"),
}
"""Method -> the run it comes from, inside the run directory, and which of that run's states."""

DIFFERENCES = (("adapted", "fedavg"), ("adapted", "local-only"))

Value = dict[str, float | None]
Table = dict[str, pd.DataFrame]
Resampled = NDArray[np.float64] | None


def compare(directory: Path) -> dict[str, Any]:
    """Compare every method that was run, and write `comparison.json` into the run directory."""
    federation = Run.open(directory).federation
    sites = [folder.name for folder in site_directories(directory / "sites")]
    tasks = []
    for task, head in federation.model.heads.items():
        tables = {site: table for site in sites if (table := _predictions(directory, site, task))}
        if tables:
            tasks.append({"task": task, "metric": "auroc"} | _compare_task(tables, head.classes))
    methods = [
        method for method in SOURCES if any(method in site["results"] for task in tasks for site in task["sites"])
    ]
    result = {"methods": methods, "tasks": tasks}
    write_json(directory / "comparison.json", result)
    return result


def _predictions(directory: Path, site: str, task: str) -> Table:
    """Method -> the site's predictions on its test studies."""
    paths = {
        m: directory / run / "sites" / site / "predictions" / f"{task}-{state}.csv"
        for m, (run, state) in SOURCES.items()
    }
    return {m: pd.read_csv(path, dtype={"study": str, "patient": str}) for m, path in paths.items() if path.is_file()}


def _compare_task(tables: Mapping[str, Table], classes: tuple[str, ...]) -> dict[str, Any]:
    sites = [_compare_site(site, table, classes) for site, table in tables.items()]
    methods = [method for method in SOURCES if all(method in table for table in tables.values())]
    everyone = {
        method: pd.concat(
            [table[method].assign(patient=site + "/" + table[method]["patient"]) for site, table in tables.items()]
        )
        for method in methods
    }
    defined = {m: [s["results"][m]["value"] for s in sites if s["results"][m]["value"] is not None] for m in methods}
    return {
        "sites": sites,
        "mean_of_sites": {m: float(np.mean(values)) if values else None for m, values in defined.items()},
        "worst_site": {m: min(values) if values else None for m, values in defined.items()},
        "all_patients": {m: _interval(values) for m, values in _resampled(everyone, classes).items()},
    }


def _compare_site(site: str, table: Table, classes: tuple[str, ...]) -> dict[str, Any]:
    first = next(iter(table.values()))
    counts = np.bincount(first["target"], minlength=len(classes))
    resampled = _resampled(table, classes)
    return {
        "site": site,
        "studies": len(first),
        "patients": int(first["patient"].nunique()),
        "classes": {name: int(count) for name, count in zip(classes, counts, strict=True)},
        "results": {method: _interval(values) for method, values in resampled.items()},
        "differences": {
            f"{a} - {b}": _interval(_difference(resampled[a], resampled[b]))
            for a, b in DIFFERENCES
            if a in resampled and b in resampled
        },
    }


def _resampled(table: Table, classes: tuple[str, ...]) -> dict[str, Resampled]:
    """Each method's AUROC on all studies (first) and on the same bootstrap samples of patients; None if undefined."""
    first = next(iter(table.values()))
    if undefined(first["target"].to_numpy(), len(classes)):
        return dict.fromkeys(table)
    weights = np.vstack([np.ones(len(first)), patient_resamples(first["patient"].tolist())])
    columns = [f"p{label}" for label in range(len(classes))]
    return {m: auroc(t[columns].to_numpy(np.float64), t["target"].to_numpy(), weights) for m, t in table.items()}


def _difference(a: Resampled, b: Resampled) -> Resampled:
    return None if a is None or b is None else a - b


def _interval(values: Resampled) -> Value:
    return dict(zip(("value", "low", "high"), (None,) * 3 if values is None else interval(values), strict=True))
