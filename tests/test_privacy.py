"""Privacy accounting, against published figures, another library and closed forms; and the plan that is made of it."""

import math
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from command_line import hospitals, mmfm, plain
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants.analysis import rdp as opacus
from rich.console import Console
from scipy.optimize import brentq
from scipy.stats import norm
from tiny import private_federation, tiny_federation, write_sites

from mmfm_core.config.site import Release
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import ORDERS, epsilon, noise_for, schedule_of, tight_epsilon
from mmfm_core.protocol import SiteDescription
from server.coordinator import initial_state
from server.plan import show_plan
from server.privacy import RATES, Wish, choices, warnings
from server.record import read_lines
from server.survey import ask


@pytest.mark.parametrize(
    ("patients", "batch", "noise", "epochs", "delta", "published"),
    [(60_000, 150, 1.3, 15, 1e-5, 0.7242234026109595), (100_000, 100, 1.0, 30, 1e-7, 1.4154988495444845)],
)
def test_published_figures(
    patients: int, batch: int, noise: float, epochs: int, delta: float, published: float
) -> None:
    """TensorFlow Privacy, compute_dp_sgd_privacy_test.py."""
    assert epsilon(noise, batch / patients, epochs * patients // batch, delta) == pytest.approx(published, abs=1e-9)


SCHEDULES = [
    (4.0, 0.01, 10_000, 1e-5),
    (1.1, 256 / 60_000, 14_062, 1e-5),
    (0.7, 256 / 60_000, 10_546, 1e-5),
    (1.0, 0.032, 1562, 1e-4),
    (4.0, 0.256, 390, 1e-4),
    (10.0, 1.0, 200, 1e-3),
    (2.0, 0.1024, 293, 1e-5),
]


@pytest.mark.parametrize(("noise", "rate", "steps", "delta"), SCHEDULES)
def test_opacus_counts_the_same(noise: float, rate: float, steps: int, delta: float) -> None:
    orders = list(ORDERS)
    curve = opacus.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=orders)
    theirs, _ = opacus.get_privacy_spent(orders=orders, rdp=curve, delta=delta)
    assert epsilon(noise, rate, steps, delta) == pytest.approx(theirs, abs=0.01)
    assert tight_epsilon(noise, rate, steps, delta) <= epsilon(noise, rate, steps, delta)


