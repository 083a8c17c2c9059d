"""Evaluation of a model on a site's own patients."""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, combinations

import pandas as pd
import torch

from mmfm_core.config.federation import Federation
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Split
from mmfm_core.data.dataset import Dataset
from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, draws, estimate, known
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.protocol import Metric

BATCH = 64

Figure = tuple[float | None, float | None, float | None]


@dataclass(frozen=True)
class Predictions:
    """One head's outputs on one split, and the targets they are to be measured by.

    Attributes:
        table: a row per study: 'study', 'patient', and the head's own columns.
    """

    head: str
    table: pd.DataFrame


def predict(
    model: MultimodalModel,
    dataset: Dataset,
    split: Split,
    heads: Collection[str] | None = None,
    modalities: Collection[str] | None = None,
) -> Iterator[Predictions]:
    """The predictions of heads on the studies of a split that they can be judged on; a head without any is left out.

    With `modalities`, as if the studies had no other; those that have none of them are left out.
    """
    for name, head in model.heads.items():
        assert isinstance(head, Head)
        rows = [] if heads is not None and name not in heads else dataset.rows(split, [name])
        if modalities is not None:
            here = torch.stack([dataset.everything.present[m] for m in modalities]).any(0)
            rows = [row for row in rows if here[row]]
        if not rows:
            continue
        model.eval()
        columns: dict[str, list[object]] = {
            "study": [dataset.studies[row].study for row in rows],
            "patient": [dataset.studies[row].patient for row in rows],
        }
        with torch.inference_mode():
            for start in range(0, len(rows), BATCH):
                batch = dataset.batch(rows[start : start + BATCH])
                batch = batch if modalities is None else batch.only(modalities)
                for column, values in head.predict(Encoding(model, batch)).items():
                    columns.setdefault(column, []).extend(values)
        yield Predictions(name, pd.DataFrame(columns))


def metrics_of(predictions: Predictions, federation: Federation, split: Split, state: str) -> list[Metric]:
    """The document's metrics of some predictions; `state` is 'shared' or 'adapted'."""
    head, table = federation.model.heads[predictions.head], predictions.table
    figures = measure(head, federation.metrics_of(predictions.head), table)
    return [
        Metric(predictions.head, state, split, metric, value, len(table), low, high)
        for metric, (value, low, high) in figures.items()
    ]


def measure(head: HeadConfig, metrics: Sequence[str], table: pd.DataFrame) -> dict[str, Figure]:
    """Each metric's value (None where undefined) and its 95 % interval over patients (None where there is none)."""
    weights = draws(list(table["patient"]))
    return {metric: _figure(head.statistic(metric, table), weights) for metric in metrics}


def _figure(statistic: Statistic | float | None, weights: Floats) -> Figure:
    if not callable(statistic):
        return statistic, None, None
    value, low, high = estimate(statistic, weights)
    return known(value), known(low), known(high)


def subsets(modalities: Collection[str]) -> list[tuple[str, ...]]:
    """Every subset but the empty and the whole one."""
    names = tuple(modalities)
    return list(chain.from_iterable(combinations(names, n) for n in range(1, len(names))))
