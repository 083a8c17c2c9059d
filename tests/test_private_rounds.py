"""Private rounds at a site: paid before they train, answered once, and what of them leaves."""

import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
from pydantic import ValidationError
from test_agent import Coordination, agents, ask, is_shared
from tiny import private_federation, tiny_federation, write_sites

import client.learning
from client import spending
from client.agent import Agent
from client.approval import propose, sentences
from client.place import Place
from client.private import LEDGER
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.site import Budget
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.accounting import Charge, composed, epsilon, noise_for, schedule_of
from mmfm_core.privacy.ledger import Ledger, charged
from mmfm_core.protocol import Refusal, RoundReply, RoundRequest
from mmfm_core.storage import digest
from server.coordinator import initial_state

STEPS, ROUNDS = 4, 2


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


def coordination(folder: Path, federation: Federation, sites: dict[str, Site]) -> Coordination:
    return Coordination(federation, agents(folder, federation, sites))


def first_request(federation: Federation) -> RoundRequest:
    """For a site that holds everything."""
    state = initial_state(federation)
    return RoundRequest(sha256(federation), 1, {n: t for n, t in state.items() if is_shared(federation, n)})


def ledger_of(agent: Agent) -> Ledger:
    return Ledger(agent.directory / LEDGER)


def test_a_federation_is_trained_and_every_site_says_what_it_has_cost(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    together = coordination(tmp_path, federation, sites)
    noise = noise_for(8, 0.5, STEPS * ROUNDS, 1e-5)
    for number in range(1, ROUNDS + 1):
        for name, (reply, _) in together.round(number).items():
            assert (reply.metrics, reply.loss) == ([], None), "figures are withheld"
            assert reply.epsilon == pytest.approx(epsilon(noise, 0.5, STEPS * number, 1e-5)), name
            assert all(np.isfinite(tensor).all() for tensor in reply.tensors.values())
    for name, agent in together.agents.items():
        adapted, _ = ask(agent, together.request(name, ROUNDS + 1))
        assert isinstance(adapted, RoundReply)
        assert (adapted.metrics, adapted.loss, adapted.epsilon, adapted.tensors) == ([], None, None, {})
        assert ledger_of(agent).spent(1e-5) <= 8


def test_figures_leave_where_the_document_says_so(tmp_path: Path, sites: dict[str, Site]) -> None:
    together = coordination(tmp_path, private_federation({"figures": "exact"}), sites)
    for reply, _ in together.round(1).values():
        assert reply.metrics
        assert reply.loss is not None


def test_the_same_question_has_the_same_answer_and_is_not_paid_again(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    agent = agents(tmp_path, federation, sites)["north"]
    request = first_request(federation)
    first, _ = ask(agent, request)
    assert isinstance(first, RoundReply)
    for again in (agent, Agent.open(agent.directory)):  # also after a restart
        second, _ = ask(again, request)
        assert isinstance(second, RoundReply)
        assert replace(second, tensors={}) == replace(first, tensors={})
        assert digest(second.tensors) == digest(first.tensors)
    assert len(charged(ledger_of(agent).entries())) == 1


def test_a_round_is_not_computed_from_another_state(tmp_path: Path, sites: dict[str, Site]) -> None:
    """Two answers to one round would be two releases for one charge, with noise that averages out."""
    federation = private_federation()
    agent = agents(tmp_path, federation, sites)["north"]
    request = first_request(federation)
    ask(agent, request)
    name = next(iter(request.tensors))
    other = replace(request, tensors=request.tensors | {name: request.tensors[name] + 1})
    refused, _ = ask(agent, other)
    assert isinstance(refused, Refusal)
    assert "answered before, from another state" in refused.reason
    assert len(charged(ledger_of(agent).entries())) == 1


def test_neither_data_nor_seed_fix_what_leaves(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    replies = [ask(agents(tmp_path / run, federation, sites)["north"], first_request(federation))[0] for run in "ab"]
    one, other = (reply for reply in replies if isinstance(reply, RoundReply))
    assert one.tensors.keys() == other.tensors.keys()
    assert all(not np.array_equal(one.tensors[name], other.tensors[name]) for name in one.tensors)


def test_a_round_beyond_the_budget_is_refused_before_anything_is_computed(
    tmp_path: Path, sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The budget is the site's: another document of the same consortium, or of another one, has used it up."""
    spent = epsilon(schedule_of(private_federation()).noise, 0.5, STEPS, 1e-5)
    tight = {name: site.model_copy(update={"budget": Budget(epsilon=spent + 0.01)}) for name, site in sites.items()}
    before, after = private_federation(), private_federation(name="another")
    agent = agents(tmp_path, before, tight)["north"]
    accepted, _ = ask(agent, first_request(before))
    assert isinstance(accepted, RoundReply)
    agent = agents(tmp_path / "later", after, tight)["north"]
    (tmp_path / "sites" / "north" / LEDGER).rename(agent.directory / LEDGER)
    monkeypatch.setattr(client.learning, "train", lambda *_: pytest.fail("it trained"))
    refused, _ = ask(agent, first_request(after))
    assert isinstance(refused, Refusal)
    assert "the budget of this site is ε" in refused.reason
    assert "nothing was computed" in refused.reason
    assert ledger_of(agent).spent(1e-5) == pytest.approx(spent)


def test_several_sites_of_a_hospital_may_name_one_ledger(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    shared = {name: site.model_copy(update={"ledger": tmp_path / "hospital.db"}) for name, site in sites.items()}
    together = coordination(tmp_path / "run", federation, shared)
    reply, _ = ask(together.agents["north"], together.request("north", 1))
    assert isinstance(reply, RoundReply)
    assert len(Ledger(tmp_path / "hospital.db").entries()) == 2  # reserved, released
    assert not (together.agents["north"].directory / LEDGER).exists()


def test_two_directories_of_the_same_patients_pay_for_both_answers(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation, ledger = private_federation(), tmp_path / "hospital.db"
    shared = {"north": sites["north"].model_copy(update={"ledger": ledger})}
    replies = [ask(agents(tmp_path / d, federation, shared)["north"], first_request(federation))[0] for d in "ab"]
    assert all(isinstance(reply, RoundReply) for reply in replies)
    noise = schedule_of(federation).noise
    assert Ledger(ledger).spent(1e-5) == pytest.approx(composed([Charge(noise, 0.5, STEPS)] * 2, 1e-5))


@pytest.mark.parametrize("lost", ["removed", "emptied"])
def test_without_the_ledger_of_earlier_rounds_nothing_is_answered(
    lost: str, tmp_path: Path, sites: dict[str, Site]
) -> None:
    federation = private_federation()
    together = coordination(tmp_path, federation, sites)
    for name in together.round(1):
        ledger = together.agents[name].directory / LEDGER
        for beside in ledger.parent.glob(f"{LEDGER}-*"):
            beside.unlink()
        ledger.unlink()
        if lost == "emptied":
            ledger.touch()
    agent = together.agents["north"]
    refused, _ = ask(Agent.open(agent.directory), together.request("north", 2))
    assert isinstance(refused, Refusal)
    assert refused.reason.startswith("the ledger has no line of the private rounds that were answered here")


def test_the_hospital_sees_what_was_paid_and_by_which_document(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    agent = agents(tmp_path, federation, sites)["north"]
    place = Place.of(agent.directory)
    assert any("spent     ε 0.000" in line for line in spending.shown(place))
    ask(agent, first_request(federation))
    cost = epsilon(schedule_of(federation).noise, 0.5, STEPS, 1e-5)
    lines = list(spending.shown(place))
    assert f"spent     ε {cost:.3f}" in lines
    assert f"{sha256(federation)[:12]}  tiny: ε {cost:.3f} alone, 1 rounds with 4 steps, the last one" in lines[-1]
    assert spending.verified(place).startswith("2 lines, each as it was written")
    assert spending.export(place, tmp_path / "ledger.json") == 2
    exported = json.loads((tmp_path / "ledger.json").read_text())
    assert [line["kind"] for line in exported] == ["reserved", "released"]
    assert exported[1]["previous"] == exported[0]["hash"]


def test_consent_states_the_promise_and_what_it_costs(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation()
    place = Place.of(agents(tmp_path, federation, sites)["north"].directory)
    (tmp_path / "document.yaml").write_text(dump(federation))
    said = "\n".join(sentences(propose(place, tmp_path / "document.yaml")))
    cost = epsilon(schedule_of(federation).noise, 0.5, STEPS * ROUNDS, 1e-5)
    assert "LEAVES: no metric and no loss." in said
    assert "and the mean training loss" not in said
    assert f"PRIVACY, what it costs: At most ε {cost:.3f}" in said
    assert f"BUDGET: this document would cost ε {cost:.3f} of this site's ε 8 at δ 1e-05" in said


def test_a_round_that_fails_costs_nothing(
    tmp_path: Path, sites: dict[str, Site], monkeypatch: pytest.MonkeyPatch
) -> None:
    federation = private_federation()
    agent = agents(tmp_path, federation, sites)["north"]
    with monkeypatch.context() as broken:
        broken.setattr(client.learning, "train", lambda *_: (_ for _ in ()).throw(MmfmError("no")))
        refused, _ = ask(agent, first_request(federation))
    assert isinstance(refused, Refusal)
    assert ledger_of(agent).spent(1e-5) == 0
    reply, _ = ask(agent, first_request(federation))
    assert isinstance(reply, RoundReply)


def test_the_local_head_is_trained_by_the_same_noised_step(tmp_path: Path, sites: dict[str, Site]) -> None:
    """Under much noise its values are noise; a step of its own without any would leave them near the start."""
    kept = {"local": ["heads.*"]}
    quiet = private_federation(parameters=kept, privacy={"epsilon": 8, "noise": 60.0, "delta": 1e-5, "rate": 1.0})
    quiet = Federation.model_validate(
        quiet.model_dump(mode="json")
        | {
            "stages": [
                stage | {"optimizer": {"type": "sgd", "lr": 1.0, "weight_decay": 0.0}}
                for stage in quiet.model_dump(mode="json")["stages"]
            ]
        }
    )
    together = coordination(tmp_path, quiet, sites)
    agent = together.agents["north"]
    reply, _ = ask(agent, together.request("north", 1))
    assert isinstance(reply, RoundReply)
    assert not [name for name in reply.tensors if name.startswith("heads.")]
    kept_state = agent.participate(together.document).state.before(2)
    start = initial_state(quiet)
    moved = np.concatenate([(kept_state[n] - start[n]).ravel() for n in kept_state if n.startswith("heads.")])
    # Four steps of noise, of 60 C over 12 patients each, at learning rate 1; the signal is at most C a step.
    expected = 60.0 / 12 * STEPS**0.5
    assert 0.5 * expected < moved.std() < 2 * expected


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rate": 0}, "privacy.rate"),
        ({"unit": "record"}, "privacy.unit"),
        ({"trust": "central"}, "privacy.trust"),
        ({"delta": 1}, "privacy.delta"),
        ({"epsilon": -1}, "privacy.epsilon"),
    ],
)
def test_privacy_that_is_none_is_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        private_federation(changes)
    assert [".".join(map(str, error["loc"])) for error in refused.value.errors()] == [message]


def with_model(change: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    model: dict[str, Any] = private_federation().model_dump(mode="json")["model"]
    change(model)
    return model


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda m: m["modalities"]["scan"].update(normalize="site"),
            "modalities.scan.normalize: 'site' is a mean over",
        ),
        (
            lambda m: m["modalities"]["labs"]["features"]["crp"].update(normalize="site"),
            "modalities.labs.features.crp.normalize: 'site' is a mean over patients, which has no noise; declare",
        ),
        (
            lambda m: m["heads"].update(disease={"type": "retrieval", "encoders": ["scan", "note"]}),
            "model.heads.disease: retrieval compares patients, so that none has a gradient alone; train masked_image",
        ),
    ],
)
def test_what_mixes_patients_is_refused_by_name(change: Callable[[dict[str, Any]], None], message: str) -> None:
    with pytest.raises(ValidationError) as refused:
        private_federation(model=with_model(change))
    assert message in str(refused.value)


def test_an_adaptation_without_noise_cannot_come_before_a_private_round() -> None:
    stages = private_federation().model_dump(mode="json")["stages"]
    with pytest.raises(ValidationError, match=r"stages\.1: .* has no noise, which later gradients"):
        private_federation(stages=stages[::-1])


def test_a_document_without_privacy_is_as_before(tmp_path: Path, sites: dict[str, Site]) -> None:
    together = coordination(tmp_path, tiny_federation(), sites)
    assert all(reply.epsilon is None and reply.metrics for reply, _ in together.round(1).values())
    assert not (together.agents["north"].directory / LEDGER).exists()


def test_too_little_noise_for_the_epsilon_is_refused_at_every_site(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = private_federation({"noise": 0.3})
    refused, _ = ask(agents(tmp_path, federation, sites)["north"], first_request(federation))
    assert isinstance(refused, Refusal)
    assert "privacy.noise: 8 steps with 0.3 cost ε" in refused.reason


WATCHED = (
    "client/agent.py",
    "client/private.py",
    "client/state.py",
    "mmfm_core/privacy/ledger.py",
    "mmfm_core/storage.py",
)
KILLS = 50


def answer_until(line: int, directory: Path, request: RoundRequest, out: Path) -> None:
    """Answer, and write the number of lines run and the answer's digest; or be killed at the n-th line that is run of
    the files which keep a site's state."""
    agent, seen = Agent.open(directory), 0
    agent.participate(request.federation)

    def trace(frame: FrameType, event: str, _: object) -> Any:
        nonlocal seen
        if not frame.f_code.co_filename.endswith(WATCHED):
            return None
        if event == "line":
            seen += 1
            if seen == line:
                os.kill(os.getpid(), signal.SIGKILL)
        return trace

    sys.settrace(trace)
    reply = agent.answer(request)
    sys.settrace(None)
    out.write_text(f"{seen} {digest(reply.tensors) if isinstance(reply, RoundReply) else reply}")


@pytest.mark.slow
def test_kill_9_at_any_line_never_undercounts_and_never_answers_twice(tmp_path: Path) -> None:
    """After each kill the site starts anew and is asked again, for this round and then for the next one."""
    sites = write_sites(tmp_path / "hospitals", {"north": ("labs",), "south": ("labs",)}, patients=6)
    model = with_model(
        lambda m: [m[part].pop(name) for part in ("modalities", "encoders") for name in ("scan", "note")]
    )
    stage = {"name": "train", "rounds": 60, "local_steps": 1, "batch_size": 32, "tasks": {"disease": {}}}
    federation = private_federation({"noise": 12.0}, model=model, stages=[stage], parameters={"local": ["heads.*"]})
    document, schedule = sha256(federation), schedule_of(federation)
    agent = agents(tmp_path / "run", federation, sites)["north"]
    first, out = first_request(federation), tmp_path / "answer"
    # A server that has imported everything and computed nothing: torch's threads do not survive a fork.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["client.agent", "dp_accounting.rdp", "mmfm_core.models.encoders.feature_tokens"])

    def in_a_child(line: int, number: int) -> str | None:
        out.unlink(missing_ok=True)
        arguments = (line, agent.directory, replace(first, round=number), out)
        child = context.Process(target=answer_until, args=arguments)
        child.start()
        child.join()
        return out.read_text() if child.exitcode == 0 else None

    whole = in_a_child(0, 1)
    assert whole is not None
    lines = int(whole.split()[0])
    assert lines > 200
    answers = {1: whole.split()[1]}
    killed = 0
    for kill in range(KILLS):
        number = kill + 2
        left = in_a_child(1 + kill * lines // KILLS, number)
        killed += left is None
        standing = charged(ledger_of(agent).entries())  # which is intact
        assert left is None or standing[document, number].kind == "released"
        again = agent.answer(replace(first, round=number))
        assert isinstance(again, RoundReply), again
        answers[number] = digest(again.tensors)
        assert left is None or left.split()[1] == answers[number], "two answers to one round"
        standing = charged(ledger_of(agent).entries())
        assert [entry.round for entry in standing.values()] == list(answers)
        assert {entry.kind for entry in standing.values()} == {"released"}
    assert killed > KILLS // 2
    spent = composed([Charge(schedule.noise, schedule.rate, len(answers))], 1e-5)
    assert ledger_of(agent).spent(1e-5) == pytest.approx(spent)
    assert len(set(answers.values())) == len(answers)
    refused = agent.answer(replace(first, round=3))  # of long ago: its answer is not kept any more
    assert isinstance(refused, Refusal)
    assert "answered before" in refused.reason
