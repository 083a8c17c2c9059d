"""The comparison as a table in the terminal."""

from collections.abc import Sequence
from typing import Any

from rich.console import Console
from rich.table import Table

from mmfm_core.metrics.ranking import MIN_OF_CLASS
from server.report.wording import LABELS

ONE_LINE_COLUMNS = 110
PAIRS = {
    "adapted - fedavg": "The adapted head against FedAvg",
    "adapted - local-only": "The adapted head against training alone",
    "fedavg - local-only": "FedAvg against training alone",
}


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print each task's methods per site, value and 95 % interval, and what the paired differences say."""
    layout = "{:.3f} ({:.2f}–{:.2f})" if console.width >= ONE_LINE_COLUMNS else "{:.3f}\n{:.2f}–{:.2f}"
    for task in comparison["tasks"]:
        name = task["metric"].upper()
        table = Table(title=f"{task['task']}: {name} on each site's test patients, 95 % interval", title_justify="left")
        table.add_column("site", no_wrap=True)
        table.add_column("patients", justify="right")
        for method in comparison["methods"]:
            table.add_column(LABELS[method], justify="right")
        for site in task["sites"]:
            cells = [_cell(site["results"].get(method), layout) for method in comparison["methods"]]
            table.add_row(site["site"], str(site["patients"]), *cells)
        table.add_section()
        for title, key in (("mean of sites", "mean_of_sites"), ("worst site", "worst_site")):
            values = [task[key].get(method) for method in comparison["methods"]]
            table.add_row(title, "", *["–" if value is None else f"{value:.3f}" for value in values])
        console.print(table)
        for line in (*_undefined(task["sites"], name), *_differences(task["sites"])):
            console.print(line, highlight=False, markup=False)


def _cell(result: dict[str, float | None] | None, layout: str) -> str:
    if not result or result["value"] is None:
        return "–"
    return layout.format(result["value"], result["low"], result["high"])


def _undefined(sites: Sequence[dict[str, Any]], name: str) -> list[str]:
    lines = []
    for site in sites:
        if any(result["value"] is None for result in site["results"].values()):
            counts = ", ".join(f"{count} {label}" for label, count in site["classes"].items())
            needed = f": it takes {MIN_OF_CLASS} patients of each class" if name in ("AUROC", "AUPRC") else ""
            lines.append(f"At {site['site']} the {name} is undefined ({counts}){needed}.")
    return lines


def _differences(sites: Sequence[dict[str, Any]]) -> list[str]:
    lines = []
    for name, pair in PAIRS.items():
        found = {s["site"]: d for s in sites if (d := s["differences"].get(name)) and d["value"] is not None}
        better = [site for site, d in found.items() if d["low"] > 0]
        worse = [site for site, d in found.items() if d["high"] < 0]
        told = [f"{how} at {', '.join(where)}" for how, where in (("better", better), ("worse", worse)) if where]
        if len(better + worse) < len(found):
            told.append("not distinguishable at " + ("the others" if told else "any site"))
        if found:
            lines.append(f"{pair}, by paired 95 % intervals: {'; '.join(told)}.")
    return lines
