"""Metrics of classification into one class out of several."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfm_core.metrics.ranking import Floats, auroc, undefined
from mmfm_core.metrics.statistic import Statistic, mean_of
from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional.classification import (  # isort: skip
    binary_average_precision,
    binary_f1_score,
    multiclass_average_precision,
    multiclass_calibration_error,
    multiclass_f1_score,
)


def one_of_several(metric: str, probabilities: Floats, targets: NDArray[np.int64]) -> Statistic | float | None:
    """One metric of `probabilities` [N, classes] against `targets` [N].

    With two classes the second is the positive one; with more, classes are averaged with equal weight. Nothing is
    defined on no study, or where a model gives no finite probabilities; ranking needs a few studies of every class.
    """
    if not len(targets) or not np.isfinite(probabilities).all():
        return None
    if metric in ("auroc", "auprc") and undefined(targets, probabilities.shape[1]):
        return None
    if metric == "auroc":
        return lambda weights: auroc(probabilities, targets, weights)
    if metric == "accuracy":
        return mean_of((probabilities.argmax(1) == targets).astype(float))
    return float(_POINT[metric](torch.tensor(probabilities).float(), torch.tensor(targets)))


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


def _calibration_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    return multiclass_calibration_error(probabilities, targets, num_classes=probabilities.shape[1], n_bins=10)


_POINT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auprc": _average_precision,
    "f1": _f1,
    "ece": _calibration_error,
}
