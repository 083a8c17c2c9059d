"""The comparison as a table in the terminal."""

from typing import Any

from rich.console import Console
from rich.table import Table

TITLES = {"local-only": "local only", "fedavg": "FedAvg", "adapted": "FedAvg + adapted head", "pooled": "pooled data"}


def print_comparison(comparison: dict[str, Any], console: Console) -> None:
    """Print each task's methods per site: value and 95 % interval; * marks a gain over FedAvg beyond the interval."""
    for task in comparison["tasks"]:
        table = Table(title=f"{task['task']}: {task['metric'].upper()} on each site's test patients [95 % interval]")
        table.add_column("site", no_wrap=True)
        table.add_column("patients", justify="right")
        for method in comparison["methods"]:
            table.add_column(TITLES[method], justify="right", no_wrap=method != "adapted")
        for site in task["sites"]:
            cells = [_cell(site["results"].get(method)) for method in comparison["methods"]]
            table.add_row(site["site"], str(site["patients"]), *cells)
        table.add_section()
        for title, key in (("mean of sites", "mean_of_sites"), ("worst site", "worst_site")):
            values = [task[key].get(method) for method in comparison["methods"]]
            table.add_row(title, "", *["–" if value is None else f"{value:.3f}" for value in values])
        console.print(table)
        for name, against in (("adapted - fedavg", "FedAvg"), ("adapted - local-only", "local only")):
            console.print(_differences(task["sites"], name, against), highlight=False)


def _cell(result: dict[str, float | None] | None) -> str:
    if not result or result["value"] is None:
        return "undefined"
    return f"{result['value']:.3f} [{result['low']:.2f}, {result['high']:.2f}]"


def _differences(sites: list[dict[str, Any]], name: str, against: str) -> str:
    found = {s["site"]: d for s in sites if (d := s["differences"].get(name)) and d["value"] is not None}
    better = [site for site, d in found.items() if d["low"] > 0]
    worse = [site for site, d in found.items() if d["high"] < 0]
    parts = [f"ahead of {against} beyond its interval at {len(better)} of {len(found)} sites"]
    if better:
        parts[0] += f" ({', '.join(better)})"
    if worse:
        parts.append(f"behind it at {', '.join(worse)}")
    return "The adapted head is " + "; ".join(parts) + "."
