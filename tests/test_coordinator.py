"""The coordinator against sites that misbehave: each costs only itself, is named, and the round goes on."""

import errno
import os
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import ConfigRecord, Error, Message, RecordDict
from flwr.clientapp import ClientApp
from rich.console import Console
from tiny import tiny_federation

from mmfm_core import command
from mmfm_core.config import Federation
from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import full_model
from mmfm_core.models.parameters import block_of
from mmfm_core.protocol import (
    Describe,
    Metric,
    Refusal,
    RoundReply,
    RoundRequest,
    SiteDescription,
    from_records,
    to_records,
)
from mmfm_core.storage import Tensors, read_tensors
from server import attendance, exchange, patience
from server.coordinator import coordinate
from server.display import Display, RunProgress
from server.engines.in_process import InProcessGrid
from server.record import Run, read_lines
from server.registry import Registration, Registry

Said = SiteDescription | RoundReply | Refusal | RecordDict | None
Answer = Callable[[Describe | RoundRequest], Said]

QUICK = {"aggregation": {"min_sites": 2, "quorum_wait": 0.3, "deadline": 0.3}}


class FakeGrid(InProcessGrid):
    """Nodes that answer by a call each: with a message, raw records, silence (None), or an exception."""

    def __init__(self, *answers: Answer) -> None:
        super().__init__(ClientApp(), len(answers))
        self._answers = answers
        self.connected = set(range(1, len(answers) + 1))

    def get_node_ids(self) -> Iterable[int]:
        return sorted(self.connected)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        for identifier in message_ids:
            message = self._waiting.pop(identifier, None)
            reply = self._reply_of(message) if message else None
            if reply:
                yield reply

    def _reply_of(self, message: Message) -> Message | None:
        question = from_records(message.content, Describe, RoundRequest)
        try:
            said = self._answers[message.metadata.dst_node_id - 1](question)
        except ValueError as error:
            return Message(Error(2, str(error)), reply_to=message)
        if said is None:
            return None
        return Message(said if isinstance(said, RecordDict) else to_records(said), reply_to=message)


