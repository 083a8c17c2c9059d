"""The AUROC from counts of scores in bins, which can be told with noise where scores cannot. In numpy alone."""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmfm_core.metrics.ranking import MIN_OF_CLASS, Floats, auroc

EDGES = 1 / (1 + np.exp(-np.arange(-3.5, 3.75, 0.5)))
"""Between bins: half a logit wide, whatever the patients; what ties inside a bin counts half."""

BINS = len(EDGES) + 1


@dataclass(frozen=True)
class Ranking:
    """One yes-or-no question to N studies.

    Attributes:
        scores: [N], probabilities of yes.
        labels: [N], 1 for yes and 0 for no, NaN for a study that does not count.
    """

    scores: Floats
    labels: Floats


def counted(ranking: Ranking, patients: NDArray[np.int64]) -> Floats:
    """How many patients are in each bin, those labelled no and those labelled yes, [2 * BINS].

    The studies of a patient that count are equal parts of one, so that a patient more or less moves the counts by a
    vector whose length is 1 at most.

    Args:
        patients: [N], the number of each study's patient.
    """
    usable = np.isfinite(ranking.labels) & np.isfinite(ranking.scores)
    _, of, studies = np.unique(patients[usable], return_inverse=True, return_counts=True)
    cell = ranking.labels[usable].astype(int) * BINS + np.digitize(ranking.scores[usable], EDGES)
    counts: Floats = np.bincount(cell, weights=1 / studies[of], minlength=2 * BINS).astype(float)
    return counts


def binned_auroc(counts: Floats) -> Floats:
    """The area under the ROC curve of each row of counts [R, 2 * BINS]; NaN where a class has too few.

    Noise in the counts, some of which may be negative, leaves the numerator and the two factors of the denominator
    unbiased: they are products of counts of which no two are the same.
    """
    bins, labels = np.tile(np.arange(BINS), 2), np.repeat([0, 1], BINS)
    few = (counts.reshape(-1, 2, BINS).sum(2) < MIN_OF_CLASS).any(1)
    values = auroc(np.stack([-bins, bins], 1).astype(float), labels, counts)
    return np.where(few, np.nan, np.clip(values, 0, 1))
