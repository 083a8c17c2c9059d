"""Metrics of classification, with intervals by bootstrap over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional.classification import (  # isort: skip
    binary_average_precision, binary_f1_score, multiclass_accuracy, multiclass_average_precision,
    multiclass_calibration_error, multiclass_f1_score,
)

MIN_OF_CLASS = 5
"""Below this many studies of a class, or of all others, ranking metrics are undefined: a handful decides them."""

RESAMPLES = 1000

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Measurement:
    """A metric's value (None where undefined) and its 95 % interval (None where it was not computed)."""

    value: float | None
    low: float | None = None
    high: float | None = None


def measure(metric: str, probabilities: Tensor, targets: Tensor, patients: Sequence[str]) -> Measurement:
    """One metric of `probabilities` [N, classes] against `targets` [N].

    With two classes the second is the positive one; with more, classes are averaged with equal weight.
    """
    counts = torch.bincount(targets, minlength=probabilities.shape[1])
    if not len(targets):
        return Measurement(None)
    if metric in ("auroc", "auprc") and bool(((counts < MIN_OF_CLASS) | (len(targets) - counts < MIN_OF_CLASS)).any()):
        return Measurement(None)
    if metric == "auroc":
        weights = np.vstack([np.ones(len(targets)), patient_resamples(patients)])
        values = auroc(probabilities.double().numpy(), targets.numpy(), weights)
        low, high = np.nanquantile(values[1:], [0.025, 0.975])
        return Measurement(float(values[0]), float(low), float(high))
    return Measurement(float(_POINT[metric](probabilities, targets)))


def auroc(scores: Floats, targets: NDArray[np.int64], weights: Floats) -> Floats:
    """Area under the ROC curve, for each row of study weights.

    Ours, because torchmetrics and scikit-learn take one weighting at a time and a bootstrap needs a thousand. It is the
    Mann-Whitney statistic: the share of (positive, negative) pairs ranked rightly, ties counting half.

    Args:
        scores: [N, classes]; with two classes only the second column counts.
        targets: [N].
        weights: [R, N], non-negative.

    Returns:
        [R]: the mean over classes, each against the rest; NaN where a class or its rest has no weight.
    """
    classes = [1] if scores.shape[1] == 2 else range(scores.shape[1])
    per_class = []
    for label in classes:
        positive, negative = targets == label, targets != label
        ranked = np.sign(scores[positive, label][:, None] - scores[negative, label][None, :]) / 2 + 0.5
        of_positive, of_negative = weights[:, positive], weights[:, negative]
        pairs = of_positive.sum(1) * of_negative.sum(1)
        right = ((of_positive @ ranked) * of_negative).sum(1)
        per_class.append(np.divide(right, pairs, out=np.full(len(weights), np.nan), where=pairs > 0))
    mean: Floats = np.mean(per_class, axis=0)
    return mean


def patient_resamples(patients: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Study weights [R, N] of bootstrap samples that draw whole patients, since studies of one are not independent."""
    _, patient_of = np.unique(np.asarray(patients), return_inverse=True)
    count = int(patient_of.max()) + 1
    drawn = np.random.default_rng(seed).multinomial(count, np.full(count, 1 / count), size=resamples)
    weights: Floats = drawn[:, patient_of].astype(np.float64)
    return weights


def _average_precision(probabilities: Tensor, targets: Tensor) -> Tensor:
    classes = probabilities.shape[1]
    if classes == 2:
        return binary_average_precision(probabilities[:, 1], targets)
    return multiclass_average_precision(probabilities, targets, num_classes=classes, average="macro")


def _f1(probabilities: Tensor, targets: Tensor) -> Tensor:
    classes = probabilities.shape[1]
    if classes == 2:
        return binary_f1_score(probabilities[:, 1], targets)
    return multiclass_f1_score(probabilities, targets, num_classes=classes, average="macro")


def _accuracy(probabilities: Tensor, targets: Tensor) -> Tensor:
    return multiclass_accuracy(probabilities, targets, num_classes=probabilities.shape[1], average="micro")


def _calibration_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    return multiclass_calibration_error(probabilities, targets, num_classes=probabilities.shape[1], n_bins=10)


_POINT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auprc": _average_precision, "f1": _f1, "accuracy": _accuracy, "ece": _calibration_error,
}
