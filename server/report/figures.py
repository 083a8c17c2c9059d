"""The report's two kinds of figure: the methods at every site, and one site's training round by round."""

import itertools
import math
from collections.abc import Iterable, Sequence
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from server.report.drawing import INK, SETTINGS, stacked, to_svg
from server.report.history import Curves, Points
from server.report.results import Estimate, TaskResult
from server.report.wording import LABELS, METRICS

# Okabe & Ito's palette, told apart by the color-blind; each method and task has its own marker besides.
METHOD_STYLE = {
    "local-only": ("#6b6b6b", "s"),
    "fedavg": ("#0072b2", "o"),
    "adapted": ("#d55e00", "D"),
    "pooled": ("#009e73", "^"),
}
TASK_STYLE = (("#0072b2", "o", "●"), ("#d55e00", "D", "◆"), ("#009e73", "^", "▲"), ("#6b6b6b", "s", "■"))
ADAPTING = "#efece3"

_LINE, _HEAD = 10, 17  # points that a method and a site's name take in the forest
_LONGEST_NAME = 56  # characters of a site's name that fit over its lines


def forest(task: TaskResult, key: str) -> str:
    """Every site's methods as dots with their 95 % intervals, and the mean over sites below."""
    groups = [(site.site, site.results, site.undefined) for site in task.sites]
    if len(task.sites) > 1:
        groups.append(("Mean of hospitals", {m: Estimate(v) for m, v in task.mean_of_sites.items()}, "undefined"))
    height = sum(_HEAD + _LINE * max(1, len(_drawable(results))) for _, results, _ in groups) + 4
    with rc_context(SETTINGS):
        figure, (axes,) = stacked(5.2, [height], bottom=36, left=12, gap=0, top=24)
        left, right = _range(task)
        y = 0.0
        for index, (name, results, undefined) in enumerate(groups):
            if index:
                axes.axhline(y, color="#bbbbbb", linewidth=0.6)
            _label(axes, left, y + _HEAD - 5, _short(name), fontweight="bold")
            y += _HEAD
            y += _draw_group(axes, _drawable(results), y, left, undefined)
        axes.set(xlim=(left, right), ylim=(y + 4, 0), yticks=[], xlabel=METRICS.get(task.metric, (task.metric, ""))[0])
        axes.spines["left"].set_visible(False)
        axes.grid(axis="x")
        if task.metric == "auroc" and left <= 0.5:
            axes.axvline(0.5, color="#888888", linewidth=0.8, linestyle=(0, (4, 3)))
        for method in task.methods:
            color, marker = METHOD_STYLE[method]
            axes.plot([], [], color=color, marker=marker, markersize=5, linewidth=1.3, label=LABELS[method])
        figure.legend(
            loc="upper left",
            ncols=4,
            frameon=False,
            fontsize=8.5,
            handlelength=1.6,
            columnspacing=1.2,
            borderaxespad=0.2,
        )
        return to_svg(figure, key)


def curves(
    site: Curves,
    key: str,
    *,
    rounds: int,
    adapting: Sequence[int],
    highest_loss: float,
    lowest_value: float,
    tasks: Sequence[str],
) -> str:
    """One site: its validation metric over its training loss, on axes that are the same for every site."""
    with rc_context(SETTINGS | {"font.size": 8}):
        figure, stack = stacked(3.1, [78, 62] if site.validation else [62], bottom=28, left=30, gap=27, top=13)
        for axes in stack:
            axes.set_xlim(0.5, rounds + 0.5)
            axes.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
            axes.yaxis.set_major_locator(MaxNLocator(4))
            axes.grid(axis="y")
            if adapting:
                axes.axvspan(min(adapting) - 0.5, max(adapting) + 0.5, color=ADAPTING, linewidth=0)
        if site.validation:
            for task, points in site.validation.items():
                color, marker, _ = TASK_STYLE[tasks.index(task) % len(TASK_STYLE)]
                _draw_points(stack[0], points, color, marker)
            stack[0].set_ylim(lowest_value, 1.02)
            stack[0].set_title("validation", fontsize=8, loc="left", pad=3)
        for points in site.loss.values():
            _draw_points(stack[-1], points, INK, ".")
        stack[-1].set_ylim(0, highest_loss * 1.05)
        stack[-1].set_title("training loss", fontsize=8, loc="left", pad=3)
        stack[-1].set_xlabel("round", labelpad=1)
        return to_svg(figure, key)


def task_legend(tasks: Iterable[str]) -> list[tuple[str, str, str]]:
    """Each task's colour and marker in the curves, for the text beside them."""
    return [(task, color, sign) for task, (color, _, sign) in zip(tasks, itertools.cycle(TASK_STYLE), strict=False)]


def _draw_group(
    axes: Axes, drawable: Sequence[tuple[str, Estimate, float]], y: float, left: float, undefined: str
) -> float:
    """One site's lines, downwards from `y`; returns their height."""
    if not drawable:
        _label(axes, left, y + _LINE - 2, undefined, color="#666666", fontsize=8.5)
        return _LINE
    for index, (method, found, value) in enumerate(drawable):
        middle = y + _LINE * (index + 0.5)
        color, marker = METHOD_STYLE[method]
        if found.low is not None and found.high is not None:
            axes.plot([found.low, found.high], [middle, middle], color=color, linewidth=1.3, solid_capstyle="butt")
        axes.plot(
            [value],
            [middle],
            color=color,
            marker=marker,
            markersize=6 if marker == "^" else 5,
            linestyle="",
            markeredgecolor="white",
            markeredgewidth=0.5,
            clip_on=False,
        )
    return _LINE * len(drawable)


def _label(axes: Axes, left: float, y: float, text: str, **style: Any) -> None:
    axes.annotate(
        text,
        (left, y),
        xytext=(3, 0),
        textcoords="offset points",
        va="baseline",
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 0.5},
        **style,
    )


def _drawable(results: dict[str, Estimate]) -> list[tuple[str, Estimate, float]]:
    found = [(method, results[method]) for method in METHOD_STYLE if method in results]
    return [(method, estimate, estimate.value) for method, estimate in found if estimate.value is not None]


def _draw_points(axes: Axes, points: Points, color: str, marker: str) -> None:
    axes.plot(
        *zip(*points, strict=True),
        color=color,
        linewidth=1.2,
        marker=marker,
        markersize=3,
        markevery=max(1, len(points) // 8),
        clip_on=False,
    )


def _range(task: TaskResult) -> tuple[float, float]:
    drawn = [found for site in task.sites for found in _drawable(site.results)]
    ends = [end for _, found, value in drawn for end in (value, found.low, found.high) if end is not None] or [0.0, 1.0]
    return max(0.0, math.floor(min(ends) * 10 - 0.2) / 10), min(1.0, math.ceil(max(ends) * 10 + 0.2) / 10)


def _short(name: str) -> str:
    return name if len(name) <= _LONGEST_NAME else name[: _LONGEST_NAME - 1] + "…"
