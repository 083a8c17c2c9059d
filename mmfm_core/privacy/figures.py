"""Figures of test patients that leave with noise: the Gaussian mechanism on counts, and what follows from them.

Whatever is computed from noised counts costs nothing more (post-processing; Dwork & Roth 2014, proposition 2.1), so
that a value and its interval are one release. Only of the shared model: this noise covers the patients who are
measured; those whom the model was trained on are covered by that of its steps, which an adapted model does not have.
"""

import math

import numpy as np
import pandas as pd

from mmfm_core.config import Federation
from mmfm_core.metrics.binned import BINS, binned_auroc, counted
from mmfm_core.metrics.ranking import RESAMPLES, Floats, interval
from mmfm_core.metrics.statistic import known
from mmfm_core.privacy.randomness import gaussian
from mmfm_core.protocol import Metric


def scale_of(federation: Federation) -> float:
    """The standard deviation of the noise on each count, in patients.

    A patient more or less moves the counts of one label by a vector whose length is 1 at most, and so those of all
    labels of all heads by the root of their number. That number is the document's: it says nothing of patients.
    """
    assert federation.privacy
    labels = sum(len(federation.model.heads[name].ranked) for name in federation.noised_heads)
    return federation.privacy.figure_noise * math.sqrt(labels)


def noised_metrics(head: str, table: pd.DataFrame, federation: Federation) -> list[Metric]:
    """The figures of one head of the shared model on test patients, with noise; none where it has none to tell so.

    `table` has a row per study: its 'patient', and what the head predicts.

    The caller has paid: `mmfm_core.privacy.accounting.figures_of`.
    """
    if head not in federation.noised_heads:
        return []
    scale = scale_of(federation)
    _, patients = np.unique(table["patient"], return_inverse=True)
    rankings = federation.model.heads[head].rankings(table)
    counts = np.stack([counted(ranking, patients) for ranking in rankings])
    counts += scale * gaussian(counts.size).reshape(counts.shape)
    value, low, high = (known(figure) for figure in auroc_of(counts, scale))
    return [Metric(head, "shared", "test", "auroc", value, len(table), low, high, noised=True)]


def auroc_of(counts: Floats, scale: float) -> tuple[float, float, float]:
    """The mean AUROC of noised counts [labels, 2 * BINS], and its 95 % interval; NaN where it is undefined.

    The interval is by parametric bootstrap: patients fall into bins by chance, each count with a variance of itself
    (Poisson), and the noise has another, which is known.
    """
    deviation = np.sqrt(np.clip(counts, 0, None) + scale**2)
    drawn = np.random.default_rng(0).standard_normal((RESAMPLES, len(counts), 2 * BINS))
    samples = np.concatenate([counts[None], counts + deviation * drawn])
    each = np.stack([binned_auroc(samples[:, label]) for label in range(len(counts))])
    defined = np.isfinite(each[:, 0])
    if not defined.any():
        return math.nan, math.nan, math.nan
    of_defined = each[defined]
    return interval(np.where(np.isfinite(of_defined), of_defined, of_defined[:, :1]).mean(0))
