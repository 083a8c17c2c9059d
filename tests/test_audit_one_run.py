"""The one-run audit: what its bound is worth, and that it finds what would break the promise."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from scipy.special import expit
from tiny import private_federation
from torch import nn

import mmfm_core.privacy.step
import mmfm_core.training.steps
from mmfm_core.config import Federation
from mmfm_core.privacy.accounting import epsilon, tight_epsilon
from mmfm_core.privacy.audit.bound import bound, least_epsilon, p_value
from mmfm_core.privacy.audit.canaries import RECORDS
from mmfm_core.privacy.engines import ENGINES
from mmfm_core.privacy.randomness import chosen
from mmfm_core.privacy.step import Mechanism, noisy_gradients
from server.methods import apply
from server.one_run import one_run

NOISE, STEPS, DELTA = 16, 60, 1e-5
THEORY = 1.92
CANARIES = 800


def federation(parameters: Mapping[str, Any] | None = None, **privacy: Any) -> Federation:
    """Sixty steps in six rounds, everybody in each of them."""
    stage = {"name": "train", "rounds": 6, "local_steps": STEPS // 6, "tasks": {"disease": {}}}
    settings = {"epsilon": 2.5, "delta": DELTA, "noise": NOISE, "rate": 1.0, **privacy}
    return private_federation(settings, stages=[stage], parameters=parameters or {})


LOCAL_HEAD = {"local": ["heads.*"]}


def test_the_setting_costs_what_these_tests_say() -> None:
    assert tight_epsilon(NOISE, 1.0, STEPS, DELTA) == pytest.approx(THEORY, abs=0.005)


@pytest.mark.parametrize("true", [0.5, 2.0, 4.0])
def test_the_bound_holds_and_is_near_for_randomised_response(true: float) -> None:
    """Of bits that are each told rightly with the chance e^ε / (1 + e^ε), which is ε-private and no less."""
    rng = np.random.default_rng(1)
    runs, bits = 400, 1000
    right, again = np.unique(rng.binomial(bits, expit(true), runs), return_inverse=True)
    found = np.array([least_epsilon(bits, bits, int(v), 0.0, 0.05) for v in right])[again]
    wrong = (found > true).sum()
    # 5 % of 400 are 20, and their standard deviation is 4.4. Fewer, as counts of right bits are whole; not far fewer.
    assert 5 <= wrong <= 35
    error = (bits * expit(true) * expit(-true)) ** -0.5  # the standard error of the estimate log(right / wrong)
    assert true - np.median(found) < 2.5 * error


def test_the_correction_for_delta_is_that_of_the_definition() -> None:
    """By the sums as they stand in the theorem, over coins one by one."""
    from math import comb, exp

    m, r, v, eps, delta = 40, 12, 10, 0.7, 1e-3
    q = exp(eps) / (1 + exp(eps))
    pmf = [comb(r, k) * q**k * (1 - q) ** (r - k) for k in range(r + 1)]
    alpha = max(sum(pmf[v - i : v]) / i for i in range(1, v + 1))
    assert p_value(m, r, v, eps, delta) == pytest.approx(sum(pmf[v:]) + 2 * m * delta * alpha, rel=1e-12)
    assert least_epsilon(m, r, v, delta, 0.3) < least_epsilon(m, r, v, 0.0, 0.3)


def test_scores_that_tell_nothing_show_nothing_and_perfect_ones_the_most_that_can_be_seen() -> None:
    included = chosen(500, 0.5)
    assert 200 < included.sum() < 300
    noise = np.random.default_rng(2).normal(size=500)
    assert bound(noise, included, DELTA).epsilon < 0.5
    perfect = bound(included.astype(float), included, DELTA)
    assert perfect.epsilon == perfect.highest > 4


@pytest.mark.parametrize("engine", ["bookkeeping", "loop"])
def test_a_sound_federation_stays_below_its_ledger(engine: str) -> None:
    canaries = CANARIES if engine == "bookkeeping" else 100  # the loop takes them one by one
    audited = one_run(federation(engine=engine), canaries)
    assert audited.promised == pytest.approx(epsilon(NOISE, 1.0, STEPS, DELTA))
    assert audited.found.epsilon < THEORY


def test_a_local_head_that_is_trained_in_the_same_step_costs_nothing_more() -> None:
    assert one_run(federation(LOCAL_HEAD), CANARIES).found.epsilon < THEORY


@pytest.mark.parametrize("method", ["scaffold", "fedrep", "ditto"])
def test_what_a_method_adds_to_a_round_is_under_the_same_promise(method: str) -> None:
    audited = one_run(apply(method, federation(), 2), 200)
    assert audited.promised == pytest.approx(epsilon(NOISE, 1.0, STEPS, DELTA))
    assert audited.found.epsilon < THEORY


def test_without_privacy_everybody_is_found() -> None:
    audited = one_run(federation().model_copy(update={"privacy": None}), 400)
    assert audited.promised is None
    assert audited.found.correct == audited.found.guesses
    assert audited.found.epsilon == audited.found.highest > 3


def clips_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = ENGINES["bookkeeping"]
    monkeypatch.setitem(ENGINES, "bookkeeping", lambda *args: sound(*args[:-1], 5 * args[-1]))


def adds_too_little_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = mmfm_core.privacy.step.gaussian
    monkeypatch.setattr(mmfm_core.privacy.step, "gaussian", lambda size: sound(size) / 5)


def clips_each_record(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mmfm_core.training.steps, "patients_of", lambda _, rows: [[row] for row in rows])


def trains_the_local_head_without_noise(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is shared keeps its clip and its noise; only what never leaves has none."""

    def step(
        model: nn.Module,
        losses: Callable[[Any], torch.Tensor],
        dataset: Any,
        patients: Sequence[Sequence[int]],
        parameters: Mapping[str, nn.Parameter],
        mechanism: Mechanism,
        at_once: int,
    ) -> float:
        local = {name: parameter for name, parameter in parameters.items() if ".local." in name}
        shared = {name: parameter for name, parameter in parameters.items() if name not in local}
        rows = [row for rows in patients for row in rows]
        plain = torch.autograd.grad(losses(dataset.batch(rows)).mean(), list(local.values()))
        for parameter in local.values():
            parameter.requires_grad_(False)
        loss = noisy_gradients(model, losses, dataset, patients, shared, mechanism, at_once)
        for parameter, gradient in zip(local.values(), plain, strict=True):
            parameter.requires_grad_(True)
            parameter.grad = gradient
        return loss

    monkeypatch.setattr(mmfm_core.training.steps, "noisy_gradients", step)


@pytest.mark.parametrize(
    ("bug", "parameters"),
    [
        (clips_too_late, None),
        (adds_too_little_noise, None),
        (clips_each_record, None),
        (trains_the_local_head_without_noise, LOCAL_HEAD),
    ],
)
def test_the_audit_finds_what_breaks_the_promise(
    monkeypatch: pytest.MonkeyPatch, bug: Callable[[pytest.MonkeyPatch], None], parameters: Mapping[str, Any] | None
) -> None:
    bug(monkeypatch)
    audited = one_run(federation(parameters), CANARIES)
    assert audited.promised == pytest.approx(epsilon(NOISE, 1.0, STEPS, DELTA)), "the accounts know nothing of it"
    assert audited.found.epsilon > audited.promised, f"{RECORDS} studies each: {audited.found}"
