"""What the runs of several methods show: figures per site, over sites, and paired differences with their noise."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

from client.predictions import path_of
from mmfm_core.config.part import HeadConfig
from mmfm_core.metrics.ranking import RESAMPLES, Floats, patient_resamples
from server.record import Run

Draws = Floats
"""[1 + R]: a figure, and what it would have been with patients drawn again. Those of one site see the same draws."""

Predictions = Mapping[str, Mapping[str, Sequence[pd.DataFrame]]]
"""Method -> site -> one table of predictions per seed."""


@dataclass(frozen=True)
class Cost:
    """What one run of a method takes, mean over seeds: minutes of rounds, and MB that all sites send and receive."""

    minutes: float
    megabytes: float


@dataclass(frozen=True)
class Figure:
    """A value with its 95 % interval (percentiles); NaN where undefined."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, draws: Draws) -> "Figure":
        """The figure behind some draws."""
        known = draws[1:][np.isfinite(draws[1:])]
        low, high = np.quantile(known, [0.025, 0.975]) if len(known) else (np.nan, np.nan)
        return cls(float(draws[0]), float(low), float(high))


@dataclass(frozen=True)
class Evidence:
    """One head's leading metric of every method, or the next one that some site's patients suffice for.

    Attributes:
        patients: site -> test patients.
        draws: method -> site -> draws, the mean over seeds.
        errors: method -> expected calibration error, mean of the same sites; empty where the head has none.
        instead_of: the leading metric, where it is undefined at every site.
    """

    head: str
    metric: str
    patients: Mapping[str, int]
    draws: Mapping[str, Mapping[str, Draws]]
    errors: Mapping[str, float]
    instead_of: str = ""

    def site(self, method: str, site: str, minus: str | None = None) -> Figure:
        """One site's figure, or its difference to another method's; a single patient gives no interval."""
        draws = self.draws[method][site] - (self.draws[minus][site] if minus else 0)
        return Figure.of(draws if self.patients[site] > 1 else draws[:1])

    def mean_of_sites(self, method: str) -> Draws:
        """Every site counts the same; those where the figure is undefined do not count."""
        return self._mean(method, [1] * len(self.defined))

    def mean_of_patients(self, method: str) -> Draws:
        """Every site counts by its test patients."""
        return self._mean(method, [self.patients[site] for site in self.defined])

    def _mean(self, method: str, weights: Sequence[float]) -> Draws:
        mean = np.average([self.draws[method][site] for site in self.defined], axis=0, weights=weights)
        drawn = any(self.patients[site] > 1 for site in self.defined)
        return np.asarray(mean if drawn else mean[:1])

    def worst_site(self, method: str) -> tuple[str, float]:
        """The site with the lowest figure."""
        return min(((site, float(self.draws[method][site][0])) for site in self.defined), key=lambda item: item[1])

    @property
    def defined(self) -> list[str]:
        """The sites where every method's figure is defined."""
        return [site for site in self.patients if all(np.isfinite(each[site][0]) for each in self.draws.values())]


def of_leading(head: HeadConfig, name: str, metrics: Sequence[str], predictions: Predictions) -> Evidence:
    """The evidence of the first of `metrics` that the test patients of some site suffice for, or else of the first."""
    leading, *others = (metric for metric in metrics if metric not in head.LOWER_IS_BETTER)
    shown = evidence(head, name, leading, predictions)
    if shown.defined:
        return shown
    instead = (evidence(head, name, metric, predictions) for metric in others)
    return next((replace(each, instead_of=leading) for each in instead if each.defined), shown)


def evidence(head: HeadConfig, name: str, metric: str, predictions: Predictions) -> Evidence:
    """Measure all methods of a head on the same draws of each site's test patients."""
    first = next(iter(predictions.values()))
    draws = {
        method: {site: _draws(head, metric, tables, seed) for seed, (site, tables) in enumerate(by_site.items())}
        for method, by_site in predictions.items()
    }
    patients = {site: int(tables[0]["patient"].nunique()) for site, tables in first.items()}
    found = Evidence(name, metric, patients, draws, {})
    if "ece" not in head.METRICS or metric == "ece":
        return found
    errors = {
        method: np.mean([_draws(head, "ece", by_site[site], 0, resamples=0)[0] for site in found.defined or patients])
        for method, by_site in predictions.items()
    }
    return replace(found, errors={method: float(error) for method, error in errors.items()})


def _draws(
    head: HeadConfig, metric: str, tables: Sequence[pd.DataFrame], seed: int, resamples: int = RESAMPLES
) -> Draws:
    patients = list(tables[0]["patient"])
    weights = np.ones((1, len(patients)))
    if resamples:
        weights = np.vstack([weights, patient_resamples(patients, resamples, seed)])
    each = []
    for table in tables:
        statistic = head.statistic(metric, table)
        # A figure that knows no weights has no draws either.
        each.append(statistic(weights) if callable(statistic) else np.r_[_known(statistic), np.full(resamples, np.nan)])
    return np.asarray(np.mean(each, axis=0))


def _known(value: float | Callable[[Floats], Floats] | None) -> float:
    return value if isinstance(value, float) else np.nan


def read_predictions(run: Path, head: str, states: Sequence[str]) -> dict[str, pd.DataFrame]:
    """Site -> its predictions on test patients, in the first of `states` that there is."""
    found, document = {}, Run.open(run).facts["federation"]
    for site in sorted(path for path in (run / "sites").iterdir() if path.is_dir()):
        paths = [path_of(site, document, head, state) for state in states]
        path = next((path for path in paths if path.is_file()), None)
        if path is not None:
            found[site.name] = pd.read_csv(path, dtype={"study": str, "patient": str})
    return found
