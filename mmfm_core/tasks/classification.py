"""Metrics of classification, with intervals by bootstrap over patients."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)
from mmfm_core.tasks.ranking import auroc, interval, patient_resamples, undefined

from torchmetrics.functional.classification import (  # isort: skip
    binary_average_precision,
    binary_f1_score,
    multiclass_accuracy,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_f1_score,
)


@dataclass(frozen=True)
class Measurement:
    """A metric's value (None where undefined) and its 95 % interval (None where it was not computed)."""

    value: float | None
    low: float | None = None
    high: float | None = None


def measure(metric: str, probabilities: Tensor, targets: Tensor, patients: Sequence[str]) -> Measurement:
    """One metric of `probabilities` [N, classes] against `targets` [N].

    With two classes the second is the positive one; with more, classes are averaged with equal weight. Nothing is
    defined on no study, or where a model gives no finite probabilities.
    """
    if not len(targets) or not probabilities.isfinite().all():
        return Measurement(None)
    if metric in ("auroc", "auprc") and undefined(targets.numpy(), probabilities.shape[1]):
        return Measurement(None)
    if metric == "auroc":
        weights = np.vstack([np.ones(len(targets)), patient_resamples(patients)])
        return Measurement(*interval(auroc(probabilities.double().numpy(), targets.numpy(), weights)))
    return Measurement(float(_POINT[metric](probabilities, targets)))


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
    "auprc": _average_precision,
    "f1": _f1,
    "accuracy": _accuracy,
    "ece": _calibration_error,
}
