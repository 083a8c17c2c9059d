"""LiRA and gradient inversion: that they work without privacy, and what is left of them with it."""

import json
from pathlib import Path

import numpy as np
import pytest
import typer
from click.testing import Result
from scipy.stats import norm
from sklearn.metrics import roc_auc_score
from test_audit_one_run import NOISE, STEPS, federation
from typer.testing import CliRunner

import mmfm_core.privacy.step
from mmfm_core.config.loading import dump
from mmfm_core.privacy.accounting import Charge
from mmfm_core.privacy.audit import inversion, membership
from mmfm_core.privacy.step import Mechanism
from server.commands import audit

MODELS = 16
EACH = membership.PATIENTS // 2
PRIVATE = Mechanism(noise=NOISE, max_norm=1.0, rate=1.0, patients=EACH)
CAP = norm.cdf(STEPS**0.5 / NOISE / 2**0.5)


@pytest.mark.parametrize(("noise", "steps"), [(16, 60), (4, 60), (10, 200)])
def test_what_an_attack_may_find_is_the_closed_form_where_everybody_is_in_every_step(noise: float, steps: int) -> None:
    mu = steps**0.5 / noise
    most = membership.allowed(Charge(noise, 1.0, steps))
    assert 0 <= most.area - norm.cdf(mu / 2**0.5) < 0.001
    assert 0 <= most.found - norm.cdf(mu + norm.ppf(0.01)) < 0.002


def test_sampling_lowers_what_an_attack_may_find_but_not_below_what_one_does() -> None:
    """One step, in which a patient is with a chance of a fifth: the best attack on that looks at the one number."""
    most = membership.allowed(Charge(1.0, 0.2, 1))
    rng = np.random.default_rng(0)
    without = rng.normal(size=100_000)
    within = rng.normal(size=100_000) + (rng.random(100_000) < 0.2)
    found = roc_auc_score(np.repeat([0, 1], 100_000), np.concatenate([without, within]))
    assert found - 0.005 < most.area < membership.allowed(Charge(1.0, 1.0, 1)).area


def test_the_area_is_that_of_scikit_learn() -> None:
    rng = np.random.default_rng(3)
    scores, coins = rng.normal(size=300).round(1), rng.random(300) < 0.4
    assert membership.curve_area(scores, coins) == pytest.approx(roc_auc_score(coins, scores))


def test_no_ratio_depends_on_the_coin_that_it_is_to_tell() -> None:
    """Of one model and patient: the mean over the others does not know whether it was there."""
    rng = np.random.default_rng(4)
    areas = []
    for _ in range(20):
        sure, coins = rng.normal(size=(8, 200)), rng.random((8, 200)) < 0.5
        areas.append(membership.curve_area(membership.likelihood_ratios(sure, coins).ravel(), coins.ravel()))
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * np.std(areas) / 20**0.5)


def test_members_are_told_without_privacy_and_with_it_no_better_than_theory_allows() -> None:
    plain = membership.attack(STEPS, None, MODELS)
    assert plain.area - 3 * plain.error > CAP, "an attack that finds less could not break the promise either"
    private = membership.attack(STEPS, PRIVATE, MODELS)
    assert private.area <= CAP + 3 * private.error
    assert private.area + 3 * private.error < plain.area


def test_membership_inference_finds_noise_that_is_too_weak(monkeypatch: pytest.MonkeyPatch) -> None:
    sound = mmfm_core.privacy.step.gaussian
    monkeypatch.setattr(mmfm_core.privacy.step, "gaussian", lambda size: sound(size) / 10)
    weak = membership.attack(STEPS, PRIVATE, MODELS)
    assert weak.area - 3 * weak.error > CAP


def test_an_image_is_read_out_of_a_message_unless_there_is_noise() -> None:
    plain = inversion.attack(None)
    clipped = inversion.attack(Mechanism(noise=0.0, max_norm=0.1, rate=1.0, patients=1))
    noised = inversion.attack(Mechanism(noise=1.0, max_norm=0.1, rate=1.0, patients=1))
    assert plain.found > 60
    assert clipped.found > 60, "clipping alone hides nothing"
    assert noised.found < noised.guess + 1
    assert noised.found < inversion.RECOGNISED / 2


def command(*words: str | Path) -> Result:
    """`mmfm audit` in this process, where code can be broken."""
    app = typer.Typer()
    app.command()(audit)
    return CliRunner().invoke(app, [str(word) for word in words], env={"COLUMNS": "200"})


def test_the_command_says_what_attacks_find_and_fails_where_the_promise_is_broken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    document, out = tmp_path / "private.yaml", tmp_path / "audit.json"
    document.write_text(dump(federation()))
    words = (document, "--canaries", 400, "--models", 4, "--json", out)
    ran = command(*words)
    assert ran.exit_code == 0, ran.output
    one_run, lira, image = (finding["figures"] for finding in json.loads(out.read_text())["findings"])
    assert 0 <= one_run["lower_epsilon"] < one_run["promised_epsilon"] == pytest.approx(2.09, abs=0.005)
    assert lira["auc_allowed"] == pytest.approx(CAP, abs=0.001)
    assert image["psnr"] < image["psnr_of_a_guess"] + 1
    assert json.loads(out.read_text())["sound"] is True

    honest = mmfm_core.privacy.step.gaussian
    monkeypatch.setattr(mmfm_core.privacy.step, "gaussian", lambda size: honest(size) / 10)
    ran = command(*words)
    assert ran.exit_code == 1, ran.output
    assert "BROKEN" in ran.output
    assert json.loads(out.read_text())["sound"] is False


def test_without_privacy_the_command_says_what_is_open_to_everybody(tmp_path: Path) -> None:
    document = tmp_path / "plain.yaml"
    document.write_text(dump(federation().model_copy(update={"privacy": None})))
    ran = command(document, "--canaries", 200, "--models", 4)
    assert ran.exit_code == 0, ran.output
    assert "can be read out of a message" in ran.output
    assert "has no 'privacy'" in ran.output
