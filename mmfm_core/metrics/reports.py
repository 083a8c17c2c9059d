"""Metrics of generated reports: the words by BLEU-4 and ROUGE-L, the medicine by the findings that they state."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mmfm_core.metrics.binary import Bools, f1
from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, macro, quotient
from mmfm_core.models import _torchvision_ops  # noqa: F401  (torchmetrics imports torchvision)

from torchmetrics.functional.text import rouge_score  # isort: skip
from torchmetrics.text import BLEUScore  # isort: skip


@dataclass(frozen=True)
class BleuCounts:
    """What BLEU-4 counts in each of N reports; their sums over a corpus are all that its BLEU-4 needs."""

    matches: Floats  # [N, 4]: n-grams of one to four words that the reference has too
    totals: Floats  # [N, 4]: n-grams generated
    lengths: Floats  # [N]: words generated
    reference_lengths: Floats  # [N]: words of the reference


def bleu_counts(generated: Sequence[str], references: Sequence[str]) -> BleuCounts:
    """Count the n-grams of N reports against one reference each, through torchmetrics; words end at white space."""
    states = []
    for report, reference in zip(generated, references, strict=True):
        metric = BLEUScore(n_gram=4)
        metric.update([report], [[reference]])
        states.append(metric.metric_state)
    return BleuCounts(
        matches=np.array([state["numerator"].numpy() for state in states], np.float64).reshape(-1, 4),
        totals=np.array([state["denominator"].numpy() for state in states], np.float64).reshape(-1, 4),
        lengths=np.array([float(state["preds_len"]) for state in states]),
        reference_lengths=np.array([float(state["target_len"]) for state in states]),
    )


def bleu4(counts: BleuCounts) -> Statistic:
    """Corpus BLEU-4 without smoothing; 0 where an order has no match, NaN where no reference has a weight.

    Source: Papineni et al., BLEU, ACL 2002.
    """

    def statistic(weights: Floats) -> Floats:
        matched, lengths, references = weights @ counts.matches, weights @ counts.lengths, counts.reference_lengths
        scored = matched.min(1) > 0
        precisions = quotient(matched, weights @ counts.totals)
        means = np.exp(np.log(np.where(scored[:, None], precisions, 1)).mean(1))
        brevity = np.exp(np.minimum(1 - quotient(weights @ references, np.where(scored, lengths, 1)), 0))
        return np.where(weights @ references > 0, np.where(scored, brevity * means, 0), np.nan)

    return statistic


def rouge_l(generated: Sequence[str], references: Sequence[str]) -> Floats:
    """ROUGE-L F1 [N] of each report, through torchmetrics: lower-case letters and digits alone count as words.

    Source: Lin, ROUGE, ACL workshop 2004: the longest common subsequence of words.
    """
    scores = [
        float(rouge_score(report, reference, rouge_keys="rougeL")["rougeL_fmeasure"])
        for report, reference in zip(generated, references, strict=True)
    ]
    return np.array(scores, dtype=np.float64)


def distinct(generated: Sequence[str]) -> float:
    """Share of reports that are not a repetition of another's words; NaN of none.

    No statistic: a resample repeats studies, so it has fewer distinct reports by construction.
    """
    return len({tuple(report.split()) for report in generated}) / len(generated) if generated else float("nan")


def macro_f1(stated: Bools, true: Bools) -> Statistic:
    """Mean over findings of their F1, from findings stated by the generated and true reports, [N, F].

    A finding that neither states, at a row of weights, has no F1 and is left out of that mean.
    """
    return macro([f1(stated[:, finding], true[:, finding]) for finding in range(true.shape[1])])
