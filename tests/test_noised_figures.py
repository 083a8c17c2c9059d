"""Figures that leave with noise: what one patient can change, how much noise there is, and what never leaves."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from scipy.stats import chi2, norm
from sklearn.metrics import roc_auc_score
from test_agent import Coordination, agents, ask
from tiny import private_federation, write_sites

from client import gates
from client.agent import Agent
from client.approval import propose, sentences
from client.place import Place
from client.private import LEDGER
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump
from mmfm_core.config.site import Release
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.binned import BINS, EDGES, Ranking, binned_auroc, counted
from mmfm_core.privacy import figures
from mmfm_core.privacy.accounting import Charge, composed, costs_of, schedule_of
from mmfm_core.privacy.figures import auroc_of, noised_metrics, scale_of
from mmfm_core.privacy.ledger import Ledger, charged
from mmfm_core.protocol import Metric, RoundReply

NOISED = {"figures": "noised", "figure_noise": 2.0}
FINDINGS = ("effusion", "opacity", "device")


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"), patients=180)


def with_findings() -> Federation:
    """One head with three findings, of which 'auroc' is asked."""
    document = private_federation(NOISED).model_dump(mode="json")
    (name,) = document["model"]["heads"]
    document["model"]["heads"] = {name: {"type": "findings", "findings": FINDINGS}}
    return Federation.model_validate(document)


def head_of(federation: Federation) -> str:
    (name,) = federation.model.heads
    return name


def table_of(patients: list[int], values: list[float], labels: list[float]) -> pd.DataFrame:
    """Studies of patients, each finding with the same scores and with labels of its own."""
    columns: dict[str, Any] = {"study": range(len(patients)), "patient": [f"p{number}" for number in patients]}
    for index, finding in enumerate(FINDINGS):
        columns[f"p_{finding}"] = values
        columns[f"y_{finding}"] = np.roll(labels, index)
    return pd.DataFrame(columns)


STUDIES = st.lists(
    st.tuples(st.integers(0, 5), st.floats(0, 1), st.sampled_from([0.0, 1.0, np.nan])), min_size=1, max_size=20
)


@settings(deadline=None)
@given(STUDIES)
def test_one_patient_moves_all_counts_by_no_more_than_the_noise_is_made_for(
    studies: list[tuple[int, float, float]],
) -> None:
    table = table_of(*(list(column) for column in zip(*studies, strict=True)))
    federation = with_findings()
    head, limit = federation.model.heads[head_of(federation)], scale_of(federation) / NOISED["figure_noise"]

    def counts(of: pd.DataFrame) -> np.ndarray:
        _, patients = np.unique(of["patient"], return_inverse=True)
        return np.stack([counted(ranking, patients) for ranking in head.rankings(of)])

    for patient in table["patient"].unique():
        moved = np.linalg.norm(counts(table) - counts(table[table["patient"] != patient]))
        assert moved <= limit + 1e-9


def test_a_patient_with_every_label_moves_them_by_all_of_it() -> None:
    """The bound is met, so that no less noise would do."""
    federation = with_findings()
    head = federation.model.heads[head_of(federation)]
    table = table_of([0], [0.3], [1.0])
    counts = np.stack([counted(ranking, np.zeros(1)) for ranking in head.rankings(table)])
    assert np.linalg.norm(counts) == pytest.approx(scale_of(federation) / NOISED["figure_noise"])
    assert scale_of(federation) == pytest.approx(2 * np.sqrt(3))


SCORES = st.lists(st.floats(0, 1), min_size=5, max_size=30)


@settings(deadline=None)
@given(SCORES, SCORES)
def test_without_noise_it_is_the_auroc_of_the_binned_scores(of_no: list[float], of_yes: list[float]) -> None:
    scores, labels = np.array(of_no + of_yes), np.repeat([0.0, 1.0], [len(of_no), len(of_yes)])
    counts = counted(Ranking(scores, labels), np.arange(len(scores)))
    expected = roc_auc_score(labels, np.searchsorted(EDGES, scores, side="right"))
    assert binned_auroc(counts[None])[0] == pytest.approx(expected)


def test_a_label_with_too_few_patients_has_none() -> None:
    counts = counted(Ranking(np.linspace(0, 1, 20), (np.arange(20) >= 16).astype(float)), np.arange(20))
    assert np.isnan(binned_auroc(counts[None])[0])
    assert np.isnan(auroc_of(counts[None], scale=1.0)).all()


def test_the_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    """Normal scores one deviation apart: the population's AUROC of the bins is known. Noise as for one head at 2."""
    rng, scale, covered, values = np.random.default_rng(1), 2.0, 0, []
    probability = [np.diff(norm.cdf(np.r_[-np.inf, np.log(EDGES / (1 - EDGES)), np.inf], mean)) for mean in (0, 1)]
    truth = float(binned_auroc(1e6 * np.concatenate(probability)[None])[0])
    for _ in range(200):
        patients = np.concatenate([rng.multinomial(60, of) for of in probability]).astype(float)
        value, low, high = auroc_of((patients + scale * rng.standard_normal(2 * BINS))[None], scale)
        values.append(value)
        covered += low <= truth <= high
    assert covered >= 180  # 95 % of 200 is 190, with a standard deviation of 3
    assert np.mean(values) == pytest.approx(truth, abs=0.02)


