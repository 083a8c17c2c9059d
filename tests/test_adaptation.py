"""Adaptation takes what validation patients speak for, and does no harm where they cannot tell."""

from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tiny import prepare_run, tiny_federation, write_sites

from client.adaptation import between, nearest_within_noise
from client.agent import Agent
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.protocol import RoundReply, RoundRequest
from server.coordinator import initial_state

SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)


def losses(patients: int, gains: tuple[float, ...], noise: float, seed: int = 0) -> list[np.ndarray]:
    """Of each candidate: patients of unlike difficulty, each better by the candidate's gain and some noise."""
    rng = np.random.default_rng(seed)
    difficulty = rng.gamma(2.0, 1.0, patients)
    return [
        difficulty - gain + share * rng.normal(0, noise, patients) for gain, share in zip(gains, SHARES, strict=True)
    ]


def test_a_gain_beyond_noise_is_taken_whole_and_one_within_noise_is_not() -> None:
    gains = (0.0, 0.1, 0.2, 0.3, 0.4)
    assert nearest_within_noise(losses(400, gains, noise=0.1)) == 4
    assert nearest_within_noise(losses(5, gains, noise=8.0)) < 4


def test_harm_is_never_taken() -> None:
    harm = (0.0, -0.1, -0.2, -0.3, -0.4)
    assert all(nearest_within_noise(losses(50, harm, noise=0.1, seed=seed)) == 0 for seed in range(50))


def test_where_nothing_differs_but_noise_a_site_stays_nearer_to_the_shared_state_than_without_the_guard() -> None:
    candidates = [losses(20, (0.0,) * 5, noise=1.0, seed=seed) for seed in range(400)]
    guarded = np.array([SHARES[nearest_within_noise(each)] for each in candidates])
    unguarded = np.array([SHARES[int(np.argmin([loss.mean() for loss in each]))] for each in candidates])
    assert (guarded == 0).mean() > 2 * (unguarded == 0).mean()
    assert guarded.mean() < 0.6 * unguarded.mean()


@pytest.mark.parametrize("patients", [0, 1])
def test_nobody_to_ask_means_the_shared_state(patients: int) -> None:
    assert nearest_within_noise([np.full(patients, 5.0), np.full(patients, 0.0)]) == 0


@given(st.floats(0, 1), st.integers(0, 2**32 - 1))
def test_a_state_between_two_is_on_the_line(share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    before = {"w": rng.normal(size=3).astype(np.float32), "steps": np.array(3)}
    after = {"w": rng.normal(size=3).astype(np.float32), "steps": np.array(7)}
    found = between(before, after, share)
    np.testing.assert_allclose(found["w"], before["w"] + share * (after["w"] - before["w"]), atol=1e-5)
    assert found["w"].dtype == np.float32
    assert found["steps"] in (3, 7)
    assert all((between(before, after, 0.0)[n] == before[n]).all() for n in before)
    assert all((between(before, after, 1.0)[n] == after[n]).all() for n in after)


@pytest.mark.parametrize("mislabelled", [False, True])
def test_a_site_whose_training_leads_away_ends_with_the_shared_state(tmp_path: Path, mislabelled: bool) -> None:
    stages = [stage.model_dump(mode="json") for stage in tiny_federation().stages]
    stages[1] |= {"optimizer": {"lr": 1e-2}, "local_steps": 40}
    federation = tiny_federation(stages=stages)
    site = write_sites(tmp_path / "data", {"north": ("scan", "note", "labs")}, patients=120)["north"]
    if mislabelled:
        table = pd.read_csv(site.manifest, dtype=str)
        swapped = table["disease"].map({"ill": "healthy", "healthy": "ill"})
        table["disease"] = swapped.where(table["split"] == "train", table["disease"])
        table.to_csv(site.manifest, index=False)
    agent = Agent.open(prepare_run(tmp_path / "run", federation, {"north": site}) / "sites" / "north")
    last = rounds_of(federation)[-1].number
    reply = agent.answer(RoundRequest(sha256(federation), last, initial_state(federation)))
    assert isinstance(reply, RoundReply), reply
    (figure,) = [metric for metric in reply.metrics if metric.metric == "interpolation"]
    values = {(m.model, m.metric): m.value for m in reply.metrics if m.split == "test"}
    assert figure.n == 40  # validation studies: 20 patients with two each
    if mislabelled:
        assert figure.value == 0
        assert values["adapted", "auroc"] == values["shared", "auroc"]
    else:
        assert figure.value
        assert (values["adapted", "auroc"] or 0) > (values["shared", "auroc"] or 0) + 0.1
    assert not reply.tensors
