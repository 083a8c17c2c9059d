"""Statistics of study weights, against numpy and a bootstrap drawn by hand."""

import subprocess
import sys
import warnings

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmfm_core.metrics.statistic import bootstrap, macro, mean_of, ratio_of


@given(st.integers(0, 2**32 - 1))
def test_a_weight_counts_a_study_that_many_times(seed):
    rng = np.random.default_rng(seed)
    above, below = rng.normal(size=9), rng.random(9) + 0.1
    above[rng.random(9) < 0.3] = np.nan
    weights = rng.integers(0, 4, (3, 9))
    weights[:, 0], above[0] = 1, 2.0  # some study that counts
    again = [np.repeat(np.arange(9), row) for row in weights]
    finite = [rows[np.isfinite(above[rows])] for rows in again]
    np.testing.assert_allclose(mean_of(above)(weights), [above[rows].mean() for rows in finite])
    np.testing.assert_allclose(ratio_of(above, below)(weights), [above[r].sum() / below[r].sum() for r in finite])


def test_without_weight_or_finite_studies_a_statistic_is_undefined():
    statistic = mean_of(np.array([1.0, np.nan, 3.0, np.inf]))
    weights = np.array([[1.0, 1, 1, 1], [0, 2, 0, 1], [0, 0, 0, 0]])
    np.testing.assert_array_equal(statistic(weights), [2, np.nan, np.nan])


def test_macro_is_the_mean_of_those_defined():
    statistic = macro([mean_of(np.array([1.0, np.nan])), mean_of(np.array([3.0, 5.0]))])
    np.testing.assert_array_equal(statistic(np.array([[1.0, 1], [0, 1], [0, 0]])), [2.5, 5, np.nan])
    np.testing.assert_array_equal(macro([])(np.ones((2, 3))), [np.nan, np.nan])


def test_the_interval_of_a_mean_is_that_of_drawing_patients_by_hand():
    rng = np.random.default_rng(0)
    patients = [f"p{i // 3}" for i in range(90)]
    values = np.repeat(rng.normal(size=30), 3) + 0.1 * rng.normal(size=90)
    value, low, high = bootstrap(mean_of(values), patients, resamples=4000)
    of_patient = values.reshape(30, 3).mean(1)
    by_hand = [of_patient[rng.integers(0, 30, 30)].mean() for _ in range(4000)]
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx(np.quantile(by_hand, [0.025, 0.975]), abs=0.03)
    # Studies drawn one by one would give an interval narrower by about the root of three.
    assert high - low > 1.5 * 2 * 1.96 * values.std() / np.sqrt(90)


def test_a_paired_difference_is_narrower_than_its_parts():
    rng = np.random.default_rng(1)
    first = rng.normal(size=60)
    second = first + 0.2 + 0.01 * rng.normal(size=60)
    one, other = mean_of(first), mean_of(second)
    value, low, high = bootstrap(lambda weights: other(weights) - one(weights), [str(i) for i in range(60)])
    assert value == pytest.approx((second - first).mean())
    assert 0.19 < low < value < high < 0.21


def test_what_is_undefined_everywhere_has_no_interval_and_no_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(bootstrap(mean_of(np.full(4, np.nan)), list("aabc"))).all()
        assert np.isnan(bootstrap(mean_of(np.zeros(0)), [])).all()


def test_one_patient_has_a_value_and_no_interval():
    value, low, high = bootstrap(mean_of(np.array([1.0, 3.0])), ["a", "a"])
    assert value == 2
    assert np.isnan([low, high]).all()


@pytest.mark.slow
def test_statistics_draw_in_no_torch():
    code = "import sys, mmfm_core.metrics.statistic; print('torch' in sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.strip() == "False"
