"""Processes that work side by side for one that waits: forked warm, with everything loaded, and none left at the end.

Forked, because a new process imports torch for seconds and its first optimiser costs as much again, while these share
their parent's libraries and data until somebody writes to them. That is safe before anything was trained here, with one
thread: torch's own threads do not outlive a fork.
"""

import ctypes
import gc
import os
import signal
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Generic, TypeVar

import torch

from mmfm_core.errors import MmfmError

Question = TypeVar("Question")
Answer = TypeVar("Answer")

AHEAD = 2  # questions of each worker that are worked on or answered, and whose answers were not taken yet
SET_PARENT_DEATH_SIGNAL = 1  # PR_SET_PDEATHSIG of Linux's prctl


@dataclass(frozen=True)
class Worker:
    """One process."""

    process: int
    line: Connection


class Crew(Generic[Question, Answer]):
    """Workers that take questions in their order, whoever is free; answers are given in that order too."""

    def __init__(self, workers: list[Worker]) -> None:
        self._workers = workers
        self._asked: deque[tuple[str, Question]] = deque()
        self._working: dict[Connection, str] = {}
        self._answers: dict[str, Answer] = {}

    def ask(self, key: str, question: Question) -> None:
        """Queue a question."""
        self._asked.append((key, question))
        self._hand_out()

    def take(self, key: str) -> Answer:
        """The answer to a question, which is waited for.

        Raises:
            MmfmError: a worker's process ended.
        """
        while key not in self._answers:
            for line in wait(list(self._working)):
                assert isinstance(line, Connection)
                try:
                    answer = line.recv()
                except (EOFError, OSError) as error:
                    raise MmfmError(
                        "a process that worked for this run ended early: it was killed, or the machine's memory was "
                        "not enough; go on with --resume, and fewer --workers"
                    ) from error
                self._answers[self._working.pop(line)] = answer
                self._hand_out()
        answer = self._answers.pop(key)
        self._hand_out()
        return answer

    def _hand_out(self) -> None:
        for worker in self._workers:
            taken = len(self._working) + len(self._answers)
            if self._asked and worker.line not in self._working and taken < AHEAD * len(self._workers):
                key, question = self._asked.popleft()
                self._working[worker.line] = key
                with suppress(OSError):  # it ended, which is seen when its answer is waited for
                    worker.line.send(question)


@contextmanager
def crew(work: Callable[[Question], Answer], workers: int) -> Iterator[Crew[Question, Answer]]:
    """`workers` processes that answer questions by `work`, which must not have trained anything yet; they end here."""
    torch.set_num_threads(1)
    torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)  # the first one imports torch's compiler
    gc.collect()
    gc.freeze()  # what a collector marks is copied
    hired: list[Worker] = []
    try:
        for _ in range(workers):
            ours, theirs = Pipe()
            process = os.fork()
            if process == 0:
                for line in (ours, *(other.line for other in hired)):
                    line.close()
                _serve(work, theirs)
            theirs.close()
            hired.append(Worker(process, ours))
        yield Crew(hired)
    finally:
        for worker in hired:
            worker.line.close()
            os.kill(worker.process, signal.SIGKILL)  # it holds nothing that is not whole on the disk at any moment
        for worker in hired:
            os.waitpid(worker.process, 0)
        gc.unfreeze()


def _serve(work: Callable[[Question], Answer], line: Connection) -> None:
    """The life of a worker."""
    try:
        ctypes.CDLL(None).prctl(SET_PARENT_DEATH_SIGNAL, signal.SIGKILL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        while True:
            line.send(work(line.recv()))
    except (EOFError, OSError):
        os._exit(0)
    finally:
        os._exit(1)
