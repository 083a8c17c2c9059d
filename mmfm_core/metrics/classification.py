"""Metrics of multi-label classification: several findings per study, each labelled in some of the studies."""

import numpy as np
from numpy.typing import NDArray

from mmfm_core.metrics.binary import average_precision, calibration_error, f1
from mmfm_core.metrics.ranking import Floats, Patients, auroc, undefined
from mmfm_core.metrics.statistic import Statistic, macro


def measurable(probabilities: Floats, targets: Floats, patients: Patients) -> list[int]:
    """Findings with enough patients of either class (`ranking.MIN_OF_CLASS`) to be measured.

    None at all where a model gives a probability that is not finite: what it gives besides is no measurement of it.

    Args:
        probabilities: [N, F], of each finding being present.
        targets: [N, F], 0 or 1, NaN where a study is not labelled for a finding.
        patients: [N], whose each study is.
    """
    if not np.isfinite(probabilities).all():
        return []
    return [
        finding
        for finding, labels in enumerate(targets.T)
        if not undefined(_labels(labels), 2, patients[np.isfinite(labels)])
    ]


def mean_of_findings(metric: str, probabilities: Floats, targets: Floats, patients: Patients) -> Statistic | None:
    """Mean of a metric over the measurable findings, each over its labelled studies; None where there is none.

    Args:
        metric: auroc, auprc, f1 (at probability 0.5) or ece (expected calibration error, of the finding's probability).
        probabilities: [N, F], of each finding being present.
        targets: [N, F], 0 or 1, NaN where a study is not labelled for a finding.
        patients: [N], whose each study is.

    Source of auroc: Hanley and McNeil, Radiology 143(1), 1982.
    """
    findings = [
        _of_labelled(metric, probabilities[:, finding], targets[:, finding])
        for finding in measurable(probabilities, targets, patients)
    ]
    return macro(findings) if findings else None


def _of_labelled(metric: str, probabilities: Floats, targets: Floats) -> Statistic:
    labelled = np.isfinite(targets)
    statistic = _of(metric, probabilities[labelled], _labels(targets))
    return lambda weights: statistic(weights[:, labelled])


def _of(metric: str, probabilities: Floats, labels: NDArray[np.int64]) -> Statistic:
    match metric:
        case "auroc":
            scores = np.stack([1 - probabilities, probabilities], axis=1)
            return lambda weights: auroc(scores, labels, weights)
        case "auprc":
            return average_precision(probabilities, labels == 1)
        case "f1":
            return f1(probabilities > 0.5, labels == 1)
    return calibration_error(probabilities, labels == 1)


def _labels(targets: Floats) -> NDArray[np.int64]:
    return targets[np.isfinite(targets)].astype(np.int64)
