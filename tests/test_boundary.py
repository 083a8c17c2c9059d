"""The boundary that a hospital trusts: two users and a namespace without network, against code that wants across it."""

import json
import os
import shutil
import signal
import socket as sockets
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from test_agent import Coordination, refusal
from tiny import tiny_federation, write_sites

from client.agent import Agent
from client.egress import EGRESS, EgressLog
from client.gates import approve
from client.relay import ask_at
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.site import Limits
from mmfm_core.protocol import Describe, RoundReply, SiteDescription
from mmfm_core.storage import write_text

AGENT, RELAY, STRANGER, GROUP = 61001, 61002, 61003, 61000
MEMORY = 4.0  # GB
COMMAND = "from mmfm_core.command import main; main()"
HOSTILE = Path(__file__).with_name("hostile_bundle.py")


def as_user(user: int, group: int, *command: str | Path) -> list[str | Path]:
    """The command as another user, who has no right of root's left."""
    return ["setpriv", f"--reuid={user}", f"--regid={group}", "--clear-groups", "--no-new-privs", *command]


def reason_to_skip() -> str | None:
    if os.geteuid() != 0:
        return "needs root, to be two users"
    if not all(map(shutil.which, ("setpriv", "unshare", "nsenter"))):
        return "needs util-linux: setpriv, unshare and nsenter"
    if subprocess.run(["unshare", "--net", "true"], check=False, capture_output=True).returncode:
        return "network namespaces are not permitted here"
    probe = as_user(RELAY, GROUP, sys.executable, "-c", "import client.relay, client.serve, torch")
    if subprocess.run(probe, check=False, capture_output=True, cwd="/").returncode:
        return "another user cannot run this Python or read this checkout"
    return None


SKIP = reason_to_skip()
pytestmark = [pytest.mark.slow, pytest.mark.skipif(SKIP is not None, reason=SKIP or "")]


@dataclass
class Hospital:
    """A site as the units install it, with an agent at work.

    Attributes:
        secrets: what only the agent may read.
    """

    folder: Path
    process: subprocess.Popen[bytes]
    document: str

    @property
    def socket(self) -> Path:
        return self.folder / "run" / "agent.sock"

    @property
    def secrets(self) -> list[Path]:
        site, data = self.folder / "site", self.folder / "data"
        of_the_process = [Path(f"/proc/{self.process.pid}/{name}") for name in ("environ", "cwd", "root", "fd", "mem")]
        return [
            *(site, site / "site.yaml", site / "approved", site / "approved" / f"{self.document}.yaml", site / EGRESS),
            *(site / "state", data, data / "north" / "manifest.csv", next((data / "north" / "scans").iterdir())),
            *of_the_process,
        ]

    def run(self, user: int, group: int, *words: str | Path) -> subprocess.CompletedProcess[str]:
        command = as_user(user, group, sys.executable, *words)
        return subprocess.run(command, check=False, capture_output=True, text=True, cwd="/", timeout=240)


@pytest.fixture(scope="module")
def hospital() -> Iterator[Hospital]:
    folder = Path(tempfile.mkdtemp(prefix="mmfm-"))  # pytest's own folders are closed to other users
    try:
        folder.chmod(0o755)
        federation = tiny_federation(parameters={"local": ["heads.*"]})
        described = write_sites(folder / "data")["north"].model_copy(
            update={"limits": Limits(memory=MEMORY, seconds=60)}
        )
        write_text(folder / "site" / "site.yaml", dump(described))
        document = approve(folder / "site" / "approved", federation)
        (folder / "site" / "state").mkdir()
        for name, mode in (("data", 0o700), ("site", 0o700), ("run", 0o750)):
            (folder / name).mkdir(exist_ok=True)
            (folder / name).chmod(mode)
            for path in [folder / name, *(folder / name).rglob("*")]:
                os.chown(path, AGENT, GROUP)
        words = [
            "site",
            "run",
            "--agent-only",
            "--directory",
            folder / "site",
            "--socket",
            folder / "run" / "agent.sock",
        ]
        command = ["unshare", "--net", *as_user(AGENT, GROUP, sys.executable, "-c", COMMAND, *words)]
        with (folder / "agent.log").open("wb") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd="/")
        made = Hospital(folder, process, document)
        end = time.monotonic() + 120
        while not made.socket.exists():
            assert process.poll() is None, (folder / "agent.log").read_text()
            assert time.monotonic() < end
            time.sleep(0.1)
        yield made
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def test_hostile_code_in_the_relay_reads_nothing_and_is_sent_nothing(hospital: Hospital) -> None:
    secrets = hospital.secrets
    attack = hospital.run(
        RELAY, GROUP, HOSTILE, hospital.socket, hospital.document, str(hospital.process.pid), *secrets
    )
    assert attack.returncode == 0, attack.stderr
    got = json.loads(attack.stdout)
    assert got["read"] == dict.fromkeys(map(str, secrets), "PermissionError")
    assert (got["kill"], got["replace the socket"]) == ("PermissionError", "PermissionError")
    said = got["said"]
    honest = said.pop("an honest question")
    assert honest.startswith("ANSWERED SiteDescription")
    assert not [name for name, answer in said.items() if "ANSWERED" in answer or answer == "done"]
    for name in ("another document", "a path", "the hash in capitals"):
        assert said[name] == "this federation's document is not approved at this site"
    assert "not asked for" in said["undeclared tensors"] or "is missing" in said["undeclared tensors"]
    assert "larger than" in said["five terabytes"]
    assert "larger than" in said["an endless head"]
    assert said["another method"] == "_MultiThreadedRendezvous"
    patients = {
        line.split(",")[1] for line in (hospital.folder / "data/north/manifest.csv").read_text().splitlines()[1:]
    }
    assert len(patients) > 10
    assert not [patient for patient in patients if patient in f"{said} {honest} {attack.stderr}"]


