"""Metrics of yes-or-no questions at weights of studies, against scikit-learn and torchmetrics."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score

from mmfm_core.metrics.binary import average_precision, calibration_error, f1
from mmfm_core.models import _torchvision_ops  # noqa: F401

from torchmetrics.functional.classification import binary_calibration_error  # isort: skip


def questions(seed):
    """Thirty answers, some of which tie and are repeated by the weights, and at least one of either kind."""
    rng = np.random.default_rng(seed)
    truth = np.concatenate([[True, False], rng.random(28) < rng.random()])
    scores = rng.integers(0, 7, 30) / 7 + 0.01  # on no bin's edge
    weights = rng.integers(0, 4, (3, 30)).astype(float)
    weights[:, :2] += 1
    return scores, truth, weights


@given(st.integers(0, 2**32 - 1))
def test_average_precision_and_f1_are_those_of_scikit_learn_at_any_weights(seed):
    scores, truth, weights = questions(seed)
    expected = [average_precision_score(truth, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(average_precision(scores, truth)(weights), expected)
    expected = [f1_score(truth, scores > 0.5, sample_weight=row) for row in weights]
    np.testing.assert_allclose(f1(scores > 0.5, truth)(weights), expected)


@given(st.integers(0, 2**32 - 1))
def test_the_calibration_error_is_that_of_torchmetrics_with_each_study_repeated(seed):
    scores, truth, weights = questions(seed)
    rows = [np.repeat(np.arange(30), row.astype(int)) for row in weights]
    expected = [
        binary_calibration_error(torch.tensor(scores[r]), torch.tensor(truth[r]).long(), n_bins=10) for r in rows
    ]
    np.testing.assert_allclose(calibration_error(scores, truth)(weights), expected, atol=1e-6)


def test_without_what_a_metric_divides_by_it_is_undefined():
    scores, truth = np.array([0.2, 0.7, 0.4]), np.array([False, True, False])
    weights = np.array([[1.0, 0, 1], [0, 0, 0]])  # no true study; no study
    assert np.isnan(average_precision(scores, truth)(weights)).all()
    assert np.isnan(f1(scores > 0.5, truth)(weights)).all()
    np.testing.assert_allclose(calibration_error(scores, truth)(weights), [(0.2 + 0.4) / 2, np.nan])


@pytest.mark.parametrize(
    "scores, expected", [([0.9, 0.8, 0.1, 0.1], 1.0), ([0.5] * 4, 0.5), ([0.2, 0.1, 0.9, 0.8], 5 / 12)]
)
def test_average_precision_by_hand(scores, expected):
    truth = np.array([True, True, False, False])
    assert average_precision(np.array(scores), truth)(np.ones((1, 4)))[0] == pytest.approx(expected)
