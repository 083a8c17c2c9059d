"""A comparison in a table, a plot and plain words, which claim no more than the intervals show."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib import rc_context
from rich.table import Table

from server.evidence import Cost, Evidence, Figure
from server.methods import METHODS, REFERENCE
from server.report.drawing import SETTINGS, stacked, to_svg

BOUNDS = ("local-only", "fedavg")
ROW = 16
"""Points of height a method has in the plot."""


def rows(e: Evidence, costs: Mapping[str, Cost]) -> tuple[list[str], list[list[str]]]:
    """The table's header and its cells, a row per method."""
    sites = list(e.patients)
    header = ["method", *sites, "mean of sites", "mean of patients", "worst site", "against FedAvg + adaptation"]
    header += [*(["ECE"] if e.errors else []), "minutes", "MB"]
    cells = []
    for method in e.draws:
        worst, lowest = e.worst_site(method) if e.defined else ("", math.nan)
        row = [METHODS[method].title, *(_value(e.site(method, site)) for site in sites)]
        if e.defined:
            row += [_value(Figure.of(e.mean_of_sites(method))), f"{e.mean_of_patients(method)[0]:.3f}"]
            row += [f"{lowest:.3f} ({worst})", "" if method == REFERENCE else _signed(difference(e, method))]
        else:
            row += ["–"] * 4
        row += [*([f"{e.errors[method]:.3f}"] if e.errors else [])]
        cells.append([*row, f"{costs[method].minutes:.1f}", f"{costs[method].megabytes:.1f}"])
    return header, cells


def terminal_table(e: Evidence, costs: Mapping[str, Cost]) -> Table:
    """For a terminal: methods as columns would not fit, sites as columns do not either, so a row per method and key
    figures; all sites are in the files."""
    header, cells = rows(e, costs)
    kept = [0, *range(1 + len(e.patients), len(header))]
    table = Table(title=f"{e.head}: {e.metric} on test patients, 95 % interval", title_justify="left")
    for index in kept:
        table.add_column(header[index], justify="left" if index == 0 else "right")
    for row in cells:
        table.add_row(*(row[index] for index in kept))
    return table