def test_the_same_attempts_succeed_for_the_agents_own_user(hospital: Hospital) -> None:
    """So the test above can fail: it is the users that make the difference, and nothing in the probes."""
    files = [path for path in hospital.secrets if not str(path).startswith("/proc")]
    code = f"import sys; sys.path.insert(0, {str(HOSTILE.parent)!r}); from hostile_bundle import *; "
    code += "print({tried(lambda: read(Path(path))) for path in sys.argv[1:]})"
    assert hospital.run(AGENT, GROUP, "-c", code, *files).stdout.strip() == "{'done'}"


def test_a_stranger_to_the_group_cannot_even_ask(hospital: Hospital) -> None:
    code = f"import socket; socket.socket(socket.AF_UNIX).connect({str(hospital.socket)!r})"
    assert "PermissionError" in hospital.run(STRANGER, STRANGER, "-c", code).stderr
    assert hospital.run(RELAY, GROUP, "-c", code).returncode == 0


def test_the_agent_has_no_network(hospital: Hospital) -> None:
    with sockets.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        code = f"import socket; socket.create_connection(('127.0.0.1', {port}), 5)"
        inside = ["nsenter", f"--net=/proc/{hospital.process.pid}/ns/net", sys.executable, "-c", code]
        assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
        tried = subprocess.run(inside, check=False, capture_output=True, text=True)
    assert "OSError: [Errno" in tried.stderr or "ConnectionRefusedError" in tried.stderr
    interfaces = Path(f"/proc/{hospital.process.pid}/net/dev").read_text().splitlines()[2:]
    assert [line.split(":")[0].strip() for line in interfaces] == ["lo"]


def test_a_tampered_document_under_an_approved_name_is_refused(hospital: Hospital) -> None:
    path = hospital.folder / "site" / "approved" / f"{hospital.document}.yaml"
    text = path.read_text()
    ask = ask_at(hospital.socket, 60)
    try:
        path.write_text(text.replace("local:\n  - heads.*", "local: []"))
        assert path.read_text() != text
        assert "was changed; approve it again" in refusal(ask(Describe(hospital.document)))
    finally:
        path.write_text(text)
    assert isinstance(ask(Describe(hospital.document)), SiteDescription)


def test_an_honest_round_is_answered_with_the_declared_tensors_alone_and_all_of_it_is_on_record(
    hospital: Hospital,
) -> None:
    """After all that was tried before."""
    federation = tiny_federation(parameters={"local": ["heads.*"]})
    assert sha256(federation) == hospital.document
    coordination = Coordination(federation, {"north": Agent.open(hospital.folder / "site")})
    reply = ask_at(hospital.socket, 120)(coordination.request("north", 1))
    assert isinstance(reply, RoundReply)
    assert reply.tensors
    assert not [name for name in reply.tensors if name.startswith("heads.")]
    log = EgressLog(hospital.folder / "site" / EGRESS)
    number, _ = log.verify()
    assert number > 10
    assert {entry["kind"] for _, entry in log.entries()} == {"Refusal", "SiteDescription", "RoundReply"}
    status = Path(f"/proc/{hospital.process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM:"))
    assert peak * 1024 < MEMORY * 1e9
