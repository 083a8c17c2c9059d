"""The main table as data: each method's figure at each site, from `comparison.json` or the sites' own test lines."""

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mmfm_core.config import Federation
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.ranking import MIN_OF_CLASS

Line = Mapping[str, Any]

METHODS = ("local-only", "fedavg", "adapted", "pooled")
STATES = {"fedavg": "shared", "adapted": "adapted"}  # what each method is called in metrics.jsonl
LOWER_IS_BETTER = ("ece",)


@dataclass(frozen=True)
class Estimate:
    """A figure, or a paired difference, with its 95 % interval; None where undefined or not computed."""

    value: float | None
    low: float | None = None
    high: float | None = None

    @classmethod
    def read(cls, data: Mapping[str, Any] | None) -> "Estimate":
        """Read it from JSON, where 'undefined' is null, NaN, or nothing at all."""
        return cls(*(_number((data or {}).get(key)) for key in ("value", "low", "high")))

    @property
    def has_interval(self) -> bool:
        """Whether both ends are known."""
        return self.low is not None and self.high is not None

    @property
    def sign(self) -> int:
        """1 or -1 where the whole interval lies on that side of zero, else 0."""
        if self.low is None or self.high is None:
            return 0
        return (self.low > 0) - (self.high < 0)


@dataclass(frozen=True)
class SiteResult:
    """One row. `classes` counts test studies; a method that was not measured is not in `results`."""

    site: str
    patients: int | None
    studies: int | None
    classes: dict[str, int]
    results: dict[str, Estimate]
    differences: dict[str, Estimate] = field(default_factory=dict)

    @property
    def undefined(self) -> str:
        """How to say that a figure is undefined here: with the class that is too rare, if one is."""
        rarest = min(self.classes, key=lambda name: self.classes[name], default=None)
        if rarest is None or self.classes[rarest] >= MIN_OF_CLASS:
            return "undefined"
        return f"undefined ({self.classes[rarest]} of class '{rarest}')"


@dataclass(frozen=True)
class TaskResult:
    """One head's table. `differences` are keyed 'method - method'."""

    task: str
    metric: str
    sites: list[SiteResult]
    mean_of_sites: dict[str, float | None]
    worst_site: dict[str, float | None]
    all_patients: dict[str, Estimate]

    @property
    def methods(self) -> list[str]:
        """The methods measured anywhere, in the order of the table."""
        return [method for method in METHODS if any(method in site.results for site in self.sites)]

    @property
    def differences(self) -> list[str]:
        """The paired differences computed anywhere, in the order of the file."""
        return list(dict.fromkeys(pair for site in self.sites for pair in site.differences))

    @property
    def lower_is_better(self) -> bool:
        """Whether a negative difference is a gain."""
        return self.metric in LOWER_IS_BETTER

    def defined(self, method: str) -> list[SiteResult]:
        """The sites where a method has a value."""
        return [site for site in self.sites if site.results.get(method, Estimate(None)).value is not None]


def read_results(
    directory: Path, federation: Federation, sites: Mapping[str, Any], lines: Iterable[Line]
) -> list[TaskResult]:
    """Every task that has a test figure. A deployment has no `comparison.json`: no one there may see all predictions.

    Raises:
        MmfmError: `comparison.json` is damaged.
    """
    path = directory / "comparison.json"
    if not path.is_file():
        return _from_metrics(federation, sites, lines)
    try:
        return [_from_comparison(task) for task in json.loads(path.read_text(encoding="utf-8"))["tasks"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise MmfmError(f"{path}: is damaged; remove it to have the report made from metrics.jsonl alone") from error


def _from_comparison(task: Mapping[str, Any]) -> TaskResult:
    sites = [
        SiteResult(
            site["site"],
            site.get("patients"),
            site.get("studies"),
            dict(site.get("classes") or {}),
            _estimates(site["results"]),
            _estimates(site.get("differences") or {}),
        )
        for site in task["sites"]
    ]
    return TaskResult(
        task["task"],
        task["metric"],
        sites,
        _numbers(task.get("mean_of_sites")),
        _numbers(task.get("worst_site")),
        _estimates(task.get("all_patients") or {}),
    )


def _from_metrics(federation: Federation, sites: Mapping[str, Any], lines: Iterable[Line]) -> list[TaskResult]:
    last = {(m["task"], m["site"], m["model"]): m for m in lines if m.get("split") == "test" and _leads(m, federation)}
    tasks = []
    for task in federation.model.heads:
        tested = list(dict.fromkeys(site for head, site, _ in last if head == task))
        if tested:
            rows = [_site_from_metrics(task, site, sites.get(site, {}), last) for site in tested]
            tasks.append(_summarised(task, federation.metrics_of(task)[0], rows))
    return tasks


def _leads(line: Line, federation: Federation) -> bool:
    task = line.get("task")
    return (
        task in federation.model.heads
        and not line.get("modalities")
        and line["metric"] == federation.metrics_of(task)[0]
    )


def _site_from_metrics(
    task: str, site: str, facts: Mapping[str, Any], last: Mapping[tuple[str, str, str], Line]
) -> SiteResult:
    measured = {method: last[task, site, state] for method, state in STATES.items() if (task, site, state) in last}
    studies = next((line.get("n") for line in measured.values()), None)
    classes = facts.get("targets", {}).get(task, {}).get("test", {})
    return SiteResult(site, facts.get("patients", {}).get("test"), studies, dict(classes), _estimates(measured))


def _summarised(task: str, metric: str, rows: list[SiteResult]) -> TaskResult:
    values = {method: [row.results[method].value for row in rows if method in row.results] for method in STATES}
    known = {method: [v for v in found if v is not None] for method, found in values.items() if found}
    worst = max if metric in LOWER_IS_BETTER else min
    return TaskResult(
        task,
        metric,
        rows,
        mean_of_sites={method: sum(found) / len(found) if found else None for method, found in known.items()},
        worst_site={method: worst(found, default=None) for method, found in known.items()},
        all_patients={},
    )


def _estimates(data: Mapping[str, Any]) -> dict[str, Estimate]:
    return {name: Estimate.read(value) for name, value in data.items()}


def _numbers(data: Mapping[str, Any] | None) -> dict[str, float | None]:
    return {name: _number(value) for name, value in (data or {}).items()}


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None
