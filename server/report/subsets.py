"""What a model makes of fewer modalities, where a document asks: each hospital's figure for every subset of them."""

from collections.abc import Iterable
from dataclasses import dataclass

from mmfm_core.config import Federation
from server.report.results import Estimate, Line


@dataclass(frozen=True)
class Subset:
    """One row: the modalities that the model was shown, and each site's figure on the test patients that have one."""

    modalities: tuple[str, ...]
    sites: dict[str, Estimate]

    @property
    def mean(self) -> float | None:
        """Over the sites where it is defined."""
        known = [found.value for found in self.sites.values() if found.value is not None]
        return sum(known) / len(known) if known else None


def subsets_of(task: str, federation: Federation, lines: Iterable[Line]) -> list[Subset]:
    """All subsets that were measured, largest first, of the model that each site ends with; none where none was."""
    metric = federation.metrics_of(task)[0]
    found: dict[tuple[str, ...], dict[str, Estimate]] = {}
    for line in lines:  # a site's adapted model comes after the shared one
        shown = line.get("modalities")
        if shown and line.get("task") == task and line.get("split") == "test" and line["metric"] == metric:
            found.setdefault(tuple(shown.split("+")), {})[line["site"]] = Estimate.read(line)
    order = {name: index for index, name in enumerate(federation.model.modalities)}
    largest_first = sorted(found, key=lambda names: (-len(names), [order.get(name, len(order)) for name in names]))
    return [Subset(names, found[names]) for names in largest_first]
