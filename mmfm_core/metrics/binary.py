"""Metrics of one yes-or-no question as functions of study weights; torchmetrics and scikit-learn take one at a time."""

import numpy as np
from numpy.typing import NDArray

from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, quotient, ratio_of

BINS = 10
"""Of equal width, in which confidences are compared with outcomes."""

Bools = NDArray[np.bool_]


def average_precision(scores: Floats, truth: Bools) -> Statistic:
    """Precision at every score [N], weighted by the recall gained there; undefined where nothing is true.

    Ties are one threshold, and nothing is interpolated, as in scikit-learn and torchmetrics.
    """
    order = np.argsort(-scores, kind="stable")
    thresholds = np.flatnonzero(np.diff(scores[order], append=-np.inf))  # the last of each that tie

    def statistic(weights: Floats) -> Floats:
        found = weights[:, order].cumsum(1)[:, thresholds]
        right = (weights * truth)[:, order].cumsum(1)[:, thresholds]
        precision = np.divide(right, found, out=np.zeros_like(found), where=found > 0)
        return quotient((np.diff(right, axis=1, prepend=0) * precision).sum(1), right[:, -1])

    return statistic


def f1(decided: Bools, truth: Bools) -> Statistic:
    """Twice the right decisions over all decisions and all truths; undefined where there is neither.

    Args:
        decided: [N], or [N, F] of several questions whose answers count together (micro).
        truth: of the same shape.
    """
    decided, truth = decided.reshape(len(decided), -1), truth.reshape(len(truth), -1)
    return ratio_of(2.0 * (decided & truth).sum(1), decided.sum(1) + truth.sum(1).astype(float))


def calibration_error(confidence: Floats, truth: Bools) -> Statistic:
    """Expected calibration error: how far confidence [N] is from the share of truths, on average over ten bins.

    Source: Guo et al., On calibration of modern neural networks, ICML 2017, equation 3.
    """
    bins = np.minimum((confidence * BINS).astype(int), BINS - 1)  # certainty belongs to the last
    gaps = np.eye(BINS)[bins] * (confidence - truth)[:, None]
    return lambda weights: quotient(np.abs(weights @ gaps).sum(1), weights.sum(1))
