"""Evaluation of a model on a site's own patients."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mmfm_core.config.federation import Federation
from mmfm_core.config.site import Split
from mmfm_core.data.dataset import Dataset
from mmfm_core.models.model import MultimodalModel
from mmfm_core.protocol import Metric
from mmfm_core.tasks.classification import measure

BATCH = 128


@dataclass(frozen=True)
class Predictions:
    """One head's outputs on one split.

    Attributes:
        rows: the studies' rows in the dataset.
        probabilities: [N, classes].
        targets: [N].
    """

    head: str
    rows: list[int]
    probabilities: Tensor
    targets: Tensor


def predict(model: MultimodalModel, dataset: Dataset, split: Split) -> Iterator[Predictions]:
    """The predictions of every head on the labelled studies of a split; heads without any are left out."""
    model.eval()
    for head in model.heads:
        rows = dataset.rows(split, [head])
        if not rows:
            continue
        with torch.inference_mode():
            logits = [model(dataset.batch(rows[i : i + BATCH]), [head])[head] for i in range(0, len(rows), BATCH)]
        yield Predictions(head, rows, torch.cat(logits).softmax(-1), dataset.batch(rows).targets[head])


def metrics_of(
    predictions: Predictions, dataset: Dataset, federation: Federation, split: Split, state: str
) -> list[Metric]:
    """The document's metrics of some predictions; `state` is 'shared' or 'adapted'."""
    patients = [dataset.studies[row].patient for row in predictions.rows]
    found = []
    for name in federation.evaluation_of(predictions.head).metrics:
        m = measure(name, predictions.probabilities, predictions.targets, patients)
        found.append(
            Metric(
                task=predictions.head,
                model=state,
                split=split,
                metric=name,
                value=m.value,
                n=len(predictions.rows),
                low=m.low,
                high=m.high,
            )
        )
    return found
