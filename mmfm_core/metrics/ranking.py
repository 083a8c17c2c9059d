"""The AUROC and its bootstrap over patients, in numpy alone, so that a report needs no torch."""

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

MIN_OF_CLASS = 5
"""Below this many patients of a class, or of all others, ranking metrics are undefined: a handful decides them."""

RESAMPLES = 1000

Floats = NDArray[np.float64]
Patients = NDArray[np.int64]
"""The number of each study's patient."""


def undefined(targets: NDArray[np.int64], classes: int, patients: Patients) -> bool:
    """Whether some class, or all others together, has fewer than `MIN_OF_CLASS` patients among the studies' [N]."""
    return any(
        len(np.unique(patients[of_class])) < MIN_OF_CLASS
        for label in range(classes)
        for of_class in (targets == label, targets != label)
    )


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


def interval(values: Floats) -> tuple[float, float, float]:
    """Value, low and high (95 %, percentile bootstrap) of a statistic: on all studies first, then on its resamples."""
    low, high = np.nanquantile(values[1:], [0.025, 0.975])
    return float(values[0]), float(low), float(high)
