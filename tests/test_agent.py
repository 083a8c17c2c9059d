"""The site's agent: what it lets in, what it lets out, and that it gives the same answer twice."""

import csv
from collections.abc import Callable
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from test_protocol import over_the_wire
from tiny import prepare_run, tiny_federation, write_sites

import client.agent
import client.learning
from client.agent import Agent
from client.gates import approve, approved
from client.state import LocalState
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.models.model import full_model
from mmfm_core.protocol import (
    Describe,
    Refusal,
    RoundReply,
    RoundRequest,
    SiteDescription,
    from_records,
    to_records,
)
from mmfm_core.storage import Tensors, read_tensors
from server.coordinator import initial_state
from server.methods import apply
from server.strategy import Strategy

HELD = {
    "north": ("encoders.scan.*", "encoders.note.*", "encoders.labs.*", "fusion.*", "heads.*"),
    "south": ("encoders.note.*", "encoders.labs.*", "fusion.*", "heads.*"),
}


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


def agents(folder: Path, federation: Federation, sites: dict[str, Site]) -> dict[str, Agent]:
    """An agent for each site, all of which approved the document."""
    run = prepare_run(folder, federation, sites)
    return {name: Agent.open(run / "sites" / name) for name in sites}


def every_byte(part: Any) -> bytes:
    """All that travels of a record: its own bytes and those of its parts."""
    return bytes(part.deflate()) + b"".join(every_byte(child) for child in (part.children or {}).values())


def ask(agent: Agent, question: Describe | RoundRequest) -> tuple[SiteDescription | RoundReply | Refusal, bytes]:
    """Question and answer as they travel; the answer, and all bytes of it."""
    arrived = from_records(over_the_wire(to_records(question)), Describe, RoundRequest)
    records = over_the_wire(to_records(agent.answer(arrived)))
    return from_records(records, SiteDescription, RoundReply, Refusal), every_byte(records)


def describe(agent: Agent, federation: Federation) -> SiteDescription:
    description, _ = ask(agent, Describe(sha256(federation)))
    assert isinstance(description, SiteDescription), description
    return description


class Coordination:
    """The part of the coordinator that an agent meets, in its simplest form."""

    def __init__(self, federation: Federation, agents: dict[str, Agent]) -> None:
        self.federation, self.agents = federation, agents
        self.document, self.rounds = sha256(federation), rounds_of(federation)
        state = initial_state(federation)
        self.strategy = Strategy(federation, {n: state[n] for n in state if is_shared(federation, n)})
        self.sites = {name: describe(agent, federation) for name, agent in agents.items()}

    def request(self, name: str, number: int) -> RoundRequest:
        this = self.rounds[number - 1]
        state, names = self.strategy.state_for(this), self.strategy.tensors_for(self.sites[name], this)
        tensors = {tensor: state[tensor].copy() for tensor in names}
        return RoundRequest(self.document, number, tensors)

    def round(self, number: int) -> dict[str, tuple[RoundReply, bytes]]:
        """Ask every site, fold the replies, and return them with their bytes."""
        answers = {}
        for name, agent in self.agents.items():
            reply, sent = ask(agent, self.request(name, number))
            assert isinstance(reply, RoundReply), reply
            self.strategy.fold(reply, self.sites[name], self.rounds[number - 1])
            answers[name] = reply, sent
        self.strategy.advance(self.sites.values())
        return answers


def is_shared(federation: Federation, name: str) -> bool:
    """By the definition of the policy, and none of its code."""
    policy = federation.parameters
    kept = [*policy.local, *policy.frozen]
    return any(fnmatchcase(name, p) for p in policy.shared) and not any(fnmatchcase(name, p) for p in kept)


def assert_same(one: RoundReply, other: RoundReply) -> None:
    """The same reply, bit for bit; only how long it took may differ."""
    empty: Tensors = {}
    assert replace(one, seconds=0, tensors=empty) == replace(other, seconds=0, tensors=empty)
    assert list(one.tensors) == list(other.tensors)
    for name, tensor in one.tensors.items():
        assert tensor.tobytes() == other.tensors[name].tobytes(), name


