"""Matplotlib figures as SVG to stand inside a page: no pyplot, no global state, text that stays text."""

import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK = "#333333"
INCH = 72  # points, the unit of all heights and margins

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "mmfm",
    "text.parse_math": False,
    "font.size": 9,
    "text.color": INK,
    "axes.edgecolor": "#999999",
    "axes.linewidth": 0.6,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 2,
    "ytick.major.size": 2,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
}
"""For `rc_context`, around all of a figure from `stacked` to `to_svg`."""


def stacked(
    width: float, heights: Sequence[float], *, bottom: float, left: float, gap: float, top: float
) -> tuple[Figure, list[Axes]]:
    """Axes one under the other with exact margins in points: matplotlib's own layout engines take most of its time."""
    total = bottom + sum(heights) + gap * (len(heights) - 1) + top
    figure = Figure(figsize=(width, total / INCH))
    figure.patch.set_visible(False)
    axes, foot = [], total - top
    for height in heights:
        foot -= height
        box = (left / INCH / width, foot / total, 1 - (left + 12) / INCH / width, height / total)
        axes.append(figure.add_axes(box))
        axes[-1].patch.set_visible(False)
        foot -= gap
    return figure, axes


def to_svg(figure: Figure, key: str) -> str:
    """The bare <svg>; its identifiers begin with `key`, since several figures share one page."""
    buffer = io.StringIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # the text stays text: the reader's font has the glyph
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = buffer.getvalue()
    text = re.sub(r"<style .*?</style>", "", text[text.index("<svg") :], flags=re.DOTALL)
    return re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{key}-", text)
