"""The agent behind its socket: what is asked comes through, and what is not a question is refused one by one."""

import os
import random
import socket as sockets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import grpc
import numpy as np
import pytest
from test_agent import Coordination, agents
from tiny import tiny_federation, write_sites

import client.agent
import client.relay
from client import wire
from client.learning import Learned
from client.loading import arrays
from client.relay import METHOD, Answer, Question, ask_at
from client.service import Service, is_served, serving
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, RoundReply, RoundRequest, SiteDescription
from mmfm_core.storage import Tensors

DOCUMENT = "a" * 64


@dataclass
class Echo:
    """Stands where an agent does: sends back the tensors it received, and notes what it was asked."""

    asked: list[Question] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)
    before: Callable[[], object] = lambda: None

    def answer(self, question: Question) -> Answer:
        self.asked.append(question)
        self.before()
        tensors = question.tensors if isinstance(question, RoundRequest) else {}
        return RoundReply("north", getattr(question, "round", 0), {}, [], None, 0.0, tensors)

    def refuse(self, reason: str) -> Refusal:
        self.refused.append(reason)
        return Refusal("north", reason)


@contextmanager
def served(folder: Path, echo: Echo, **how: float) -> Iterator[Path]:
    socket = folder / "agent.sock"
    with serving(socket, Service(echo, **how)):
        yield socket


def ask(socket: Path, question: Question, seconds: float = 60) -> Answer:
    return ask_at(socket, seconds)(question)


def tensors(rng: np.random.Generator) -> Tensors:
    return {
        "weight": rng.normal(size=(300, 1000)).astype(np.float32),  # more than one chunk
        "half": rng.normal(size=(3, 5)).astype(np.float16),
        "count": np.array(7, np.int64),
        "flags": np.array([[True], [False]]),
        "turned": rng.normal(size=(4, 6)).T,
        "none": np.zeros((0, 3), np.float32),
        "": np.ones(1, np.uint8),
    }


def test_what_is_asked_and_answered_comes_through_whole(tmp_path: Path) -> None:
    echo = Echo()
    sent = tensors(np.random.default_rng(0))
    with served(tmp_path, echo) as socket:
        reply = ask(socket, RoundRequest(DOCUMENT, 3, sent))
        described = ask(socket, Describe(DOCUMENT))
    assert isinstance(reply, RoundReply)
    assert (reply.site, reply.round, described.site) == ("north", 3, "north")
    assert list(reply.tensors) == list(sent)
    for name, tensor in sent.items():
        got = reply.tensors[name]
        assert (got.dtype, got.shape, got.tobytes()) == (tensor.dtype, tensor.shape, tensor.tobytes())
    assert [type(question) for question in echo.asked] == [RoundRequest, Describe]


def test_only_the_owner_and_the_group_can_connect(tmp_path: Path) -> None:
    with served(tmp_path / "run", Echo()) as socket:
        assert stat.S_IMODE(socket.stat().st_mode) == 0o660
        assert not stat.S_IMODE(socket.parent.stat().st_mode) & 0o007
        assert is_served(socket)
    assert not socket.exists()
    assert not is_served(socket)


def test_a_socket_is_taken_over_from_an_agent_that_was_killed_and_from_no_other(tmp_path: Path) -> None:
    stale = sockets.socket(sockets.AF_UNIX)
    stale.bind(str(tmp_path / "agent.sock"))
    stale.close()
    with served(tmp_path, Echo()) as socket:
        with pytest.raises(MmfmError, match="another agent serves there"), served(tmp_path, Echo()):
            pass
        assert isinstance(ask(socket, Describe(DOCUMENT)), RoundReply), "the first one was not disturbed"
    socket.write_text("mine")
    with pytest.raises(MmfmError, match="is no socket"), served(tmp_path, Echo()):
        pass
    assert socket.read_text() == "mine"


def test_places_that_cannot_be_a_safe_socket_are_refused(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match="at most 107 bytes"), served(tmp_path / ("x" * 120), Echo()):
        pass
    (tmp_path / "open").mkdir()
    (tmp_path / "open").chmod(0o777)
    with pytest.raises(MmfmError, match="anybody may write"), served(tmp_path / "open", Echo()):
        pass