POLICIES: dict[str, dict[str, list[str]]] = {
    "all shared": {},
    "fusion local": {"local": ["fusion.*"]},
    "encoders only": {"shared": ["encoders.*"], "local": ["heads.*", "encoders.labs.*"], "frozen": ["fusion.*"]},
}


@pytest.mark.parametrize("policy", POLICIES.values(), ids=POLICIES.keys())
def test_only_shared_tensors_of_held_blocks_leave(
    tmp_path: Path, sites: dict[str, Site], policy: dict[str, list[str]]
) -> None:
    federation = tiny_federation(parameters=policy)
    names = list(full_model(federation.model, federation.seed).state_dict())
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    for number in (1, 2):
        for site, (reply, sent) in coordination.round(number).items():
            held = [name for name in names if any(fnmatchcase(name, pattern) for pattern in HELD[site])]
            assert sorted(reply.tensors) == sorted(name for name in held if is_shared(federation, name))
            found = list((tmp_path / "run" / "sites" / site / "state").rglob(f"round-0000{number}.*"))
            state = read_tensors(found[0]) if found else {}  # where nothing is local, nothing is kept
            local = [n for n in held if any(fnmatchcase(n, p) for p in federation.parameters.local)]
            assert sorted(state) == sorted(
                n for n in local if not any(fnmatchcase(n, p) for p in federation.parameters.frozen)
            )
            for name, tensor in state.items():
                assert name.encode() not in sent
                # A tensor that is still as it was initialised everywhere tells nothing.
                if tensor.size > 4 and len(np.unique(tensor)) > 4:
                    assert tensor.tobytes() not in sent, name
            assert all(tensor.tobytes() in sent for tensor in reply.tensors.values()), "the bytes are those that travel"
    moved = coordination.strategy.shared
    initial = initial_state(federation)
    assert any((moved[name] != initial[name]).any() for name in moved)


@pytest.mark.parametrize("method", ["fedbn", "fedper", "fedrep", "local-fusion-head", "ditto", "dual-lora"])
def test_what_a_method_keeps_at_a_site_is_nowhere_in_what_travels(
    tmp_path: Path, sites: dict[str, Site], method: str
) -> None:
    """Not of SCAFFOLD: a site sends how its control variate changed, and that is the variate after the first round."""
    federation = apply(method, tiny_federation(), len(sites))
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    compared = 0
    for number in (1, 2):
        for site, (_, sent) in coordination.round(number).items():
            kept = read_tensors(next((tmp_path / "run" / "sites" / site / "state").rglob(f"round-0000{number}.*")))
            for name, tensor in kept.items():
                assert name.encode() not in sent
                if tensor.size > 4 and len(np.unique(tensor)) > 4:
                    assert tensor.tobytes() not in sent, name
                    compared += 1
    assert compared


def test_a_single_study_of_a_modality_trains_its_encoder_by_the_weight_of_one(
    tmp_path: Path, sites: dict[str, Site]
) -> None:
    federation = tiny_federation()
    frame = pd.read_csv(sites["north"].manifest, dtype=str)
    only = frame.index[(frame["split"] == "train") & frame["scan"].notna()][0]
    frame.loc[frame.index != only, "scan"] = None
    frame["scan"] = frame["scan"].map(lambda path: str(sites["north"].manifest.parent / path), na_action="ignore")
    frame.to_csv(tmp_path / "manifest.csv", index=False)
    single = sites["north"].model_copy(update={"manifest": tmp_path / "manifest.csv"})
    coordination = Coordination(federation, agents(tmp_path / "run", federation, {**sites, "north": single}))
    before = {name: tensor.copy() for name, tensor in coordination.strategy.shared.items()}
    reply, _ = coordination.round(1)["north"]
    assert coordination.sites["north"].modalities["scan"] == {"train": 1, "val": 0, "test": 0}
    assert reply.weights["encoders.scan"] == 1
    assert reply.loss is not None
    after = coordination.strategy.shared
    assert all(np.isfinite(tensor).all() for tensor in after.values())
    # Nobody else holds that encoder: it becomes what this site's one study made of it.
    scan = [name for name in after if name.startswith("encoders.scan.")]
    assert all((after[name] == reply.tensors[name]).all() for name in scan)
    assert any((after[name] != before[name]).any() for name in scan)