@dataclass
class Site:
    """A site that 'trains' by adding a number, and may spoil its description, or its reply of a round."""

    name: str
    shift: float = 1.0
    studies: int = 10
    modalities: tuple[str, ...] = ("scan", "note", "labs")
    spoil_description: Callable[[SiteDescription], Said] = lambda description: description
    spoil: Mapping[int, Callable[[RoundReply], Said]] = field(default_factory=dict)
    asked: list[int] = field(default_factory=list)

    def __call__(self, question: Describe | RoundRequest) -> Said:
        if isinstance(question, Describe):
            return self.spoil_description(self.description)
        self.asked.append(question.round)
        trains = question.round <= TRAINED
        reply = RoundReply(
            site=self.name,
            round=question.round,
            weights={block_of(name): float(self.studies) for name in question.tensors} if trains else {},
            metrics=[Metric("disease", "shared", "val", "f1", 0.5, 4)],
            loss=0.5 if trains else None,
            seconds=0.1,
            tensors={name: tensor + np.float32(self.shift) for name, tensor in question.tensors.items()}
            if trains
            else {},
        )
        return self.spoil.get(question.round, lambda reply: reply)(reply)

    @property
    def description(self) -> SiteDescription:
        counts = {"train": self.studies, "val": 4, "test": 4}
        labels = {split: {"healthy": n // 2, "ill": n - n // 2} for split, n in counts.items()}
        return SiteDescription(
            self.name,
            counts,
            counts,
            dict.fromkeys(self.modalities, counts),
            {"disease": labels},
            {"disease": counts},
            [],
        )


TRAINED = 2
"""Rounds of `two_rounds()` that train; one more only measures."""


def two_rounds(**changes: Any) -> Federation:
    return tiny_federation(stages=[{"name": "train", "rounds": TRAINED, "tasks": {"disease": {}}}], **changes)


def make_run(folder: Path, federation: Federation, **facts: Any) -> Run:
    return Run.create(folder / "run", federation, **facts)


def mean_after(federation: Federation, rounds: Iterable[Iterable[Site]]) -> Tensors:
    """The shared state after rounds in which exactly these sites counted: FedAvg by hand."""
    state = {
        name: tensor.numpy() for name, tensor in full_model(federation.model, federation.seed).state_dict().items()
    }
    for sites in rounds:
        for name, before in state.items():
            holders = [s for s in sites if not name.startswith("encoders.") or name.split(".")[1] in s.modalities]
            if holders:
                sums = [(before + np.float32(site.shift)).astype(np.float64) * site.studies for site in holders]
                state[name] = (np.sum(sums, axis=0) / sum(site.studies for site in holders)).astype(before.dtype)
    return state


def checkpoint(run: Run, number: int) -> Tensors:
    return read_tensors(run.directory / "checkpoints" / f"round-{number:05d}" / "shared.safetensors")


def assert_same(some: Tensors, others: Tensors) -> None:
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)


def warnings(run: Run) -> list[tuple[str | None, str]]:
    return [(e.get("site"), e["text"]) for e in read_lines(run.events) if e["level"] == "warning"]


def refuse(_reply: RoundReply) -> Refusal:
    return Refusal("other name", "we changed our mind")


def raise_error(_reply: RoundReply) -> Said:
    raise ValueError("broken pipe of the site")


def first_tensor(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[RoundReply], RoundReply]:
    def spoil(reply: RoundReply) -> RoundReply:
        name = next(iter(reply.tensors))
        return replace(reply, tensors=reply.tensors | {name: change(reply.tensors[name])})

    return spoil


MISCHIEF: dict[str, tuple[Callable[[RoundReply], Said], str]] = {
    "refuses": (refuse, "it refused: we changed our mind"),
    "NaN": (first_tensor(lambda tensor: np.full_like(tensor, np.nan)), "not finite"),
    "infinity in one place": (first_tensor(lambda t: np.where(t == t.flat[0], np.inf, t)), "not finite"),
    "wrong shape": (first_tensor(lambda tensor: tensor[..., None]), "expected float32"),
    "wrong type": (first_tensor(lambda tensor: tensor.astype(np.float64)), "is float64"),
    "extra tensor": (
        lambda reply: replace(reply, tensors=reply.tensors | {"extra": np.zeros(2, np.float32)}),
        "1 were not asked for",
    ),
    "missing tensor": (
        lambda reply: replace(reply, tensors=dict(list(reply.tensors.items())[1:])),
        "1 tensors are missing",
    ),
    "weight above its studies": (
        lambda reply: replace(reply, weights=dict.fromkeys(reply.weights, 1e6)),
        "not between 0 and its 10 training studies",
    ),
    "negative weight": (lambda reply: replace(reply, weights=dict.fromkeys(reply.weights, -1.0)), "not between 0"),
    "unknown block": (lambda reply: replace(reply, weights=reply.weights | {"x": 1.0}), "do not name the blocks"),
    "another round": (lambda reply: replace(reply, round=reply.round + 1), "it answers round 2, not 1"),
    "unknown head measured": (
        lambda reply: replace(reply, metrics=[replace(reply.metrics[0], task="age")]),
        "a head that the document does not have",
    ),
    "description instead": (lambda reply: Site(reply.site).description, "an answer of another kind"),
    "no message": (lambda _reply: RecordDict({"x": ConfigRecord({"y": 1})}), "the message is damaged"),
    "no JSON": (
        lambda _reply: RecordDict({"message": ConfigRecord({"type": "RoundReply", "json": "{"})}),
        "RoundReply is malformed",
    ),
    "raises": (raise_error, "Flower reports: broken pipe of the site"),
    "never answers": (lambda _reply: None, "no answer within 0.3 s"),
}


@pytest.mark.parametrize(("spoil", "reason"), MISCHIEF.values(), ids=MISCHIEF)
def test_a_bad_reply_costs_only_its_own_site(spoil: Callable[[RoundReply], Said], reason: str, tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    good = Site("north", shift=0.5), Site("south", shift=-0.25, studies=6, modalities=("note",))
    bad = Site("west", shift=100, spoil={1: spoil})
    run = make_run(tmp_path, federation, expected_sites=3)
    coordinate(FakeGrid(good[0], bad, good[1]), run)

    ((site, text),) = warnings(run)
    assert site == "west"
    assert reason in text
    assert_same(checkpoint(run, 2), mean_after(federation, [good, [*good, bad]]))
    assert run.facts["status"] == "completed"
    lines = list(read_lines(run.metrics))
    assert {line["site"] for line in lines if line["round"] == 1} == {"north", "south", "federation"}
    counted = {line["round"]: line["value"] for line in lines if line["metric"] == "sites"}
    assert counted == {1: 2, 2: 3, 3: 3}


def test_a_void_round_is_asked_again_and_leaves_no_trace(tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    sites = Site("north"), Site("south", shift=3)

    def refuse_once(reply: RoundReply) -> Said:
        return refuse(reply) if sites[1].asked == [1] else reply

    sites[1].spoil = {1: refuse_once}
    run = make_run(tmp_path, federation)
    coordinate(FakeGrid(*sites), run)

    assert ("south", "is left out: it refused: we changed our mind") in warnings(run)
    assert any("round 1 is void: fewer than 2 usable replies (attempt 1 of 3)" in text for _, text in warnings(run))
    assert_same(checkpoint(run, 2), mean_after(federation, [sites, sites]))
    first = [line for line in read_lines(run.metrics) if line["round"] == 1 and line["metric"] == "loss"]
    assert [line["site"] for line in first] == ["north", "south"]


@pytest.mark.parametrize("failing", [1, 2], ids=["one of two", "all"])
def test_a_round_that_comes_to_nothing_fails_with_its_cause_and_can_be_resumed(failing: int, tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    run = make_run(tmp_path, federation)
    bad = [Site(name, spoil={2: refuse} if i < failing else {}) for i, name in enumerate(("south", "north"))]
    with pytest.raises(MmfmError, match=r"round 2 came to nothing 3 times.*events\.jsonl"):
        coordinate(FakeGrid(*bad), run)
    assert run.facts["status"] == "failed"
    assert "round 2 came to nothing" in run.facts["cause"]
    assert [line["round"] for line in read_lines(run.metrics) if line["metric"] == "sites"] == [1]

    sites = Site("south"), Site("north")
    coordinate(FakeGrid(*sites), run)
    assert run.facts["status"] == "completed"
    assert run.facts["cause"] is None
    assert sites[0].asked == [2, 3]
    assert_same(checkpoint(run, 2), mean_after(federation, [sites, sites]))


def test_a_run_whose_disk_is_full_still_says_why_it_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between one byte of room and none, whatever was written last: here nothing can be until something is deleted."""
    federation, full = two_rounds(**QUICK), set()
    run = make_run(tmp_path, federation)
    flush, files = os.fsync, lambda: {path for path in run.directory.rglob("*") if ".partial-" not in str(path)}

    def on_a_full_disk(descriptor: int) -> None:
        if full and full <= files():
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        flush(descriptor)

    def fills_up(reply: RoundReply) -> RoundReply:
        full.update(files())
        return reply

    monkeypatch.setattr(os, "fsync", on_a_full_disk)
    with pytest.raises(MmfmError, match="cannot be written"):
        coordinate(FakeGrid(Site("north"), Site("south", spoil={2: fills_up})), run)
    assert run.facts["status"] == "failed"
    assert "No space left on device); make room" in run.facts["cause"]
    full.clear()

    sites = Site("north"), Site("south")
    coordinate(FakeGrid(*sites), run)
    assert run.facts["status"] == "completed"
    assert_same(checkpoint(run, 2), mean_after(federation, [sites, sites]))


def test_a_last_look_needs_one_site_only(tmp_path: Path) -> None:
    run = make_run(tmp_path, two_rounds(**QUICK))
    coordinate(FakeGrid(Site("north"), Site("south", spoil={3: refuse})), run)
    assert run.facts["status"] == "completed"


def test_a_late_site_takes_part_from_the_next_round(tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    sites = Site("north"), Site("south", shift=2), Site("late", shift=-1, studies=4)

    def join(reply: RoundReply) -> RoundReply:
        grid.connected.add(3)
        return reply

    sites[0].spoil = {1: join}
    grid, run = FakeGrid(*sites), make_run(tmp_path, federation)
    grid.connected.discard(3)
    coordinate(grid, run)
    assert sites[2].asked == [2, 3]
    assert_same(checkpoint(run, 2), mean_after(federation, [sites[:2], sites]))
    assert list(run.facts["sites"]) == ["north", "south", "late"]
    told = [(e["site"], e["text"]) for e in read_lines(run.events)]
    assert told == [("late", "takes part from round 2 on")]


def test_a_site_that_leaves_is_not_waited_for_and_may_come_back_as_another_node(tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    stays, other, leaves, comes = Site("stays"), Site("other"), Site("leaves", shift=5), Site("leaves", shift=7)

    def change_nodes(reply: RoundReply) -> RoundReply:
        grid.connected = {1: {1, 2}, 2: {1, 2, 4}}[reply.round]
        return reply

    other.spoil = dict.fromkeys((1, 2), change_nodes)
    grid, run = FakeGrid(stays, other, leaves, comes), make_run(tmp_path, federation)
    grid.connected.discard(4)
    coordinate(grid, run)
    assert (leaves.asked, comes.asked) == ([1], [3])
    assert_same(checkpoint(run, 2), mean_after(federation, [(stays, other, leaves), (stays, other)]))
    assert warnings(run) == [("leaves", "is not connected any more")]


def test_of_two_nodes_with_one_name_the_second_is_left_out(tmp_path: Path) -> None:
    federation = two_rounds(**QUICK)
    sites = Site("north"), Site("south"), Site("south", shift=50)
    run = make_run(tmp_path, federation)
    coordinate(FakeGrid(*sites), run)
    assert warnings(run) == [("south", "is left out: another node with the same site name is here already")]
    assert sites[2].asked == []
    assert_same(checkpoint(run, 2), mean_after(federation, [sites[:2], sites[:2]]))


DESCRIPTIONS: dict[str, tuple[Callable[[SiteDescription], Said], str]] = {
    "refuses": (lambda _: Refusal("west", "not approved"), "it refused: not approved"),
    "no split": (lambda d: replace(d, studies={"train": 3}), "does not count the studies of every split"),
    "negative": (lambda d: replace(d, studies=d.studies | {"test": -1}), "does not count"),
    "no class": (
        lambda d: replace(d, targets={"disease": {split: {"ill": 3} for split in d.studies}}),
        "does not count",
    ),
    "no split of a target": (lambda d: replace(d, targets={"disease": {}}), "does not count"),
    "unknown modality": (lambda d: replace(d, modalities=d.modalities | {"x": d.studies}), "modalities or targets"),
    "unknown head": (lambda d: replace(d, targets=d.targets | {"x": {}}), "modalities or targets"),
    "path for a name": (lambda d: replace(d, site="../west"), "no usable name"),
    "reserved name": (lambda d: replace(d, site="federation"), "no usable name"),
    "silence": (lambda _: None, "no answer within 0.3 s"),
    "a reply instead": (lambda _: RoundReply("west", 1, {}, [], None, 0.0), "an answer of another kind"),
}


@pytest.mark.parametrize(("spoil", "reason"), DESCRIPTIONS.values(), ids=DESCRIPTIONS)
def test_a_bad_description_costs_only_its_own_site(
    spoil: Callable[[SiteDescription], Said], reason: str, tmp_path: Path
) -> None:
    run = make_run(tmp_path, two_rounds(**QUICK), expected_sites=3)
    bad = Site("west", spoil_description=spoil)
    coordinate(FakeGrid(Site("north"), bad, Site("south")), run)
    ((_, text),) = warnings(run)
    assert text.startswith("is left out: ")
    assert reason in text
    assert bad.asked == []
    assert list(run.facts["sites"]) == ["north", "south"]


def test_too_few_sites_fail_at_once_where_all_have_answered_and_after_a_wait_where_not(tmp_path: Path) -> None:
    patient = {"aggregation": {"min_sites": 2, "quorum_wait": 60.0, "deadline": 0.3}}
    refusing = Site("south", spoil_description=lambda _: Refusal("south", "no"))
    run = make_run(tmp_path / "all", two_rounds(**patient), expected_sites=2)
    started = time.monotonic()
    with pytest.raises(MmfmError, match=r"1 sites are ready and aggregation\.min_sites is 2"):
        coordinate(FakeGrid(Site("north"), refusing), run)
    assert time.monotonic() - started < 50
    assert run.facts["status"] == "failed"

    run = make_run(tmp_path / "some", two_rounds(**QUICK))
    with pytest.raises(MmfmError, match="1 sites are ready"):
        coordinate(FakeGrid(Site("north")), run)


def test_a_site_that_no_one_can_replace_is_named_before_anything_trains(tmp_path: Path) -> None:
    run = make_run(tmp_path, two_rounds(**QUICK))
    sites = Site("north", modalities=("note",)), Site("south", modalities=("labs",))
    with pytest.raises(MmfmError, match=r"model\.modalities\.scan: no site holds it"):
        coordinate(FakeGrid(*sites), run)
    assert not sites[0].asked


def test_the_deadline_is_no_limit_for_sites_that_work_one_after_the_other(tmp_path: Path) -> None:
    def slow(reply: RoundReply) -> RoundReply:
        time.sleep(0.25)
        return reply

    federation = two_rounds(aggregation=QUICK["aggregation"] | {"min_sites": 3})
    sites = [Site(name, spoil={1: slow}) for name in ("north", "south", "west")]
    run = make_run(tmp_path, federation)

    class OneAfterTheOther(FakeGrid):
        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return super().pull_messages(list(message_ids)[:1])

    coordinate(OneAfterTheOther(*sites), run)
    assert not warnings(run)
    assert_same(checkpoint(run, 2), mean_after(federation, [sites, sites]))


def test_a_question_that_flower_cannot_send_costs_only_its_site(tmp_path: Path) -> None:
    class Lossy(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            identifiers = list(super().push_messages(messages))
            return [] if "message-4" in identifiers else identifiers  # the first round's, to the first site

    run = make_run(tmp_path, two_rounds(**QUICK))
    coordinate(Lossy(Site("north"), Site("south"), Site("west")), run)
    assert warnings(run) == [("north", "is left out: Flower could not send it the question")]


def test_what_a_site_says_is_shown_as_it_is_and_obeyed_by_no_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = "[red]no[/red] \x1b[2J\nfederation: completed [/]" + "x" * 10_000
    run = make_run(tmp_path, two_rounds(**QUICK))
    progress = RunProgress("federation", run, 3, 3)
    bad = Site("west", spoil={1: lambda _: Refusal("west", words)})
    coordinate(FakeGrid(Site("north"), Site("south"), bad), run)
    screen = StringIO()
    with Display([progress], Console(file=screen, width=200, force_terminal=False)):
        pass
    (shown,) = [line for line in screen.getvalue().splitlines() if line.startswith("warning")]
    assert shown.startswith("warning: west: is left out: it refused: [red]no[/red]  [2J federation: completed [/]xxx")
    assert "\x1b" not in screen.getvalue()
    assert len(shown) < 1000

    def fail() -> Callable[[], None]:
        raise MmfmError("[red]no[/red] [/]")

    monkeypatch.setattr(command, "build", fail)
    with pytest.raises(SystemExit):
        command.main()
    assert capsys.readouterr().err == "error: [red]no[/red] [/]\n"


def test_a_document_without_a_federated_stage_needs_no_quorum(tmp_path: Path) -> None:
    adapt = [{"name": "adapt", "federated": False, "tasks": {"disease": {}}}]
    federation = tiny_federation(stages=adapt, **QUICK)
    assert len(rounds_of(federation)) == 1
    run = make_run(tmp_path, federation)
    coordinate(FakeGrid(Site("north", spoil={1: lambda reply: replace(reply, tensors={}, weights={})})), run)
    assert run.facts["status"] == "completed"
    assert_same(checkpoint(run, 1), mean_after(federation, []))


def test_a_line_cut_off_by_a_crash_is_dropped_on_resume(tmp_path: Path) -> None:
    run = make_run(tmp_path, two_rounds(**QUICK))
    with pytest.raises(MmfmError):
        coordinate(FakeGrid(Site("north", spoil={2: refuse}), Site("south")), run)
    for path in (run.metrics, run.events):
        with path.open("a") as file:
            file.write('{"round": 1, "cut')
    coordinate(FakeGrid(Site("north"), Site("south")), run)
    run.tell("the end")
    assert [event["text"] for event in read_lines(run.events)][-1] == "the end"
    assert [line["round"] for line in read_lines(run.metrics) if line["metric"] == "sites"] == [1, 2, 3]


def test_a_site_that_let_a_deadline_pass_is_waited_for_less_until_it_answers_in_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.modules[__name__], "TRAINED", 4)
    monkeypatch.setattr(patience, "SHORTEST", 0.9)
    lives: dict[int, list[float]] = {1: [], 2: []}

    class Noting(FakeGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            messages = list(messages)
            for message in messages:
                if message.metadata.message_type == "train":
                    lives[message.metadata.dst_node_id].append(message.metadata.ttl)
            return super().push_messages(messages)

    federation = two_rounds(aggregation={"min_sites": 1, "quorum_wait": 0.3, "deadline": 1.0})
    slow = Site("south", spoil={2: lambda _: None})
    coordinate(Noting(Site("north"), slow), make_run(tmp_path, federation))
    assert lives[1] == [1.0] * 5
    assert lives[2] == [1.0, 1.0, 0.9, 1.0, 1.0]


def test_only_enrolled_sites_are_asked_and_by_the_name_they_are_enrolled_under(tmp_path: Path) -> None:
    registry = Registry(tmp_path / "sites.json")
    sites = [Site(name) for name in ("north", "south", "stranger", "liar")]
    for node, name in ((1, "north"), (2, "south"), (4, "west")):
        registry.add(Registration(name, node, f"key {node}", 0.0))
    sites[1].spoil = {1: lambda reply: registry.revoke("south") or reply}
    run = make_run(
        tmp_path,
        two_rounds(aggregation={"min_sites": 1, "quorum_wait": 0.3, "deadline": 0.3}),
        registry=str(registry.path),
    )
    coordinate(FakeGrid(*sites), run)
    assert [site.asked for site in sites] == [[1, 2, 3], [1], [], []]
    told = {line["site"]: line["text"] for line in read_lines(run.events)}
    assert "it calls itself 'liar'" in told["west"]
    assert told["south"] == "is not enrolled any more"
    assert told.keys() == {"west", "south"}


def test_a_site_that_refused_is_asked_again_later(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attendance, "ASK_AGAIN_SECONDS", 0.0)
    answers: list[Said] = [Refusal("south", "not approved"), Refusal("south", "not approved")]
    south = Site("south", spoil_description=lambda description: answers.pop() if answers else description)
    run = make_run(tmp_path, two_rounds(aggregation={"min_sites": 1, "quorum_wait": 0.3, "deadline": 0.3}))
    coordinate(FakeGrid(Site("north"), south), run)
    assert south.asked == [2, 3]
    assert any("takes part from round 2 on" in line["text"] for line in read_lines(run.events))


def test_the_deadline_counts_from_before_a_question_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that took a minute to send it once made a round of 180 s last 243."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            return self.now

        def sleep(self, seconds: float) -> None:
            self.now += seconds

    clock = Clock()

    class Sluggish(InProcessGrid):
        def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
            clock.now += 60
            return super().push_messages(messages)

        def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
            return []

    monkeypatch.setattr(exchange, "time", clock)
    grid = Sluggish(ClientApp(), 1)
    (answer,) = exchange.ask(grid, [1], lambda _: to_records(Describe("a" * 64)), "query", 180.0)
    assert answer.problem == "no answer within 180 s"
    assert 180 < clock.now < 180 + 2 * exchange.LONGEST_POLL
