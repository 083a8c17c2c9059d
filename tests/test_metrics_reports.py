"""Metrics of reports, against torchmetrics on the whole corpus, scikit-learn and subsequences searched one by one."""

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mmfm_core.metrics.binary import f1
from mmfm_core.metrics.reports import bleu4, bleu_counts, distinct, macro_f1, rouge_l
from mmfm_core.models import _torchvision_ops  # noqa: F401

from torchmetrics.text import BLEUScore  # isort: skip

pytestmark = pytest.mark.filterwarnings("error")

WORDS = st.lists(st.sampled_from(["no", "acute", "disease", "the", "heart", "is", "normal"]), max_size=12)
REPORTS = st.lists(st.tuples(WORDS.map(" ".join), WORDS.map(" ".join)), min_size=1, max_size=6)


def corpus_bleu(generated, references):
    metric = BLEUScore()
    metric.update(generated, [[reference] for reference in references])
    return float(metric.compute())


@settings(max_examples=60, deadline=None)
@given(REPORTS, st.data())
def test_bleu_of_weights_is_that_of_a_corpus_written_out(pairs, data):
    counted = st.lists(st.integers(0, 3), min_size=len(pairs), max_size=len(pairs))
    weights = data.draw(counted.filter(lambda row: any(w and pairs[i][1] for i, w in enumerate(row))))
    again = [pair for pair, weight in zip(pairs, weights, strict=True) for _ in range(weight)]
    counts = bleu_counts(*map(list, zip(*pairs, strict=True)))
    found = bleu4(counts)(np.array([weights, np.ones(len(pairs))], dtype=float))
    assert found[0] == pytest.approx(corpus_bleu(*map(list, zip(*again, strict=True))), rel=1e-4)
    assert found[1] == pytest.approx(corpus_bleu(*map(list, zip(*pairs, strict=True))), rel=1e-4)


def test_bleu_worked_by_hand():
    # Of 5, 4, 3 and 2 n-grams 5, 3, 2 and 1 are in the reference, which is two words longer.
    counts = bleu_counts(["a b c d a"], ["a b c d e a f"])
    expected = np.exp(1 - 7 / 5) * (5 / 5 * 3 / 4 * 2 / 3 * 1 / 2) ** 0.25
    assert bleu4(counts)(np.ones((1, 1)))[0] == pytest.approx(expected)
    assert np.isnan(bleu4(counts)(np.zeros((1, 1)))).all()
    assert bleu4(bleu_counts([""], ["a b c d"]))(np.ones((1, 1))) == [0]


def longest_common(one, other):
    def subsequences(words):
        return {tuple(chosen) for count in range(len(words) + 1) for chosen in combinations(words, count)}

    return max(map(len, subsequences(one) & subsequences(other)))


@settings(max_examples=40, deadline=None)
@given(st.lists(st.tuples(WORDS.map(lambda w: w[:7]), WORDS.map(lambda w: w[:7])), min_size=1, max_size=4))
def test_rouge_l_is_the_f1_of_the_longest_common_subsequence(pairs):
    found = rouge_l([" ".join(one).title() + "." for one, _ in pairs], [", ".join(other) for _, other in pairs])
    longest = np.array([longest_common(*pair) for pair in pairs])
    expected = 2 * longest / np.array([max(len(one) + len(other), 1) for one, other in pairs])
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_repeated_reports_are_not_distinct():
    assert distinct(["No disease.", "no disease .", "No  disease. ", "Effusion."]) == 0.75
    assert np.isnan(distinct([]))


@given(st.integers(0, 2**32 - 1))
def test_finding_f1_is_that_of_scikit_learn(seed):
    rng = np.random.default_rng(seed)
    stated, true = rng.random((2, 12, 5)) < rng.random(5)
    weights = rng.integers(0, 3, (3, 12)).astype(float)
    weights[:, 0], stated[0, 0], true[0, 0] = 1, True, True  # one finding at least
    for average, statistic in (("micro", f1), ("macro", macro_f1)):
        settings_of = {"average": average, "zero_division": np.nan}
        expected = [f1_score(true, stated, sample_weight=row, **settings_of) for row in weights]
        np.testing.assert_allclose(statistic(stated, true)(weights), expected)


def test_findings_that_nobody_states_have_no_f1():
    nothing = np.zeros((3, 2), dtype=bool)
    assert np.isnan(f1(nothing, nothing)(np.ones((1, 3)))).all()
    assert np.isnan(macro_f1(nothing, nothing)(np.ones((1, 3)))).all()