def test_requests_are_worked_on_one_after_the_other(tmp_path: Path) -> None:
    at_once, most = 0, 0

    def work() -> None:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.05)
        at_once -= 1

    with served(tmp_path, Echo(before=work)) as socket:
        threads = [threading.Thread(target=ask, args=(socket, Describe(DOCUMENT))) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert most == 1


def test_a_relay_that_finds_nobody_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client.relay, "CONNECT_SECONDS", 0.2)
    with pytest.raises(MmfmError, match="does not answer at its socket"):
        ask(tmp_path / "agent.sock", Describe(DOCUMENT))


def test_a_relay_waits_no_longer_than_the_message_lives(tmp_path: Path) -> None:
    done = threading.Event()
    with served(tmp_path, Echo(before=lambda: done.wait(30))) as socket:
        with pytest.raises(MmfmError, match="did not answer within 1 s"):
            ask(socket, Describe(DOCUMENT), seconds=1)
        done.set()
        assert isinstance(ask(socket, Describe(DOCUMENT)), RoundReply)


def test_work_beyond_the_sites_limit_is_refused_and_ends_the_agent(tmp_path: Path) -> None:
    done = threading.Event()
    echo = Echo(before=lambda: done.wait(30))
    service = Service(echo, seconds=0.2)
    with serving(tmp_path / "agent.sock", service):
        answer = ask(tmp_path / "agent.sock", Describe(DOCUMENT))
        assert isinstance(answer, Refusal)
        assert "limits.seconds" in answer.reason
        assert echo.refused == [answer.reason]
        assert service.overdue.is_set()
        done.set()


def raw(socket: Path, chunks: list[bytes]) -> Answer:
    """What the agent answers to these very bytes."""
    with grpc.insecure_channel(f"unix:{socket}") as channel:
        return wire.received(
            channel.stream_stream(METHOD)(iter(chunks), timeout=30), RoundReply, Refusal, SiteDescription
        )


def head(text: str) -> bytes:
    return len(text.encode()).to_bytes(8, "big") + text.encode()


DECLARED = '{"kind": "RoundRequest", "text": "{\\"federation\\": \\"x\\", \\"round\\": 1}", "tensors": [%s]}'
GARBAGE: dict[str, tuple[list[bytes], str]] = {
    "nothing": ([], "ends before"),
    "a huge head": ([b"\xff" * 8], "head is larger"),
    "no JSON": ([head("{")], "damaged"),
    "deep JSON": ([head("[" * 100_000)], "damaged"),
    "a list": ([head("[]")], "malformed"),
    "another key": ([head('{"kind": "Describe", "text": "{}", "tensors": [], "code": "x"}')], "malformed"),
    "another kind": ([head('{"kind": "Refusal", "text": "{}", "tensors": []}')], "another kind of message"),
    "a code object": ([head(DECLARED % '{"name": "w", "dtype": "|O", "shape": [1]}'), b"x" * 8], "not of numbers"),
    "a record": ([head(DECLARED % '{"name": "w", "dtype": "i4,f8", "shape": [1]}')], "not of numbers"),
    "a wrong type": ([head(DECLARED % '{"name": "w", "dtype": "quux", "shape": [1]}')], "damaged"),
    "a negative size": ([head(DECLARED % '{"name": "w", "dtype": "<f4", "shape": [-1]}')], "malformed"),
    "too large": ([head(DECLARED % '{"name": "w", "dtype": "<f4", "shape": [99999999999]}')], "larger than"),
    "impossible": ([head(DECLARED % f'{{"name": "w", "dtype": "<f4", "shape": [0, {10**30}]}}')], "too large"),
    "twice": ([head(DECLARED % ", ".join(['{"name": "w", "dtype": "<f4", "shape": [0]}'] * 2))], "twice"),
    "too short": ([head(DECLARED % '{"name": "w", "dtype": "<f4", "shape": [2]}'), b"1234567"], "ends before"),
    "too long": ([head(DECLARED % '{"name": "w", "dtype": "<f4", "shape": [2]}'), b"123456789"], "more bytes than"),
}


