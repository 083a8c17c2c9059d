"""Metrics of multi-label classification: several findings per study, each labelled in some of the studies."""

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from mmfm_core.metrics.ranking import Floats, auroc, undefined
from mmfm_core.metrics.statistic import Statistic, macro
from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional.classification import (  # isort: skip
    binary_average_precision,
    binary_calibration_error,
    binary_f1_score,
)


def measurable(probabilities: Floats, targets: Floats) -> list[int]:
    """Findings with enough labelled studies of either class (`ranking.MIN_OF_CLASS`) to be measured.

    None at all where a model gives a probability that is not finite: what it gives besides is no measurement of it.

    Args:
        probabilities: [N, F], of each finding being present.
        targets: [N, F], 0 or 1, NaN where a study is not labelled for a finding.
    """
    if not np.isfinite(probabilities).all():
        return []
    return [finding for finding, of_finding in enumerate(targets.T) if not undefined(_labels(of_finding), 2)]


def macro_auroc(probabilities: Floats, targets: Floats) -> Statistic | None:
    """Mean of the AUROC of the measurable findings, each over its labelled studies; None where there is none.

    Args:
        probabilities: [N, F], of each finding being present.
        targets: [N, F], 0 or 1, NaN where a study is not labelled for a finding.

    Source: Hanley and McNeil, Radiology 143(1), 1982.
    """
    findings = [
        _auroc(probabilities[:, finding], targets[:, finding]) for finding in measurable(probabilities, targets)
    ]
    return macro(findings) if findings else None


def macro_point(metric: str, probabilities: Floats, targets: Floats) -> float | None:
    """Mean over the measurable findings of a metric without interval; None where there is no such finding.

    Args:
        metric: auprc, f1 (at probability 0.5) or ece (expected calibration error, ten bins), through torchmetrics.
        probabilities: [N, F], of each finding being present.
        targets: [N, F], 0 or 1, NaN where a study is not labelled for a finding.

    Source of ece: Guo et al., On calibration of modern neural networks, ICML 2017.
    """
    values = []
    for finding in measurable(probabilities, targets):
        labelled = np.isfinite(targets[:, finding])
        of_labelled = torch.from_numpy(probabilities[labelled, finding])
        values.append(float(_POINT[metric](of_labelled, torch.from_numpy(_labels(targets[:, finding])))))
    return float(np.mean(values)) if values else None


def _labels(targets: Floats) -> NDArray[np.int64]:
    return targets[np.isfinite(targets)].astype(np.int64)


def _auroc(probabilities: Floats, targets: Floats) -> Statistic:
    labelled = np.isfinite(targets)
    labels, positive = _labels(targets), probabilities[labelled]
    scores = np.stack([1 - positive, positive], axis=1)
    return lambda weights: auroc(scores, labels, weights[:, labelled])


def _calibration_error(probabilities: Tensor, targets: Tensor) -> Tensor:
    return binary_calibration_error(probabilities, targets, n_bins=10)


_POINT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "auprc": binary_average_precision,
    "f1": binary_f1_score,
    "ece": _calibration_error,
}
