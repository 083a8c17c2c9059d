"""The programs that an engine or a coordinator starts: each in a process group of its own, and none left at the end."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

from mmfm_core.errors import MmfmError
from server.record import Run

POLL_SECONDS = 0.2
GRACE_SECONDS = 5.0
SCRIPTS = Path(sys.executable).parent

QUIET = {
    # Nothing beside patient data calls home, installs packages, or takes more than its own core.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "RAY_USAGE_STATS_ENABLED": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Program:
    """A program that was started, and the file that holds its output."""

    name: str
    process: subprocess.Popen[bytes]
    log: Path

    @property
    def ended(self) -> bool:
        """Whether it is over."""
        return self.process.poll() is not None


def words(command: Sequence[str | Path]) -> list[str]:
    """A command line whose program is one that is installed beside this Python, unless it has a path of its own."""
    return [str(SCRIPTS / command[0]), *map(str, command[1:])]


def environment(home: Path) -> dict[str, str]:
    """The variables of a program of Flower's; `home` is where it keeps its files."""
    # Everything here talks over loopback, where a proxy can only be in the way.
    inherited = {key: value for key, value in os.environ.items() if not key.lower().endswith("_proxy")}
    # Flower starts its own helpers by name.
    path = f"{SCRIPTS}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
    return inherited | QUIET | {"FLWR_HOME": str(home), "PATH": path}


class Programs:
    """Programs with their logs in one folder, and `variables` added to their environment."""

    def __init__(self, folder: Path, variables: Mapping[str, str] | None = None) -> None:
        self._folder, self._variables, self._started = folder, dict(variables or {}), list[Program]()

    def start(self, name: str, command: Sequence[str | Path], home: Path) -> Program:
        """Start a program that is installed beside this Python; `home` is where Flower keeps its files."""
        self._folder.mkdir(parents=True, exist_ok=True)
        log = self._folder / f"{name}.log"
        with log.open("ab") as output:
            process = subprocess.Popen(  # noqa: S603 (our own words and paths)
                words(command),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self._folder,
                env=environment(home) | self._variables,
                start_new_session=True,
            )
        program = Program(name, process, log)
        # Of one that ended and is started again, the number may belong to a stranger by now.
        self._started = [each for each in self._started if each.name != name]
        self._started.append(program)
        return program

    def stop(self) -> None:
        """End every program and all that it started; what takes longer than a grace period is killed."""
        try:
            self._signal(signal.SIGTERM)
            self._wait()
        finally:
            self._signal(signal.SIGKILL)
            self._wait()

    def _wait(self) -> None:
        # Not only for the programs: what one of them started may outlive it.
        end = time.monotonic() + GRACE_SECONDS
        while time.monotonic() < end and (any(not program.ended for program in self._started) or self._signal(0)):
            time.sleep(POLL_SECONDS)

    def _signal(self, number: int) -> bool:
        """Signal every group; whether there was anybody to receive it."""
        received = False
        for program in self._started:
            with suppress(ProcessLookupError):
                os.killpg(program.process.pid, number)
                received = True
        return received


@contextmanager
def programs(folder: Path, variables: Mapping[str, str] | None = None) -> Iterator[Programs]:
    """A block after which no program started in it is left, however it ends; SIGTERM ends it like Ctrl-C does."""
    started = Programs(folder, variables)
    with _sigterm_raises():
        try:
            yield started
        finally:
            started.stop()


def wait_for(done: Callable[[], bool], alive: Collection[Program], seconds: float = float("inf")) -> None:
    """Wait until `done()`.

    Raises:
        MmfmError: one of the programs `alive` is not, or the time is over.
    """
    end = time.monotonic() + seconds
    while not done():
        for program in alive:
            if program.ended:
                raise MmfmError(f"{program.name} ended early; {program.log} says why, then resume")
        if time.monotonic() > end:
            logs = ", ".join(str(program.log) for program in alive)
            raise MmfmError(f"nothing happened for {seconds:g} s; see {logs}, then resume")
        time.sleep(POLL_SECONDS)


def begin(run: Run) -> None:
    """Make ready to follow a run by its status, which may still be that of an earlier attempt.

    Raises:
        MmfmError: another process works on the run.
    """
    with run.locked():
        run.update(status="starting", cause=None)


def over(run: Run) -> bool:
    """Whether the coordinator wrote down how the run ended."""
    return run.facts["status"] in ("completed", "failed")


def check_completed(run: Run, log: Path) -> None:
    """Check the outcome that the coordinator wrote down.

    Raises:
        MmfmError: the run failed, or ended without an outcome.
    """
    facts = run.facts
    if facts["status"] == "failed":
        raise MmfmError(facts["cause"])
    if facts["status"] != "completed":
        raise MmfmError(f"the coordinator ended before the run did; {log} says why, then resume")


@contextmanager
def _sigterm_raises() -> Iterator[None]:
    # Python's default for SIGTERM is to end at once, which would leave the programs running.
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def leave(number: int, _frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