def test_the_noise_is_as_large_as_it_is_paid_for(monkeypatch: pytest.MonkeyPatch) -> None:
    federation = with_findings()
    seen: list[np.ndarray] = []
    monkeypatch.setattr(figures, "auroc_of", lambda counts, scale: (seen.append(counts), (0.5, 0.4, 0.6))[1])
    table = table_of(list(range(30)), list(np.linspace(0, 1, 30)), [0.0, 1.0] * 15)
    for _ in range(40):
        noised_metrics(head_of(federation), table, federation)
    head = federation.model.heads[head_of(federation)]
    exact = np.stack([counted(ranking, np.arange(30)) for ranking in head.rankings(table)])
    noise = (np.stack(seen) - exact) / scale_of(federation)
    low, high = chi2.ppf([1e-6, 1 - 1e-6], noise.size)
    assert low <= (noise**2).sum() <= high


def test_one_figure_leaves_at_the_end_and_is_paid_for_once(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation(NOISED)
    together = Coordination(federation, agents(tmp_path, federation, sites))
    last = len(together.rounds) - 1
    for number in range(1, last + 1):
        for reply, _ in together.round(number).values():
            assert (reply.metrics, reply.loss) == ([], None)
    for name, agent in together.agents.items():
        request = together.request(name, last + 1)
        reply, _ = ask(agent, request)
        assert isinstance(reply, RoundReply)
        (figure,) = reply.metrics
        assert (figure.metric, figure.model, figure.split, figure.noised) == ("auroc", "shared", "test", True)
        assert figure.value is not None
        assert figure.low is not None
        assert figure.high is not None
        assert figure.low <= figure.value <= figure.high
        again, _ = ask(Agent.open(agent.directory), request)
        assert again == replace(reply, tensors={}), "noise that is drawn again averages out"
        paid = [entry.charge for entry in charged(Ledger(agent.directory / LEDGER).entries()).values()]
        assert paid.count(Charge(2.0, 1.0, 1)) == 1
        assert reply.epsilon == pytest.approx(composed(costs_of(federation), 1e-5))
        assert reply.epsilon <= 8


def test_what_no_noise_covers_is_stopped_at_the_gate() -> None:
    privacy = private_federation(NOISED).privacy
    exact = Metric("outcome", "adapted", "test", "auroc", 0.9, 40)
    noised = replace(exact, model="shared", noised=True)
    assert gates.measured([exact, noised], Release(), privacy) == [noised]
    withheld = private_federation().privacy
    assert gates.measured([exact, noised], Release(), withheld) == []


def test_steps_have_more_noise_where_figures_are_paid_for_too() -> None:
    with_figures, without = schedule_of(private_federation(NOISED)), schedule_of(private_federation())
    assert with_figures.noise > without.noise
    with pytest.raises(MmfmError, match=r"privacy\.figure_noise: noised figures alone cost"):
        schedule_of(private_federation({"figures": "noised", "figure_noise": 0.5}))
    with pytest.raises(MmfmError, match="and the noised figures cost"):
        schedule_of(private_federation(NOISED | {"noise": without.noise}))


def test_a_document_without_such_a_figure_is_refused() -> None:
    head = head_of(private_federation())
    with pytest.raises(ValidationError, match="it leads no head; name it first under evaluation"):
        private_federation(NOISED, evaluation={head: {"metrics": ["accuracy", "auroc"]}})


def test_a_site_is_told_before_it_agrees(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation, document = private_federation(NOISED), tmp_path / "federation.yaml"
    document.write_text(dump(federation))
    place = Place.of(tmp_path / "site")
    place.directory.mkdir()
    (place.directory / "site.yaml").write_text(dump(next(iter(sites.values()))))
    said = "\n".join(sentences(propose(place, document)))
    assert "LEAVES, once at the end, with noise: the AUROC of" in said
    assert "Which figures leave".lower() in said.lower()
    assert "mean training loss" not in said
