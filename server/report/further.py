"""What is measured beside the main table, of the model that each hospital ends with.

The other metrics that a document asks for, and the first one where the model is shown fewer modalities.
"""

from collections.abc import Iterable
from dataclasses import dataclass

from mmfm_core.config import Federation
from server.report.results import Estimate, Line
from server.report.wording import METRICS

Sites = dict[str, Estimate]


@dataclass(frozen=True)
class Row:
    """One figure at every site that has it, what it is called and, of a metric, what it means."""

    name: str
    sites: Sites
    meaning: str = ""

    @property
    def mean(self) -> float | None:
        """Over the sites where it is defined."""
        known = [found.value for found in self.sites.values() if found.value is not None]
        return sum(known) / len(known) if known else None


def others_of(task: str, federation: Federation, lines: Iterable[Line]) -> list[Row]:
    """The metrics but the first, in the document's order, as far as they were measured."""
    found = _by("metric", (line for line in lines if line.get("task") == task and not line.get("modalities")))
    measured = [metric for metric in federation.metrics_of(task)[1:] if metric in found]
    words = {metric: METRICS.get(metric, (metric, "")) for metric in measured}
    return [Row(words[metric][0], found[metric], words[metric][1]) for metric in measured]


def subsets_of(task: str, federation: Federation, lines: Iterable[Line]) -> list[Row]:
    """The first metric on every subset of the modalities that was measured, largest first."""
    leading, order = federation.metrics_of(task)[0], {name: n for n, name in enumerate(federation.model.modalities)}
    of_task = (line for line in lines if line.get("task") == task and line["metric"] == leading)
    found = {tuple(shown.split("+")): sites for shown, sites in _by("modalities", of_task).items() if shown}
    largest_first = sorted(found, key=lambda names: (-len(names), [order.get(name, len(order)) for name in names]))
    return [Row(" + ".join(names), found[names]) for names in largest_first]


def _by(field: str, lines: Iterable[Line]) -> dict[str, Sites]:
    found: dict[str, Sites] = {}
    for line in lines:  # a site's adapted model comes after the shared one
        if line.get("split") == "test":
            found.setdefault(line.get(field) or "", {})[line["site"]] = Estimate.read(line)
    return found
