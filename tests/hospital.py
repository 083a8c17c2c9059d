"""A coordinator and hospitals as processes of their own, each optionally in a network namespace of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

from client.gates import approve
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump
from mmfm_core.enrolment import Enrolment, read, write
from mmfm_core.storage import write_text
from server.programs import environment

BIN = Path(sys.executable).parent
PATIENCE = 240.0  # seconds; for what takes a few


class Coordinator:
    """`mmfm coordinator` in a directory; `inside` is what its commands are run through (`ip netns exec ...`)."""

    def __init__(self, folder: Path, inside: Sequence[str] = ()) -> None:
        self.folder, self.directory, self._inside = folder, folder / "coordinator", tuple(inside)

    def mmfm(self, *arguments: str | Path, check: bool = True, seconds: float = PATIENCE) -> str:
        """The output of `mmfm coordinator ...`, errors included."""
        ran = subprocess.run(
            [*self._inside, BIN / "mmfm", "coordinator", *arguments],
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=self.folder,
            env=os.environ | {"MMFM_COORDINATOR": str(self.directory), "OMP_NUM_THREADS": "1"},
            timeout=seconds,
        )
        assert not check or ran.returncode == 0, ran.stdout
        return ran.stdout

    def start_run(self, federation: Federation, name: str) -> Path:
        """Submit a federation under another run name; the run's directory."""
        document = self.folder / "documents" / f"{name}.yaml"
        write_text(document, dump(federation))
        place = self.directory / "runs" / name
        self.mmfm("run", document, "--run", place, "--no-follow")
        return place

    def enrol(self, hospital: "Hospital", *more: str) -> None:
        """Exchange the two files."""
        self.mmfm("enrol", hospital.request, "--out", hospital.enrolment, *more)
        hospital.mmfm("join", hospital.enrolment)

    def processes(self) -> list[int]:
        """All living processes of the coordinator but its door, which writes its title over its environment."""
        return marked(f"MMFM_COORDINATOR_PROGRAM={self.directory}")

    def kill(self) -> None:
        """Everything of it at once, as a power cut would."""
        state = self.directory / "state" / "up.json"
        with suppress(ProcessLookupError):
            os.kill(json.loads(state.read_text())["pid"], signal.SIGKILL)
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        wait(lambda: not self.processes())


class Hospital:
    """A site: `mmfm site` in a directory, with its agent and its relay as a trial runs them."""

    def __init__(self, folder: Path, site: Site, inside: Sequence[str] = ()) -> None:
        self.name, self.site, self.folder, self._inside = site.name, site, folder / site.name, tuple(inside)
        self.request, self.enrolment = self.folder / "request.json", folder / f"{site.name}.enrolment.json"
        self.begin()

    def begin(self) -> None:
        """A new key and a new request."""
        told = self.mmfm("init", self.folder, "--name", self.name)
        self.request = Path(told.removeprefix("Request: ").split("; send it")[0])
        write_text(self.folder / "site.yaml", dump(self.site))

    def mmfm(self, *arguments: str | Path, check: bool = True) -> str:
        """The output of `mmfm site ...`, errors included."""
        ran = subprocess.run(
            [*self._inside, BIN / "mmfm", "site", *arguments],
            check=False,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            env=os.environ | {"MMFM_SITE": str(self.folder), "OMP_NUM_THREADS": "1"},
            timeout=PATIENCE,
        )
        assert not check or ran.returncode == 0, ran.stdout
        return ran.stdout

    def approve(self, federation: Federation) -> None:
        """Let the agent answer a document; the command that people use takes longer, as it tells them what it does."""
        approve(self.folder / "approved", federation)

    def start(self) -> None:
        """`mmfm site run`, which keeps both processes running; restarted by nobody, should it be killed itself."""
        self.run("run", [BIN / "mmfm", "site", "run"])

    def dial(self, address: str) -> None:
        """Let the relay connect somewhere else than the enrolment says."""
        path = self.folder / "relay" / "enrolment.json"
        write(path, read(path, Enrolment).model_copy(update={"address": address}))

    def log(self, name: str = "run") -> str:
        """What a program of it wrote."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self, words: str = "") -> list[int]:
        """All living processes of the hospital whose command line holds `words`."""
        found = []
        for pid in marked(f"MMFM_HOSPITAL={self.folder}"):
            with suppress(OSError):
                line = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode()
                if words in line:
                    found.append(pid)
        return found

    def kill(self, number: int = signal.SIGKILL, words: str = "") -> None:
        """Signal everything of it at once, or what has `words` in its command line."""
        for pid in self.processes(words):
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGKILL and not words:
            wait(lambda: not self.processes())

    def run(self, log: str, command: Sequence[str | Path]) -> "subprocess.Popen[bytes]":
        """Start a program of it."""
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [*self._inside, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=environment(self.folder / "flower")
                | {"MMFM_HOSPITAL": str(self.folder), "MMFM_SITE": str(self.folder)},
                start_new_session=True,
            )


def marked(mark: str) -> list[int]:
    """The living processes that have a variable, `NAME=VALUE`, in their environment."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            alive = (process / "stat").read_text().rpartition(")")[2].split()[0] != "Z"
            if alive and mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append(int(process.name))
    return found


def facts(run: Path) -> dict[str, Any]:
    """A run's `run.json`."""
    found: dict[str, Any] = json.loads((run / "run.json").read_text())
    return found


def wait(done: Callable[[], bool], seconds: float = PATIENCE, what: str = "") -> float:
    """Wait until `done()`; how long it took."""
    began = time.monotonic()
    while not done():
        assert time.monotonic() - began < seconds, f"not within {seconds:g} s: {what}"
        time.sleep(0.1)
    return time.monotonic() - began


def free_ports(count: int) -> list[int]:
    """Ports of the loopback interface that nobody listens on."""
    with ExitStack() as stack:
        probes = [stack.enter_context(socket.socket()) for _ in range(count)]
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [probe.getsockname()[1] for probe in probes]