@pytest.mark.parametrize(
    ("noise", "rate", "steps", "published"),
    [
        (4.0, 0.01, 10_000, 1.26),  # Abadi et al. 2016, section 1
        (1.3, 256 / 60_000, 15 * 60_000 // 256, 1.19),  # TensorFlow Privacy's tutorial, as is the next one
        (1.1, 256 / 60_000, 60 * 60_000 // 256, 3.01),
    ],
)
def test_older_figures_by_the_conversion_that_was_used_then(
    noise: float, rate: float, steps: int, published: float
) -> None:
    """Mironov 2017, proposition 3, at our orders: what is charged here is less, by the conversion that came later."""
    curve = opacus.compute_rdp(q=rate, noise_multiplier=noise, steps=steps, orders=list(ORDERS))
    classic = min(cost + math.log(1e5) / (order - 1) for order, cost in zip(ORDERS, curve, strict=True))
    assert classic == pytest.approx(published, abs=0.01)
    assert 0.6 * classic < epsilon(noise, rate, steps, 1e-5) < classic


@pytest.mark.parametrize(("noise", "steps", "delta"), [(1.0, 1, 1e-5), (10.0, 200, 1e-3), (20.0, 50, 1e-6)])
def test_every_patient_in_every_step_is_the_gaussian_mechanism(noise: float, steps: int, delta: float) -> None:
    """Balle & Wang 2018, theorem 8, with mu = sqrt(T) / sigma."""
    mu = math.sqrt(steps) / noise

    def excess(candidate: float) -> float:
        upper = norm.cdf(mu / 2 - candidate / mu) - math.exp(candidate) * norm.cdf(-mu / 2 - candidate / mu)
        return float(upper - delta)

    exact = brentq(excess, 1e-6, 60)
    assert tight_epsilon(noise, 1.0, steps, delta) == pytest.approx(exact, abs=0.01)
    assert epsilon(noise, 1.0, steps, delta) >= exact


def test_no_noise_protects_nobody() -> None:
    assert epsilon(0, 0.1, 10, 1e-5) == tight_epsilon(0, 0.1, 10, 1e-5) == math.inf


@given(st.floats(0.3, 20), st.sampled_from([0.01, *RATES]), st.integers(1, 3000), st.sampled_from([1e-3, 1e-5, 1e-7]))
@settings(max_examples=15, deadline=None)
def test_the_noise_for_an_epsilon_keeps_it_and_no_smaller_one_does(
    target: float, rate: float, steps: int, delta: float
) -> None:
    noise = noise_for(target, rate, steps, delta)
    assert epsilon(noise, rate, steps, delta) <= target
    assert noise <= 0.01 or epsilon(noise - 0.005, rate, steps, delta) > target


def described(folder: Path, patients: int = 24) -> list[SiteDescription]:
    sites = write_sites(folder, patients=patients)
    exact = {name: site.model_copy(update={"release": Release(min_count=1)}) for name, site in sites.items()}
    return ask(tiny_federation(), exact)


def test_noise_over_signal_is_what_a_simulation_of_both_gives(tmp_path: Path) -> None:
    """All patients pull the same way with clip norm 1; the noise of every step is drawn."""
    federation, rng = tiny_federation(), np.random.default_rng(0)
    state, sites = initial_state(federation), described(tmp_path)
    steps, size = 8, sum(tensor.size for tensor in state.values())
    for each in choices(federation, state, sites, Wish(8.0, None, 1e-5)):
        for site in sites:
            noise = np.zeros(size)
            for _ in range(steps):
                noise += rng.normal(0, each.noise, size)
            signal = steps * each.rate * site.patients["train"]
            assert each.drowned[site.site] == pytest.approx(np.linalg.norm(noise) / signal, rel=0.05)


def test_what_is_frozen_needs_no_noise(tmp_path: Path) -> None:
    sites, wish = described(tmp_path), Wish(8.0, None, 1e-5)
    whole = tiny_federation()
    frozen = tiny_federation(parameters={"frozen": ["encoders.*"]})
    of_all, of_rest = (choices(f, initial_state(f), sites, wish) for f in (whole, frozen))
    assert all(b.drowned["north"] < a.drowned["north"] for a, b in zip(of_all, of_rest, strict=True))
    assert [each.noise for each in of_all] == [each.noise for each in of_rest]


def test_a_site_that_is_too_small_is_told_so_in_words(tmp_path: Path) -> None:
    federation, sites = tiny_federation(), described(tmp_path)
    wish = Wish(8.0, None, 1e-5)
    found = choices(federation, initial_state(federation), sites, wish)
    assert any(said.startswith("north: at every rate the noise") for said in warnings(found, sites, wish))
    wish = Wish(8.0, None, 0.1)
    found = choices(federation, initial_state(federation), sites, wish)
    assert any("below one over its 12 training patients" in said for said in warnings(found, sites, wish))


@pytest.mark.parametrize(
    ("wish", "said"),
    [((None, None, 1e-5), "one of them"), ((1.0, 1.0, 1e-5), "one of them"), ((-1.0, None, 1e-5), "--epsilon"),
     ((None, math.inf, 1e-5), "--noise"), ((1.0, None, 0.0), "--delta")],
)  # fmt: skip
def test_a_wish_that_makes_no_sense_is_refused(wish: tuple[float | None, float | None, float], said: str) -> None:
    with pytest.raises(MmfmError, match=said):
        Wish(*wish)


def test_an_epsilon_that_no_noise_reaches_is_refused() -> None:
    with pytest.raises(MmfmError, match="ask for more"):
        noise_for(1e-3, 1.0, 120, 1e-5)


def test_both_questions_have_answers_that_agree(tmp_path: Path) -> None:
    federation, sites = tiny_federation(), described(tmp_path)
    state = initial_state(federation)
    asked = choices(federation, state, sites, Wish(3.0, None, 1e-5))
    for each in asked:
        (back,) = (c for c in choices(federation, state, sites, Wish(None, each.noise, 1e-5)) if c.rate == each.rate)
        assert back.epsilon == pytest.approx(each.epsilon)
        assert back.epsilon <= 3


def test_the_plan_of_a_document_without_privacy_says_so_and_what_it_would_take(tmp_path: Path) -> None:
    documents, said = hospitals(tmp_path), StringIO()
    show_plan(documents.federation, documents.sites, Console(file=said, width=160), Wish(8.0, None, 1e-5))
    assert "8 steps for ε 8, δ 1e-05" in said.getvalue()
    assert "This document has no 'privacy'" in said.getvalue()
    refused = mmfm(tmp_path, "plan", documents.federation, "--epsilon", "8", "--noise", "1")
    assert refused.returncode == 1
    assert "--epsilon and --noise: give one of them" in refused.stderr


def private(federation: dict[str, Any], sites: dict[str, Any]) -> None:
    federation.update(plain(private_federation()))
    sites["sites"]["south"]["budget"] = {"epsilon": 2}
    del sites["sites"]["healthy"]


@pytest.mark.slow
def test_a_private_run_is_planned_and_reported_with_what_a_data_protection_officer_asks(tmp_path: Path) -> None:
    """One site's budget is too small: the plan warns, the site refuses its second round, and the report says both."""
    documents = hospitals(tmp_path).amend(tmp_path, private)
    planned = mmfm(tmp_path, "plan", documents.federation)
    said = " ".join(planned.stdout.split())
    schedule = schedule_of(private_federation())
    cost = epsilon(schedule.noise, 0.5, 8, 1e-5)
    assert f"At most ε {cost:.3f} at δ 1e-05 for each patient at each site" in said
    assert f"south: all rounds would cost its patients ε {cost:.3f} at δ 1e-05, and its budget is ε 2" in said
    assert "north: all rounds" not in said
    ran = mmfm(tmp_path, "simulate", documents.federation, "--run", tmp_path / "run", "--no-baselines")
    assert ran.returncode == 1
    assert "fewer than 2 sites" in ran.stderr
    page = tmp_path / "run" / "report.html"
    mmfm(tmp_path, "report", tmp_path / "run")
    text = page.read_text()
    assert "the budget of this site is ε 2; nothing was computed" in text
    assert f"{schedule.noise:g} times that length" in text
    assert "training loss" not in (tmp_path / "run" / "metrics.jsonl").read_text()
    assert not [line for line in read_lines(tmp_path / "run" / "metrics.jsonl") if line["metric"] in ("auroc", "loss")]
