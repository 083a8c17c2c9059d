"""`mmfm site run` as real processes: they serve, come back when they are killed, and leave together."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from certificates import Authority
from command_line import MMFM, PATIENCE
from test_site_commands import bundle_for, done
from tiny import tiny_federation, write_sites

from client.gates import approve
from client.relay import ask_at
from client.service import is_served
from mmfm_core.config.loading import dump
from mmfm_core.config.site import Limits
from mmfm_core.protocol import Describe, SiteDescription

pytestmark = pytest.mark.slow


@pytest.fixture
def here(tmp_path: Path) -> Path:
    """A site that approved a document and joined a coordinator who is not there."""
    described = write_sites(tmp_path / "hospitals")["north"]
    folder = tmp_path / "north"
    folder.mkdir()
    (folder / "site.yaml").write_text(dump(described.model_copy(update={"limits": Limits(memory=6)})))
    approve(folder / "approved", tiny_federation())
    done("init", folder, "--name", "north")
    done("join", bundle_for(folder, Authority.make(), address="127.0.0.1:9"), "-d", folder)
    return folder


def document(here: Path) -> str:
    return next((here / "approved").iterdir()).stem


@contextmanager
def running(here: Path, *words: str) -> Iterator[subprocess.Popen[bytes]]:
    with (here / "run.log").open("wb") as log:
        process = subprocess.Popen([MMFM, "site", "run", "-d", here, *words], stdout=log, stderr=log)
    try:
        yield process
    finally:
        process.kill()
        process.wait()


def eventually(happens: Callable[[], bool], here: Path) -> None:
    end = time.monotonic() + PATIENCE
    while not happens():
        assert time.monotonic() < end, (here / "run.log").read_text()
        time.sleep(0.05)


def processes(here: Path) -> dict[int, str]:
    """Those of this site, by their command lines: all but the one that was typed."""
    found = {}
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = process.read_bytes().decode().split("\0")
        except OSError:
            continue
        if any(word.startswith(str(here)) for word in words[3:]) and int(process.parent.name) != os.getpid():
            found[int(process.parent.name)] = " ".join(words)
    return found


def agent_in(here: Path) -> int:
    return next(number for number, words in processes(here).items() if "--agent-only" in words)


def test_a_site_serves_comes_back_and_leaves_nothing(here: Path) -> None:
    socket = here / "agent.sock"
    with running(here) as started:
        eventually(lambda: is_served(socket), here)
        assert isinstance(ask_at(socket, 60)(Describe(document(here))), SiteDescription)
        for words, why in (
            ((), "another agent serves there"),
            (("--agent-only", "--socket", here / "other.sock"), "another agent works in this directory"),
        ):
            second = [MMFM, "site", "run", "-d", here, *words]
            said = subprocess.run(second, check=False, capture_output=True, text=True, timeout=PATIENCE).stderr
            assert why in said
        os.kill(agent_in(here), signal.SIGKILL)
        eventually(lambda: not is_served(socket), here)
        eventually(lambda: is_served(socket), here)
        assert isinstance(ask_at(socket, 60)(Describe(document(here))), SiteDescription)
        eventually(lambda: any("flower-supernode" in words for words in processes(here).values()), here)
        started.send_signal(signal.SIGTERM)
        assert started.wait(PATIENCE) == 0
        assert not processes(here)
    assert not socket.exists()
    lines = [json.loads(line) for line in (here / "run.log").read_text().splitlines()]
    assert {line["site"] for line in lines} == {"north"}
    assert all({"time", "level", "text"} <= line.keys() for line in lines)
    assert [line for line in lines if "ended with code -9; it is started again" in line["text"]]
    answered = [line for line in lines if line["text"].startswith("Describe was answered by SiteDescription")]
    assert [line["document"] for line in answered] == [document(here)] * 2


def test_children_end_with_a_supervisor_that_was_killed(here: Path) -> None:
    with running(here, "--relay-only") as started:
        eventually(lambda: any("flower-supernode" in words for words in processes(here).values()), here)
        assert not [words for words in processes(here).values() if "--agent-only" in words]
        started.kill()
        started.wait()
        eventually(lambda: not processes(here), here)


def test_a_tied_program_ends_with_whoever_started_it(tmp_path: Path) -> None:
    code = f"""
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-m", "client.tied", str(os.getpid()), "sleep", "1000"])
open({str(tmp_path / "pid")!r}, "w").write(str(child.pid))
sys.stdin.read()
"""
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE) as parent:
        end = time.monotonic() + PATIENCE
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            assert time.monotonic() < end
            time.sleep(0.02)
        child = int((tmp_path / "pid").read_text())
        while b"sleep" not in Path(f"/proc/{child}/cmdline").read_bytes().split(b"\0")[0]:
            time.sleep(0.02)
        parent.kill()
    while Path(f"/proc/{child}").exists() and "Z" not in Path(f"/proc/{child}/stat").read_text().split()[2]:
        assert time.monotonic() < end
        time.sleep(0.02)


def test_memory_beyond_the_sites_limit_is_not_to_be_had() -> None:
    code = """
from pathlib import Path
import numpy as np
from client.limits import hold
from mmfm_core.config.site import Limits
from mmfm_core.errors import MmfmError
try:
    hold(Limits(memory=0.2), Path("site.yaml"))  # more than it has, and no room for a request
except MmfmError as error:
    print(error)
from client.limits import private
hold(Limits(memory=private() / 1e9 + 2), Path("site.yaml"))
np.ones(100 << 20, np.uint8)
try:
    np.ones(2 << 30, np.uint8)
except MemoryError:
    print("refused")
"""
    said = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert said.startswith("site.yaml: limits.memory: the agent takes 0.")
    assert said.endswith("refused\n")