def test_local_parameters_move_on_and_frozen_ones_stay(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation(parameters={"local": ["heads.*"], "frozen": ["encoders.note.*"]})
    made = agents(tmp_path / "run", federation, sites)
    coordination = Coordination(federation, made)
    seen = []
    for number in (1, 2):
        coordination.round(number)
        seen.append(LocalState(next((tmp_path / "run/sites/north/state").iterdir())).before(number + 1))
    initial = initial_state(federation)
    weight = "heads.disease.linear.weight"
    assert (seen[0][weight] != initial[weight]).any()
    assert (seen[1][weight] != seen[0][weight]).any()
    frozen = [name for name in initial if name.startswith("encoders.note.")]
    now = made["north"].participate(coordination.document).model.state_dict()
    assert frozen
    assert all((now[name].numpy() == initial[name]).all() for name in frozen)


def test_adaptation_sends_figures_and_nothing_else(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation()
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    for number in (1, 2):
        coordination.round(number)
    for site, (reply, _) in coordination.round(3).items():
        assert (reply.tensors, reply.weights) == ({}, {})
        measured = {(metric.model, metric.split) for metric in reply.metrics}
        assert measured == {(model, split) for model in ("shared", "adapted") for split in ("val", "test")}
        written = sorted(path.name for path in (tmp_path / "run/sites" / site).glob("predictions/*/*"))
        assert written == ["disease-adapted.csv", "disease-shared.csv"]


def test_weights_and_counts_are_those_of_the_manifest(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation()
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    replies = coordination.round(1)
    for name, site in sites.items():
        with site.manifest.open() as file:
            rows = list(csv.DictReader(file))
        columns = {"note": ("note",), "labs": ("crp", "age")} | ({"scan": ("scan",)} if name == "north" else {})

        def holds(row: dict[str, str], modality: str, columns: dict[str, tuple[str, ...]] = columns) -> bool:
            return any(row[column] for column in columns[modality])

        training = [row for row in rows if row["split"] == "train" and any(holds(row, m) for m in columns)]
        weights = {"fusion": len(training), "heads.disease": len(training)}
        weights |= {f"encoders.{m}": sum(holds(row, m) for row in training) for m in columns}
        assert replies[name][0].weights == weights
        description = coordination.sites[name]
        assert description.studies["train"] == len(training)
        assert description.patients["train"] == len({row["patient_id"] for row in training})
        assert description.targets["disease"]["train"] == {
            label: sum(row["disease"] == label for row in training) for label in ("healthy", "ill")
        }


def test_a_repeated_round_is_the_same_answer(tmp_path: Path, sites: dict[str, Site]) -> None:
    """Whether the agent was restarted between, or other rounds came, up to the last checkpoint but one."""
    federation = tiny_federation(
        parameters={"local": ["fusion.*", "heads.*"]},
        stages=[
            stage.model_dump(mode="json") | {"rounds": 4 if stage.federated else 1}
            for stage in tiny_federation().stages
        ],
    )
    folder = tmp_path / "run"
    coordination = Coordination(federation, agents(folder, federation, sites))
    requests, replies = {}, {}
    for number in range(1, 6):
        requests[number] = coordination.request("north", number)
        replies[number] = coordination.round(number)["north"][0]
        again, _ = ask(coordination.agents["north"], requests[number])
        assert isinstance(again, RoundReply)
        assert_same(again, replies[number])
    assert replies[1].metrics != replies[2].metrics
    for number in (4, 5, 4, 5, 5):
        restarted = Agent.open(folder / "sites" / "north")
        again, _ = ask(restarted, requests[number])
        assert isinstance(again, RoundReply)
        assert_same(again, replies[number])


def test_a_new_run_of_the_same_document_starts_afresh(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation(parameters={"local": ["fusion.*"]})
    made = agents(tmp_path / "run", federation, sites)
    first = [Coordination(federation, made).round(1) for _ in range(2)]
    assert_same(first[0]["south"][0], first[1]["south"][0])


@pytest.mark.parametrize(
    ("kept", "asked", "expected"),
    [
        ([], 1, None),
        ([1, 2, 3], 3, 2),
        ([1, 2, 3], 2, 1),
        ([1, 2, 3, 4, 5], 4, 3),
        ([1, 4], 4, 1),
        ([1, 2, 3], 1, None),
    ],
)
def test_a_round_starts_from_the_state_before_it(
    tmp_path: Path, kept: list[int], asked: int, expected: int | None
) -> None:
    state = LocalState(tmp_path)
    for number in kept:
        state.save(number, {"w": np.array([number])})
    before = state.before(asked)
    assert (before["w"].item() if before else None) == expected
    assert len(list(tmp_path.iterdir())) <= 3


def test_state_of_later_rounds_goes_when_an_earlier_one_is_done_anew(tmp_path: Path) -> None:
    state = LocalState(tmp_path)
    for number in (1, 2, 3, 2):
        state.save(number, {"w": np.array([number])})
    assert state.before(9)["w"].item() == 2


def refusal(answer: object) -> str:
    assert isinstance(answer, Refusal), answer
    return answer.reason


def test_a_document_that_is_not_approved_is_refused(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation, other = tiny_federation(), tiny_federation(seed=1)
    agent = agents(tmp_path / "run", federation, sites)["north"]
    folder = tmp_path / "run/sites/north/approved"
    (copy,) = folder.iterdir()
    (tmp_path / "run/sites/north" / f"{sha256(other)}.yaml").write_text(dump(other))  # not in the folder
    asked = [
        sha256(other),
        "",
        "x",
        f"../{sha256(other)}",
        copy.stem.upper(),
        copy.stem[:-1],
        "é" * 64,
        copy.stem + "\n",
    ]
    for document in asked:
        for question in (Describe(document), RoundRequest(document, 1, {})):
            assert refusal(ask(agent, question)[0]) == "this federation's document is not approved at this site"


def test_a_tampered_or_withdrawn_approval_is_refused_at_once(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation()
    folder = tmp_path / "run/sites/north/approved"
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    agent, request = coordination.agents["north"], coordination.request("north", 1)
    first, _ = ask(agent, request)
    copy = folder / f"{coordination.document}.yaml"
    copy.write_text(copy.read_text().replace("seed: 0", "seed: 1"))
    for asked in (agent, Agent.open(tmp_path / "run/sites/north")):
        assert "was changed; approve it again" in refusal(ask(asked, request)[0])
    copy.unlink()
    for asked in (agent, Agent.open(tmp_path / "run/sites/north")):
        assert refusal(ask(asked, request)[0]) == "this federation's document is not approved at this site"
    assert approve(folder, federation) == coordination.document
    assert approved(folder, coordination.document) == federation
    again, _ = ask(agent, request)
    assert isinstance(first, RoundReply)
    assert isinstance(again, RoundReply)
    assert_same(first, again)


def changed(tensors: Tensors, name: str, value: np.ndarray | None) -> Tensors:
    rest = {other: tensor for other, tensor in tensors.items() if other != name}
    return rest if value is None else rest | {name: value}


BIAS = "heads.disease.linear.bias"
BAD_TENSORS: dict[str, tuple[Callable[[Tensors], Tensors], str]] = {
    "missing": (lambda t: changed(t, BIAS, None), f"the tensor '{BIAS}' is missing"),
    "none": (lambda _: {}, "' is missing"),
    "extra": (lambda t: t | {"heads.other.w": np.ones(1, np.float32)}, "a tensor that was not asked for came along"),
    "unheld": (lambda t: t | {"encoders.scan.position.weight": np.ones((4, 12), np.float32)}, "not asked for"),
    "shape": (lambda t: changed(t, BIAS, np.ones(3, np.float32)), f"'{BIAS}' is float32[3], expected float32[2]"),
    "one more axis": (lambda t: changed(t, BIAS, np.ones((1, 2), np.float32)), "is float32[1, 2], expected float32[2]"),
    "type": (lambda t: changed(t, BIAS, np.ones(2)), f"the tensor '{BIAS}' is float64[2], expected float32[2]"),
    "byte order": (lambda t: changed(t, BIAS, np.ones(2, ">f4")), "is >f4[2], expected float32[2]"),
    "text": (lambda t: changed(t, BIAS, np.array(["a", "b"])), "is <U1[2], expected float32[2]"),
    "not a number": (lambda t: changed(t, BIAS, np.array([0, np.nan], np.float32)), "holds values that are not finite"),
    "infinite": (lambda t: changed(t, BIAS, np.array([0, -np.inf], np.float32)), "holds values that are not finite"),
}


@pytest.fixture(scope="module")
def asked(tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Site]) -> Coordination:
    federation = tiny_federation()
    return Coordination(federation, agents(tmp_path_factory.mktemp("asked") / "run", federation, sites))


@pytest.mark.parametrize(("spoil", "said"), BAD_TENSORS.values(), ids=BAD_TENSORS.keys())
def test_tensors_that_are_not_as_declared_are_refused(
    asked: Coordination, spoil: Callable[[Tensors], Tensors], said: str
) -> None:
    whole = asked.request("south", 1)
    agent = asked.agents["south"]
    bad = RoundRequest(whole.federation, 1, spoil(whole.tensors))
    assert said in refusal(agent.answer(bad))  # the relay could ask so, whatever Flower carries
    assert not list(agent.directory.rglob("round-*")), "nothing was trained"


@pytest.mark.parametrize("number", [0, -1, 4, 10**30])
def test_a_round_that_the_document_does_not_have_is_refused(asked: Coordination, number: int) -> None:
    request = replace(asked.request("south", 1), round=number)
    reason = refusal(ask(asked.agents["south"], request)[0])
    assert reason == f"the document has 3 rounds, and round {number} was asked for"


def test_finite_tensors_that_lead_nowhere_are_refused_not_sent(asked: Coordination) -> None:
    whole = asked.request("south", 1)
    huge = {name: np.full_like(tensor, 3e38) for name, tensor in whole.tensors.items()}
    reason = refusal(ask(asked.agents["south"], RoundRequest(whole.federation, 1, huge))[0])
    assert "not finite" in reason


@pytest.mark.parametrize("error", [ValueError, KeyError, RuntimeError, RecursionError, MemoryError])
def test_an_internal_error_tells_nothing_but_its_kind(
    asked: Coordination, monkeypatch: pytest.MonkeyPatch, error: type[Exception]
) -> None:
    def fail(*_: object) -> None:
        raise error("CANARY-PHI-123")

    monkeypatch.setattr(client.agent, "learn", fail)
    answer, sent = ask(asked.agents["south"], asked.request("south", 1))
    assert refusal(answer) == f"internal error ({error.__name__}); the site's own log has the details"
    assert b"CANARY" not in sent
    assert b"Traceback" not in sent


def test_a_trained_tensor_that_is_not_finite_does_not_leave(
    asked: Coordination, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverge(model: Any, *_: object) -> float:
        model.heads["disease"].linear.bias.data[0] = np.nan
        return 0.5

    monkeypatch.setattr(client.learning, "train", diverge)
    answer, _ = ask(asked.agents["south"], asked.request("south", 1))
    assert refusal(answer) == f"the tensor '{BIAS}' holds values that are not finite"


def test_a_sites_data_that_cannot_be_used_is_refused_without_its_values(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation()
    agents(tmp_path / "run", federation, sites)
    folder = tmp_path / "run/sites/north"
    site = yaml.safe_load((folder / "site.yaml").read_text())
    text = sites["north"].manifest.read_text().replace("ill", "CANARY-PHI-123")
    (tmp_path / "m.csv").write_text(text)
    (folder / "site.yaml").write_text(
        yaml.safe_dump(site | {"manifest": str(tmp_path / "m.csv"), "missing_files": "absent"})
    )
    for question in (Describe(sha256(federation)), RoundRequest(sha256(federation), 1)):
        answer, sent = ask(Agent.open(folder), question)
        assert "column 'disease' is none of healthy, ill" in refusal(answer)
        assert b"CANARY" not in sent


def test_a_site_with_one_class_trains_and_leaves_its_auroc_undefined(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation()
    run = prepare_run(tmp_path / "run", federation, sites)
    folder = run / "sites" / "south"
    text = sites["south"].manifest.read_text().replace("healthy", "ill")
    (tmp_path / "m.csv").write_text(text)
    site = sites["south"].model_copy(update={"manifest": tmp_path / "m.csv"})
    (folder / "site.yaml").write_text(dump(site))
    coordination = Coordination(federation, {"south": Agent.open(folder)})
    reply, _ = coordination.round(1)["south"]
    assert reply.loss is not None
    assert reply.loss > 0
    assert reply.tensors
    values = {metric.metric: metric.value for metric in reply.metrics}
    assert values.keys() == {"auroc", "auprc", "f1", "ece", "accuracy"}
    assert (values["auroc"], values["auprc"]) == (None, None)
    assert values["ece"] is not None


def test_a_site_that_gives_up_a_modality_goes_on(tmp_path: Path, sites: dict[str, Site]) -> None:
    """Its kept parameters of that modality are of no use any more, and no harm."""
    federation = tiny_federation(parameters={"local": ["encoders.*"]})
    run = prepare_run(tmp_path / "run", federation, sites)
    folder = run / "sites" / "north"
    Coordination(federation, {"north": Agent.open(folder)}).round(1)
    rest = {name: mapping for name, mapping in sites["north"].modalities.items() if name != "scan"}
    (folder / "site.yaml").write_text(dump(sites["north"].model_copy(update={"modalities": rest})))
    later = Coordination(federation, {"north": Agent.open(folder)})
    assert "scan" not in later.sites["north"].modalities
    later.round(2)


def test_a_site_that_gains_a_modality_joins_its_encoder_and_disturbs_nobody(
    tmp_path: Path, sites: dict[str, Site]
) -> None:
    federation = tiny_federation(parameters={"local": ["heads.*"]})
    mappings = sites["north"].modalities
    less = sites["north"].model_copy(update={"modalities": {n: m for n, m in mappings.items() if n != "scan"}})
    run = prepare_run(tmp_path / "run", federation, {"third": sites["north"], "north": less, "south": sites["south"]})
    folders = {name: run / "sites" / name for name in ("third", "north", "south")}
    coordination = Coordination(federation, {name: Agent.open(folder) for name, folder in folders.items()})
    assert not any("scan" in name for name in coordination.round(1)["north"][0].tensors)
    shared = coordination.strategy.shared
    (folders["north"] / "site.yaml").write_text(dump(sites["north"]))
    later = Coordination(federation, {name: Agent.open(folder) for name, folder in folders.items()})
    later.strategy = Strategy(federation, {name: tensor.copy() for name, tensor in shared.items()})
    kept = LocalState(next((folders["north"] / "state").iterdir())).before(2)
    went_on = {name: reply for name, (reply, _) in coordination.round(2).items() if name != "north"}
    replies = {name: reply for name, (reply, _) in later.round(2).items()}
    assert any(name.startswith("encoders.scan.") for name in replies["north"].tensors)
    for name, reply in went_on.items():
        assert_same(replies[name], reply)
    # Its own head goes on from what it was, and does not start over.
    now = LocalState(next((folders["north"] / "state").iterdir())).before(3)
    initial = full_model(federation.model, federation.seed).state_dict()
    weight = "heads.disease.linear.weight"
    assert np.abs(now[weight] - kept[weight]).mean() < np.abs(now[weight] - initial[weight].numpy()).mean()
