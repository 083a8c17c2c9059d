"""The agent's service on a Unix socket: one request at a time, from whoever the socket's owner and mode let in."""

import contextvars
import fcntl
import logging
import os
import socket as sockets
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Protocol

import grpc

from client import wire
from client.logs import about
from client.relay import LONGEST_PATH, METHOD, Answer, Question
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe, Refusal, RoundRequest

WAITING = 4  # requests at once: one is worked on, a few wait, the others are turned away
TRANSFER_SECONDS = 600.0  # for a message to arrive, or to be taken
GRACE_SECONDS = 5.0

log = logging.getLogger(__name__)


class Answering(Protocol):
    """What stands behind the service: an agent."""

    def answer(self, question: Question) -> Answer:
        """Answer, or refuse."""

    def refuse(self, reason: str) -> Refusal:
        """Refuse what was not even a question."""


class Service:
    """The one method that a relay can call: a question's chunks in, an answer's chunks out.

    Attributes:
        overdue: set once a request took longer than `seconds`; the process must end then, as work cannot be stopped.
    """

    def __init__(self, agent: Answering, seconds: float | None = None, largest: int = wire.LARGEST_MESSAGE) -> None:
        self._agent, self._seconds, self._largest = agent, seconds, largest
        self._turn = threading.Lock()
        self._worker = ThreadPoolExecutor(1)
        self.overdue = threading.Event()

    def ask(self, stream: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        """Handle one call."""
        if not self._my_turn(context):
            return
        try:
            answer = self._answer(stream, context)
            with _no_longer_than(TRANSFER_SECONDS, context):
                yield from wire.chunks(answer)
        finally:
            self._turn.release()

    def _my_turn(self, context: grpc.ServicerContext) -> bool:
        # A relay that went away while it waited is not worked for.
        while context.is_active() and not self.overdue.is_set():
            if self._turn.acquire(timeout=0.5):
                return True
        return False

    def _answer(self, stream: Iterator[bytes], context: grpc.ServicerContext) -> Answer:
        try:
            with _no_longer_than(TRANSFER_SECONDS, context):
                question = wire.received(stream, Describe, RoundRequest, largest=self._largest)
        except MmfmError as error:
            log.warning("refused a message: %s", error)
            return self._agent.refuse(error.told)
        except Exception as error:  # how grpc says that the other side hung up is a bare Exception
            log.warning("a message broke off (%s)", type(error).__name__)
            return self._agent.refuse("the message broke off")
        assert isinstance(question, Describe | RoundRequest)
        return self._work(question)

    def _work(self, question: Question) -> Answer:
        with about(document=question.federation[:64], round=getattr(question, "round", None)):
            started = time.monotonic()
            work = self._worker.submit(contextvars.copy_context().run, self._agent.answer, question)
            try:
                answer = work.result(self._seconds)
            except TimeoutError:
                log.critical(
                    "took longer than limits.seconds, %g s; this agent ends and must be started anew", self._seconds
                )
                self.overdue.set()
                return self._agent.refuse(
                    f"the request took longer than the {self._seconds:g} s that this site allows (limits.seconds)"
                )
            log.info("%s was answered by %s in %.1f s", *_kinds(question, answer), time.monotonic() - started)
            return answer


def _kinds(question: Question, answer: Answer) -> tuple[str, str]:
    return type(question).__name__, type(answer).__name__


@contextmanager
def serving(socket: Path, service: Service) -> Iterator[None]:
    """Serve at a socket, which is this user's and its group's alone, until the block ends.

    Raises:
        MmfmError: the path cannot be a socket, another agent serves there, or others may write to its folder.
    """
    with _held(socket):
        server = grpc.server(
            ThreadPoolExecutor(WAITING),
            maximum_concurrent_rpcs=WAITING,
            options=[
                ("grpc.max_receive_message_length", 2 * wire.CHUNK),
                ("grpc.http2.min_ping_interval_without_data_ms", 10_000),
                ("grpc.keepalive_permit_without_calls", 1),
            ],
        )
        service_name, method = METHOD.strip("/").split("/")
        handler = grpc.stream_stream_rpc_method_handler(service.ask)
        server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(service_name, {method: handler}),))
        mask = os.umask(0o117)  # from its first moment nobody else can connect
        try:
            server.add_insecure_port(f"unix:{socket}")
        finally:
            os.umask(mask)
        server.start()
        try:
            yield
        finally:
            server.stop(GRACE_SECONDS).wait(2 * GRACE_SECONDS)  # without memory for a thread it would not end
            socket.unlink(missing_ok=True)


@contextmanager
def _held(socket: Path) -> Iterator[None]:
    """The place of a socket, made ready and held for this process."""
    if len(os.fsencode(socket)) > LONGEST_PATH:
        raise MmfmError(
            f"a socket's path has at most {LONGEST_PATH} bytes; name a shorter one with --socket", str(socket)
        )
    socket.parent.mkdir(mode=0o750, parents=True, exist_ok=True)
    if socket.parent.stat().st_mode & stat.S_IWOTH:
        raise MmfmError("anybody may write to this folder, and so replace the socket; name another", str(socket.parent))
    with socket.with_name(f"{socket.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise MmfmError("another agent serves there; stop it first", str(socket)) from error
        if socket.exists():
            if not stat.S_ISSOCK(socket.lstat().st_mode):
                raise MmfmError("is there and is no socket; name another place with --socket", str(socket))
            socket.unlink()  # of an agent that was killed
        yield


def is_served(socket: Path) -> bool:
    """Whether an agent listens at a socket, as far as this user may see."""
    with sockets.socket(sockets.AF_UNIX) as probe, suppress(OSError):
        probe.connect(str(socket))
        return True
    return False


@contextmanager
def _no_longer_than(seconds: float, context: grpc.ServicerContext) -> Iterator[None]:
    cancel: Callable[[], object] = context.cancel
    timer = threading.Timer(seconds, cancel)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()
