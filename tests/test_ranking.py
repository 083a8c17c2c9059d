"""Metrics, against scikit-learn and brute force."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import accuracy_score, average_precision_score, f1_score, roc_auc_score

from mmfm_core.metrics.multiclass import one_of_several
from mmfm_core.metrics.ranking import MIN_OF_CLASS, auroc, interval, patient_resamples, undefined


@given(st.integers(0, 2**32 - 1), st.booleans())
def test_auroc_equals_scikit_learn_with_weights_and_ties(seed, ties):
    rng = np.random.default_rng(seed)
    targets = np.concatenate([[0, 1], rng.integers(0, 2, 30)])
    scores = rng.integers(0, 4, 32) / 4 if ties else rng.random(32)
    weights = rng.integers(0, 4, (3, 32)).astype(float)
    weights[:, :2] += 1  # some of either class
    found = auroc(np.stack([1 - scores, scores], 1), targets, weights)
    expected = [roc_auc_score(targets, scores, sample_weight=row) for row in weights]
    np.testing.assert_allclose(found, expected, atol=1e-12)


@given(st.integers(0, 2**32 - 1))
def test_auroc_of_several_classes_is_the_mean_of_one_against_the_rest(seed):
    rng = np.random.default_rng(seed)
    targets = np.concatenate([[0, 1, 2], rng.integers(0, 3, 40)])
    scores = rng.dirichlet(np.ones(3), 43)
    found = auroc(scores, targets, np.ones((1, 43)))
    assert found[0] == pytest.approx(roc_auc_score(targets, scores, multi_class="ovr", average="macro"), abs=1e-12)


def test_resamples_draw_whole_patients():
    patients = ["a", "b", "a", "c", "c", "c"]
    weights = patient_resamples(patients, resamples=2000)
    assert (weights[:, 0] == weights[:, 2]).all()
    assert (weights[:, 3:] == weights[:, 3:4]).all()
    assert (weights[:, [0, 1, 3]].sum(1) == 3).all()
    # Drawing 3 of 3 patients with replacement: each is drawn once on average, with variance 3 * 1/3 * 2/3.
    np.testing.assert_allclose(weights[:, [0, 1, 3]].mean(0), 1, atol=0.06)
    np.testing.assert_allclose(weights[:, [0, 1, 3]].var(0), 2 / 3, atol=0.08)


def test_the_interval_is_that_of_drawing_patients_one_by_one():
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 2, 60)
    scores = np.clip(0.3 * targets + 0.7 * rng.random(60), 0, 1)
    patients = np.array([f"p{i // 2}" for i in range(60)])
    weights = np.vstack([np.ones(60), patient_resamples(patients.tolist())])
    value, low, high = interval(auroc(np.stack([1 - scores, scores], 1), targets, weights))
    by_hand = []
    for _ in range(2000):
        drawn = np.concatenate([np.flatnonzero(patients == p) for p in rng.choice(np.unique(patients), 30)])
        by_hand.append(roc_auc_score(targets[drawn], scores[drawn]))
    assert value == pytest.approx(roc_auc_score(targets, scores))
    assert (low, high) == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.02)


def value_of(metric: str, probabilities: torch.Tensor, targets: torch.Tensor) -> float | None:
    found = one_of_several(metric, probabilities.numpy(), targets.numpy(), np.arange(len(targets)))
    return None if found is None else float(found(np.ones((1, len(targets))))[0])


def test_ranking_metrics_are_undefined_below_five_of_a_class():
    few = torch.tensor([0] * 20 + [1] * (MIN_OF_CLASS - 1))
    enough = torch.tensor([0] * 20 + [1] * MIN_OF_CLASS)
    for metric in ("auroc", "auprc"):
        for targets, defined in ((few, False), (enough, True)):
            scores = torch.rand(len(targets), 2, generator=torch.Generator().manual_seed(0)).softmax(1)
            assert (value_of(metric, scores, targets) is not None) == defined
    assert undefined(np.zeros(30, np.int64), 2, np.arange(30))
    of_patients = enough.numpy(), 2
    assert not undefined(*of_patients, np.arange(25) % 24)  # two studies of one patient, in either class
    assert undefined(*of_patients, np.r_[:20, 20, 21, 22, 23, 23])  # five ill studies of four patients
    assert value_of("accuracy", torch.empty(0, 2), torch.empty(0, dtype=torch.long)) is None


@pytest.mark.parametrize("metric", ["auroc", "auprc", "f1", "accuracy", "ece"])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_nothing_is_measured_on_what_is_no_probability(metric, wrong):
    targets = torch.tensor([0, 1] * 10)
    probabilities = torch.rand(20, 2, generator=torch.Generator().manual_seed(0)).softmax(1)
    assert value_of(metric, probabilities, targets) is not None
    probabilities[7, 1] = wrong
    assert value_of(metric, probabilities, targets) is None


def test_a_certain_prediction_has_its_place_among_the_bins_of_calibration():
    probabilities = torch.tensor([[0.0, 1.0]] * 3 + [[1.0, 0.0]])
    value = value_of("ece", probabilities, torch.tensor([1, 1, 0, 0]))
    assert value == pytest.approx(0.25)  # always certain, right three times out of four


@pytest.mark.parametrize("classes", [2, 3])
def test_metrics_equal_scikit_learn(classes):
    generator = torch.Generator().manual_seed(classes)
    targets = torch.randint(0, classes, (80,), generator=generator)
    probabilities = torch.randn(80, classes, generator=generator).softmax(1).double()
    chosen, one_hot = probabilities.argmax(1).numpy(), np.eye(classes)[targets]
    precision = (
        average_precision_score(targets, probabilities[:, 1])
        if classes == 2
        else average_precision_score(one_hot, probabilities, average="macro")
    )
    kind = "binary" if classes == 2 else "macro"
    confidence, right = probabilities.max(1).values.numpy(), chosen == targets.numpy()
    bins = np.clip(np.ceil(confidence * 10) - 1, 0, 9)
    error = sum(
        (bins == b).mean() * abs(right[bins == b].mean() - confidence[bins == b].mean()) for b in np.unique(bins)
    )
    expected = {
        "auprc": precision,
        "f1": f1_score(targets, chosen, average=kind),
        "accuracy": accuracy_score(targets, chosen),
        "ece": error,
    }
    for metric, value in expected.items():
        assert value_of(metric, probabilities, targets) == pytest.approx(value), metric
