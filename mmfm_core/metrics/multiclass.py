"""Metrics of classification into one class out of several."""

import numpy as np
from numpy.typing import NDArray

from mmfm_core.metrics.binary import average_precision, calibration_error, f1
from mmfm_core.metrics.ranking import Floats, Patients, auroc, undefined
from mmfm_core.metrics.statistic import Statistic, macro, mean_of


def one_of_several(
    metric: str, probabilities: Floats, targets: NDArray[np.int64], patients: Patients
) -> Statistic | None:
    """One metric of `probabilities` [N, classes] against `targets` [N], of studies of `patients` [N].

    With two classes the second is the positive one; with more, classes are averaged with equal weight. Nothing is
    defined on no study, or where a model gives no finite probabilities; ranking needs a few patients of every class.
    Confidence, for `ece`, is the probability of the likeliest class.
    """
    classes = probabilities.shape[1]
    unranked = metric in ("auroc", "auprc") and undefined(targets, classes, patients)
    if not len(targets) or not np.isfinite(probabilities).all() or unranked:
        return None
    chosen, positive = probabilities.argmax(1), [1] if classes == 2 else range(classes)
    match metric:
        case "auroc":
            return lambda weights: auroc(probabilities, targets, weights)
        case "auprc":
            return macro([average_precision(probabilities[:, label], targets == label) for label in positive])
        case "f1":
            return macro([f1(chosen == label, targets == label) for label in positive])
        case "ece":
            return calibration_error(probabilities.max(1), chosen == targets)
    return mean_of((chosen == targets).astype(float))
