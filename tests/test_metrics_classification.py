"""Multi-label findings, against torchmetrics and scikit-learn."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score

from mmfm_core.metrics.classification import mean_of_findings, measurable
from mmfm_core.metrics.ranking import MIN_OF_CLASS
from mmfm_core.models import _torchvision_ops  # noqa: F401

from torchmetrics.functional.classification import multilabel_auroc  # isort: skip

ONES = np.ones((1, 60))
EACH = np.arange(60)  # a patient

pytestmark = pytest.mark.filterwarnings("error")


def random_findings(seed, studies=60, findings=4, unlabelled=0.3):
    rng = np.random.default_rng(seed)
    targets = rng.integers(0, 2, (studies, findings)).astype(float)
    probabilities = 0.15 * targets + rng.integers(0, 9, targets.shape) / 10 + 0.03  # ties, on no bin's edge
    targets[rng.random(targets.shape) < unlabelled] = np.nan
    targets[: 2 * MIN_OF_CLASS] = (np.arange(2 * MIN_OF_CLASS) % 2)[:, None]  # enough of either class
    return probabilities, targets


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_macro_auroc_is_that_of_torchmetrics(seed):
    probabilities, targets = random_findings(seed)
    statistic = mean_of_findings("auroc", probabilities, targets, EACH)
    expected = multilabel_auroc(
        torch.from_numpy(probabilities), torch.from_numpy(np.nan_to_num(targets, nan=-1)).long(), 4, ignore_index=-1
    )
    assert statistic(np.ones((1, 60)))[0] == pytest.approx(float(expected), abs=1e-6)


@given(st.integers(0, 2**32 - 1))
def test_weights_weigh_the_studies_of_every_finding(seed):
    probabilities, targets = random_findings(seed)
    weights = np.random.default_rng(seed).integers(0, 3, 60).astype(float)
    weights[:2] = 1
    expected = []
    for scores, truth in zip(probabilities.T, targets.T, strict=True):
        labelled = np.isfinite(truth)
        expected.append(roc_auc_score(truth[labelled], scores[labelled], sample_weight=weights[labelled]))
    assert mean_of_findings("auroc", probabilities, targets, EACH)(weights[None])[0] == pytest.approx(np.mean(expected))


def test_values_are_means_over_findings_of_their_labelled_studies():
    probabilities, targets = random_findings(0)
    expected = {"auprc": [], "f1": [], "ece": []}
    for scores, truth in zip(probabilities.T, targets.T, strict=True):
        shown, true = scores[np.isfinite(truth)], truth[np.isfinite(truth)]
        expected["auprc"].append(average_precision_score(true, shown))
        expected["f1"].append(f1_score(true, shown > 0.5))
        bins = np.minimum((shown * 10).astype(int), 9)
        gaps = [abs(shown[bins == b].mean() - true[bins == b].mean()) * (bins == b).mean() for b in np.unique(bins)]
        expected["ece"].append(sum(gaps))
    for metric, values in expected.items():
        assert mean_of_findings(metric, probabilities, targets, EACH)(ONES)[0] == pytest.approx(np.mean(values)), metric


def test_a_finding_with_a_handful_of_a_class_is_left_out():
    probabilities, targets = random_findings(1)
    few = np.full((60, 1), 0.0)
    few[: MIN_OF_CLASS - 1] = 1
    few[40:] = np.nan
    wider, wrong = np.hstack([targets, few, 1 - few]), np.full((60, 2), 0.5)
    wrong[0] = 0
    both = np.hstack([probabilities, wrong])
    assert measurable(both, wider, EACH) == [0, 1, 2, 3]
    assert mean_of_findings("auroc", both, wider, EACH)(ONES) == mean_of_findings(
        "auroc", probabilities, targets, EACH
    )(ONES)
    assert mean_of_findings("f1", both, wider, EACH)(ONES) == mean_of_findings("f1", probabilities, targets, EACH)(ONES)
    few[MIN_OF_CLASS - 1] = 1
    assert measurable(both, np.hstack([targets, few, 1 - few]), EACH) == [0, 1, 2, 3, 4, 5]


def test_without_a_measurable_finding_there_is_no_value():
    probabilities, targets = random_findings(2)
    nowhere = np.full_like(targets, np.nan)
    assert mean_of_findings("auroc", probabilities, nowhere, EACH) is None
    assert mean_of_findings("ece", probabilities, nowhere, EACH) is None


def test_a_model_that_gives_no_finite_probability_has_no_value():
    probabilities, targets = random_findings(3)
    probabilities[7, 2] = np.nan
    assert mean_of_findings("auroc", probabilities, targets, EACH) is None
    assert mean_of_findings("auprc", probabilities, targets, EACH) is None