def markdown_table(e: Evidence, costs: Mapping[str, Cost]) -> str:
    """The whole table."""
    header, cells = rows(e, costs)
    title = f"## {e.head}: {e.metric} on test patients\n"
    patients = ", ".join(f"{site} {count}" for site, count in e.patients.items())
    lines = [title, f"Mean over seeds, 95 % interval by bootstrap over patients. Test patients: {patients}.\n"]
    lines += ["| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells]]
    return "\n".join(lines)


def difference(e: Evidence, method: str) -> Figure:
    """A method minus the reference on the same draws, in the mean of sites."""
    return Figure.of(e.mean_of_sites(method) - e.mean_of_sites(REFERENCE))


def sentences(e: Evidence) -> list[str]:
    """What differs beyond noise, what does not, and whether a site is harmed."""
    told = []
    if e.instead_of:
        told.append(f"{e.instead_of} is undefined at every site, so {e.metric} is compared.")
    undefined = [site for site in e.patients if site not in e.defined]
    if undefined:
        told.append(f"{e.metric} is undefined at {', '.join(undefined)}, which no mean counts.")
    if not e.defined:
        return told
    others = [method for method in e.draws if method != REFERENCE]
    found = {method: difference(e, method) for method in others}
    if any(math.isnan(figure.low) for figure in found.values()):
        return [*told, f"{e.metric} has no interval here, so nothing is said about what differs beyond noise."]
    if single := [site for site in e.defined if e.patients[site] == 1]:
        told.append(
            f"One test patient varies in no draw: with {', '.join(single)} intervals of the mean are too narrow."
        )
    for verb, ahead in (("better", lambda f: f.low > 0), ("worse", lambda f: f.high < 0)):
        named = [f"{METHODS[m].title} ({_signed(f)})" for m, f in found.items() if ahead(f)]
        if named:
            told.append(f"In the mean of sites, {verb} than FedAvg + adaptation beyond noise: {', '.join(named)}.")
    rest = [METHODS[m].title for m, f in found.items() if not (f.low > 0 or f.high < 0)]
    if rest:
        told.append(f"No difference beyond noise in the mean of sites: {', '.join(rest)}.")
    told += _harm(e)
    better = [m for m, f in found.items() if f.low > 0 and not METHODS[m].bound]
    best = max(better, key=lambda m: found[m].value) if better else REFERENCE
    why = "is better beyond noise" if better else "no federated method is better beyond noise"
    lines = METHODS[best].lines
    told.append(f"Choice: {METHODS[best].title}; {why}." + (f" In the document: {dict(lines)}." if lines else ""))
    if len(others) > 1:
        told.append(f"{len(others)} methods were compared, each at 95 %: one in twenty stands out by chance alone.")
    return told


def _harm(e: Evidence) -> list[str]:
    """Sites where the reference ends below the better of its bounds: each site alone, and what is shared as it is."""
    told = []
    for bound in (bound for bound in BOUNDS if bound in e.draws):
        below = [s for s in e.defined if e.site(REFERENCE, s, bound).high < 0]
        place = f"below it at {', '.join(below)}" if below else "at no site below it"
        told.append(f"Against {METHODS[bound].title}, FedAvg + adaptation is {place} beyond noise.")
    return told


def numbers(e: Evidence, costs: Mapping[str, Cost]) -> dict[str, Any]:
    """The same for machines; None where a figure is undefined."""

    def plain(figure: Figure) -> dict[str, float | None]:
        return {key: None if math.isnan(value) else value for key, value in vars(figure).items()}

    return {
        "head": e.head,
        "metric": e.metric,
        "patients": dict(e.patients),
        "methods": {
            method: {
                "sites": {site: plain(e.site(method, site)) for site in e.patients},
                "mean_of_sites": plain(Figure.of(e.mean_of_sites(method))) if e.defined else None,
                "mean_of_patients": plain(Figure.of(e.mean_of_patients(method))) if e.defined else None,
                "difference": plain(difference(e, method)) if e.defined else None,
                "ece": e.errors.get(method),
                "minutes": costs[method].minutes,
                "megabytes": costs[method].megabytes,
            }
            for method in e.draws
        },
    }


def plot(found: Sequence[Evidence]) -> str:
    """SVG: each method's difference to the reference, the mean of sites with its interval, every site as a dot."""
    shown = [e for e in found if e.defined]
    heights = [ROW * (len(e.draws) - 1) for e in shown]
    with rc_context(SETTINGS):
        figure, axes = stacked(7, heights, bottom=40, left=150, gap=60, top=24)
        for e, axis in zip(shown, axes, strict=True):
            methods = [method for method in e.draws if method != REFERENCE][::-1]
            for height, method in enumerate(methods):
                mean = difference(e, method)
                axis.plot([mean.low, mean.high], [height, height], color="#3b6ea5", linewidth=2)
                axis.plot([mean.value], [height], "s", color="#3b6ea5", markersize=5)
                at_sites = [e.site(method, site, REFERENCE).value for site in e.defined]
                axis.plot(at_sites, [height] * len(at_sites), "o", color="#999999", markersize=3, zorder=0)
            axis.axvline(0, color="#333333", linewidth=0.8)
            axis.set_yticks(range(len(methods)), [METHODS[method].title for method in methods])
            axis.set_ylim(-0.6, len(methods) - 0.4)
            axis.grid(axis="x")
            axis.set_title(f"{e.head}: {e.metric}, difference to FedAvg + adaptation", fontsize=9, loc="left")
            axis.set_xlabel("mean of sites with 95 % interval; dots are sites")
        return to_svg(figure, "compare")


def _value(figure: Figure) -> str:
    return _told(figure, ".3f")


def _signed(figure: Figure) -> str:
    return _told(figure, "+.3f")


def _told(figure: Figure, form: str) -> str:
    if math.isnan(figure.value):
        return "–"
    interval = "" if math.isnan(figure.low) else f" [{figure.low:{form}}, {figure.high:{form}}]"
    return f"{figure.value:{form}}{interval}"
