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
from importlib.metadata import version
from pathlib import Path
from typing import Any

from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from client.gates import approve
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump
from mmfm_core.enrolment import Enrolment, Request, read, write
from mmfm_core.storage import write_text
from server.programs import environment

BIN = Path(sys.executable).parent
PATIENCE = 240.0  # seconds; for what takes a few
RESTART_SECONDS = 3

AGENT = """
import signal, sys
from pathlib import Path
from client.agent import Agent
from client.service import Service, serving
with serving(Path(sys.argv[2]), Service(Agent.open(Path(sys.argv[1])))):
    print("ready", flush=True)
    signal.sigwait({signal.SIGTERM, signal.SIGINT})
"""


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

    def processes(self) -> list[int]:
        """All living processes of the coordinator."""
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
    """A site: an agent that stays, and a Flower node that is started again whenever it ends, as systemd would."""

    def __init__(self, folder: Path, site: Site, port: int, inside: Sequence[str] = ()) -> None:
        self.name, self.folder, self._port, self._inside = site.name, folder / site.name, port, tuple(inside)
        self.request, self.enrolment = self.folder / "request.json", self.folder / "enrolment.json"
        self._agent: subprocess.Popen[bytes] | None = None
        self._node: subprocess.Popen[bytes] | None = None
        write_text(self.folder / "site.yaml", dump(site))
        self.make_key()

    def make_key(self) -> None:
        """A new key and a new request."""
        key = ec.generate_private_key(ec.SECP384R1())
        write_text(
            self.folder / "node.key",
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
            ).decode(),
        )
        public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
        versions = {name: version(name) for name in ("mmfm", "flwr")}
        write(self.request, Request(site=self.name, public_key=public.decode(), versions=versions))

    def approve(self, federation: Federation) -> None:
        """Let the agent answer a document."""
        approve(self.folder / "approved", federation)

    def start(self) -> None:
        """Start whichever of the two does not run."""
        if self._agent is None or self._agent.poll() is not None:
            command = [BIN / "python", "-c", AGENT, self.folder, self.folder / "agent.sock"]
            self._agent = self._run("agent", command)
        if self._node is None or self._node.poll() is not None:
            joined = read(self.enrolment, Enrolment)
            write_text(self.folder / "ca.crt", joined.authority)
            self._node = self.start_node(joined.address, self.folder / "ca.crt", "node")

    def start_node(self, address: str, authority: Path | None, log: str) -> subprocess.Popen[bytes]:
        """A Flower node that dials `address` and trusts `authority` (None: without TLS)."""
        write_text(self.folder / "node.toml", f'agent-socket = "{self.folder / "agent.sock"}"\n')
        trust = ["--insecure"] if authority is None else ["--root-certificates", authority]
        command = [
            *(BIN / "flower-supernode", "--superlink", address, *trust),
            *("--auth-supernode-private-key", self.folder / "node.key") * (authority is not None),
            *("--host", "127.0.0.1", "--port", str(self._port), "--node-config", self.folder / "node.toml"),
        ]
        again = f'while :; do "$@"; echo "ended with $?"; sleep {RESTART_SECONDS}; done'
        return self._run(log, ["bash", "-c", again, "bash", *command])

    def log(self, name: str) -> str:
        """What a program of it wrote."""
        path = self.folder / f"{name}.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def processes(self) -> list[int]:
        """All living processes of the hospital."""
        return marked(f"MMFM_HOSPITAL={self.folder}")

    def kill(self, number: int = signal.SIGKILL, *, only_agent: bool = False) -> None:
        """Signal everything of it at once, or its agent alone."""
        if only_agent:
            assert self._agent
            os.kill(self._agent.pid, number)
            return
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, number)
        if number == signal.SIGKILL:
            for each in (self._agent, self._node):
                if each:
                    each.wait()
            wait(lambda: not self.processes())

    def _run(self, log: str, command: Sequence[str | Path]) -> subprocess.Popen[bytes]:
        variables = environment(self.folder / "flower") | {"MMFM_HOSPITAL": str(self.folder)}
        with (self.folder / f"{log}.log").open("ab") as output:
            return subprocess.Popen(
                [*self._inside, *map(str, command)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                cwd=self.folder,
                env=variables,
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
