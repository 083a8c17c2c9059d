"""`mmfm site run`: the agent and the relay of a site, started, watched, started again, and gone together."""

import json
import logging
import os
import re
import secrets
import signal
import socket as sockets
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

from client import courier, logs
from client.app import SOCKET
from client.place import Place
from client.service import is_served
from mmfm_core.errors import MmfmError
from mmfm_core.storage import write_text

POLL_SECONDS = 0.2
GRACE_SECONDS = 15.0  # Flower takes a few to tell the coordinator that the node leaves
AGENT_RESTART_SECONDS = LAUNCHER_RESTART_SECONDS = COURIER_RESTART_SECONDS = 2.0
# A SuperNode that was killed is refused (exit code 305) until its last heartbeat, a minute ago at most, is stale.
RELAY_RESTART_SECONDS = 15.0

QUIET = {
    # Nothing beside patient data calls home or installs packages.
    "FLWR_TELEMETRY_ENABLED": "0",
    "FLWR_DISABLE_UPDATE_CHECK": "1",
    "FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION": "1",
    "FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.1",  # seconds, which every message waits at the mean half of
}
LEVEL = re.compile(r"(INFO|WARNING|ERROR)\s*:")  # as Flower begins its lines
COLOURS = re.compile(r"\x1b\[[0-9;]*m")

log = logging.getLogger(__name__)


@dataclass
class Child:
    """A program that is kept running."""

    name: str
    command: Sequence[str]
    folder: Path
    variables: Mapping[str, str]
    restart_seconds: float
    process: subprocess.Popen[str] | None = None
    not_before: float = 0.0

    def watch(self) -> None:
        """Start it, if it does not run and has waited long enough."""
        if self.process is not None and self.process.poll() is not None:
            code, self.process = self.process.returncode, None
            self.not_before = time.monotonic() + self.restart_seconds
            log.warning("%s ended with code %d; it is started again in %g s", self.name, code, self.restart_seconds)
        if self.process is None and time.monotonic() >= self.not_before:
            self.process = subprocess.Popen(  # noqa: S603 (our own words and paths)
                [sys.executable, "-m", "client.tied", str(os.getpid()), *self.command],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                errors="replace",
                cwd=self.folder,
                env=os.environ | self.variables,
                start_new_session=True,
            )
            threading.Thread(target=self._pass_on, args=(self.process,), daemon=True).start()

    def stop(self) -> None:
        """End it and all that it started."""
        if self.process is None:
            return
        self._signal(signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(GRACE_SECONDS)
        self._signal(signal.SIGKILL)
        self.process.wait()

    def _signal(self, number: int) -> None:
        assert self.process
        with suppress(ProcessLookupError):
            os.killpg(self.process.pid, number)

    def _pass_on(self, process: subprocess.Popen[str]) -> None:
        assert process.stdout
        for line in process.stdout:
            text = COLOURS.sub("", line).strip()
            if text.startswith("{"):  # the agent's lines are as they should be
                sys.stderr.write(line)
                sys.stderr.flush()
            elif text:
                level = LEVEL.match(text)
                log.log(getattr(logging, level[1]) if level else logging.INFO, "%s: %s", self.name, text)


def run(place: Place, agent: bool, relay: bool) -> None:
    """Keep a site's processes running until SIGTERM or Ctrl-C, then end them.

    Raises:
        MmfmError: the site's file or its enrolment cannot be used.
    """
    name = place.site().name if agent else place.enrolled().site
    if agent and is_served(place.socket):
        raise MmfmError("another agent serves there; stop it first", str(place.socket))
    logs.start(name)
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    with TemporaryDirectory(prefix="mmfm-") as home:
        children = [*(relay_of(place, Path(home)) if relay else ()), *([agent_of(place)] if agent else ())]
        try:
            while not stop.wait(POLL_SECONDS):
                for child in reversed(children):
                    child.watch()
        finally:
            log.info("stops")
            for child in children:
                child.stop()


def agent_of(place: Place) -> Child:
    """The agent as a child of this process."""
    command = [str(_script("mmfm")), "site", "run", "--agent-only"]
    command += ["--directory", str(place.directory), "--socket", str(place.socket.absolute())]
    return Child("agent", command, place.directory, {}, AGENT_RESTART_SECONDS)


def relay_of(place: Place, home: Path) -> tuple[Child, Child, Child]:
    """The courier, and Flower's launcher and SuperNode; `home` is where Flower keeps its files.

    Left alone, a SuperNode gives its tasks to whoever asks at its port on this machine: these two share a secret.
    """
    enrolled = place.enrolled()
    secret, port = home / "secret", _free_port()
    secret.write_bytes(secrets.token_hex(32).encode())  # in a folder that is this user's alone
    # Flower's command line would tear apart a path with a quote or a blank.
    write_text(home / "node.toml", f"{SOCKET} = {json.dumps(str(place.socket.absolute()), ensure_ascii=False)}\n")
    scripts = _script("flower-supernode").parent
    node = [
        *(str(scripts / "flower-supernode"), "--superlink", enrolled.address),
        *("--root-certificates", str(place.authority), "--auth-supernode-private-key", str(place.key)),
        *("--isolation", "process", "--superexec-auth-secret-file", str(secret)),
        *("--host", "127.0.0.1", "--port", str(port), "--node-config", "node.toml"),
    ]
    launcher = [
        *(str(scripts / "flower-superexec"), "--insecure", "--runtime-api-address", f"127.0.0.1:{port}"),
        *("--superexec-auth-secret-file", str(secret)),
    ]
    messages = home / "messages"
    reader = [sys.executable, "-m", "client.courier", str(messages)]
    os.mkfifo(messages, 0o600)
    # The launcher starts a program for each message, by name.
    path = os.pathsep.join([str(courier.PROGRAMS), str(scripts), os.environ.get("PATH", os.defpath)])
    variables = QUIET | {"FLWR_HOME": str(home), "PATH": path, courier.PIPE: str(messages)}
    return (
        Child("courier", reader, home, variables, COURIER_RESTART_SECONDS),
        Child("launcher", launcher, home, variables, LAUNCHER_RESTART_SECONDS),
        Child("relay", node, home, variables, RELAY_RESTART_SECONDS),
    )


def _script(name: str) -> Path:
    return Path(sys.executable).with_name(name)


def _free_port() -> int:
    with sockets.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