@pytest.fixture(scope="module")
def standing(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Echo]]:
    echo = Echo()
    with served(tmp_path_factory.mktemp("standing"), echo) as socket:
        yield socket, echo


@pytest.mark.parametrize(("chunks", "said"), GARBAGE.values(), ids=GARBAGE.keys())
def test_garbage_is_refused_with_a_reason(standing: tuple[Path, Echo], chunks: list[bytes], said: str) -> None:
    socket, echo = standing
    before = len(echo.asked)
    answer = raw(socket, chunks)
    assert isinstance(answer, Refusal)
    assert said in answer.reason
    assert echo.refused[-1] == answer.reason
    assert len(echo.asked) == before


def test_bytes_that_are_not_even_a_call_disturb_nobody(standing: tuple[Path, Echo]) -> None:
    socket, _ = standing
    for said in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(4096), b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + os.urandom(512)):
        with sockets.socket(sockets.AF_UNIX) as other:
            other.connect(str(socket))
            other.sendall(said)
    assert isinstance(ask(socket, Describe(DOCUMENT)), RoundReply)


def test_five_hundred_mutated_messages_are_rejected_singly(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before a real agent: what it accepts after all differs from a proper request in numbers alone."""
    monkeypatch.setattr(client.agent, "learn", lambda model, *_: Learned(0.0, arrays(model)))
    sites = write_sites(tmp_path / "hospitals")
    coordination = Coordination(tiny_federation(), agents(tmp_path / "run", tiny_federation(), sites))
    question, agent = coordination.request("south", 1), coordination.agents["south"]
    like = {name: (tensor.dtype, tensor.shape) for name, tensor in question.tensors.items()}
    whole = b"".join(wire.chunks(question))
    size = 8 + int.from_bytes(whole[:8], "big")
    rng = random.Random(6)  # noqa: S311 (no secret)
    accepted = 0
    with serving(tmp_path / "agent.sock", Service(agent)), grpc.insecure_channel(f"unix:{tmp_path}/agent.sock") as to:
        call = to.stream_stream(METHOD)
        for _ in range(500):
            mutated = mutate(rng, whole, size)
            answer = wire.received(call(iter([mutated]), timeout=60), RoundReply, Refusal)
            if isinstance(answer, Refusal):
                assert answer.site == "south"
                assert answer.reason
                continue
            accepted += 1
            taken = wire.received([mutated], RoundRequest)
            assert taken.federation == question.federation
            assert {name: (tensor.dtype, tensor.shape) for name, tensor in taken.tensors.items()} == like
            assert answer.tensors.keys() == like.keys()
    assert accepted < 250
    assert len(list(agent.egress.entries())) == 500 + 1  # and the description that `Coordination` asked for
    assert isinstance(agent.answer(question), RoundReply)


def mutate(rng: random.Random, whole: bytes, head: int) -> bytes:
    """A message after one or a few accidents, the first of them in its `head` bytes that say what it is."""
    data = bytearray(whole)
    for accident in range(rng.randint(1, 3)):
        place = rng.randrange(len(data) if accident else head)
        match rng.randrange(5):
            case 0:
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                data[place] = rng.randrange(256)
            case 2:
                del data[place : place + rng.randint(1, 20)]
            case 3:
                data[place:place] = rng.randbytes(rng.randint(1, 20))
            case _:
                data = data[:place] or bytearray(b"\0")
    return bytes(data)


def test_a_large_model_passes_in_chunks(tmp_path: Path) -> None:
    """Larger than what gRPC lets one message be, which is 4 MB."""
    model = {"w": np.random.default_rng(1).integers(0, 255, 48 << 20, np.uint8)}
    assert max(map(len, wire.chunks(RoundRequest(DOCUMENT, 1, model)))) == wire.CHUNK
    with served(tmp_path, Echo()) as socket:
        reply = ask(socket, RoundRequest(DOCUMENT, 1, model))
    assert isinstance(reply, RoundReply)
    assert (reply.tensors["w"] == model["w"]).all()
