"""A metric as a function of study weights, in numpy alone, so that a report needs no torch.

One function then gives the value (all weights one), its interval (weights of patients drawn again) and a paired
comparison of two methods (`lambda weights: a(weights) - b(weights)`: both see the same patients in every draw).
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

from mmfm_core.metrics.ranking import RESAMPLES, Floats, interval, patient_resamples

Statistic = Callable[[Floats], Floats]
"""From study weights [R, N], non-negative, to values [R]: NaN where undefined at a row's weights."""

UNDEFINED = (float("nan"), float("nan"), float("nan"))


def ratio_of(numerator: Floats, denominator: Floats) -> Statistic:
    """Weighted sum over weighted sum of two quantities [N], over the studies where both are finite."""
    finite = np.isfinite(numerator) & np.isfinite(denominator)
    above, below = numerator[finite], denominator[finite]

    def statistic(weights: Floats) -> Floats:
        return quotient(weights[:, finite] @ above, weights[:, finite] @ below)

    return statistic


def mean_of(per_study: Floats) -> Statistic:
    """Weighted mean of a quantity [N] over the studies where it is finite."""
    return ratio_of(per_study, np.ones(len(per_study)))


def macro(statistics: Sequence[Statistic]) -> Statistic:
    """Mean of several statistics (one per class, say), at each row of weights over those that are defined there."""

    def statistic(weights: Floats) -> Floats:
        values = np.array([one(weights) for one in statistics]).reshape(len(statistics), len(weights))
        defined = np.isfinite(values)
        return quotient(np.where(defined, values, 0).sum(0), defined.sum(0).astype(float))

    return statistic


def bootstrap(
    statistic: Statistic, patients: Sequence[str], resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float, float]:
    """Value, low and high (95 %, percentile bootstrap over patients) of a statistic; NaN where undefined.

    Args:
        statistic: of N studies.
        patients: [N], the patient of each study; studies of one patient are drawn together.
        resamples: draws; those on which the statistic is undefined are left out of the interval.
        seed: of the draws; the same for every statistic that is to be compared.

    Source: Efron and Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13.
    """
    return estimate(statistic, draws(patients, resamples, seed))


def draws(patients: Sequence[str], resamples: int = RESAMPLES, seed: int = 0) -> Floats:
    """Study weights [1 + R, N], all one first: what `bootstrap` draws, for who estimates several statistics.

    Of a single patient nothing is drawn: an interval of no width would claim to know all others.
    """
    drawn = [patient_resamples(patients, resamples, seed)] if len(set(patients)) > 1 else []
    return np.vstack([np.ones((1, len(patients))), *drawn])


def estimate(statistic: Statistic, weights: Floats) -> tuple[float, float, float]:
    """See `bootstrap`, at weights that `draws` gave."""
    if not weights.shape[1]:
        return UNDEFINED
    values = statistic(weights)
    if not np.isfinite(values[1:]).any():
        return float(values[0]), *UNDEFINED[1:]
    return interval(values)


def known(figure: float) -> float | None:
    """A figure, None where it is undefined (NaN)."""
    return None if math.isnan(figure) else figure


def quotient(above: Floats, below: Floats) -> Floats:
    """Quotient of two arrays of one shape; NaN where the divisor is zero."""
    result: Floats = np.divide(above, below, out=np.full(below.shape, np.nan), where=below != 0)
    return result
