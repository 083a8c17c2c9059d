"""The courier: Flower's own program for every message, as Flower's launcher calls it, without its imports."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from command_line import PATIENCE

from client.courier import PIPE, PROGRAM, PROGRAMS

pytestmark = pytest.mark.slow


@contextmanager
def courier(folder: Path) -> Iterator["subprocess.Popen[str]"]:
    command = [sys.executable, "-m", "client.courier", folder / "pipe"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def start(folder: Path, *words: str) -> "subprocess.Popen[bytes]":
    """As the launcher does: by name."""
    path = f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}"
    return subprocess.Popen([PROGRAM, *words], env=os.environ | {"PATH": path, PIPE: str(folder / "pipe")})


def said(process: "subprocess.Popen[str]", words: str) -> str:
    """The next line with these words."""
    assert process.stdout
    return next(line for line in process.stdout if words in line)


def test_each_message_is_flowers_program_in_a_process_of_its_own(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe", 0o600)
    with start(tmp_path, "--no-such-word") as early, courier(tmp_path) as process:
        assert f"usage: {PROGRAM}" in said(process, "usage: ")  # it waited until there was a courier
        assert "--token --token-file is required" in said(process, "error: ")
        assert early.wait(PATIENCE) == 0
        for _ in range(2):
            assert start(tmp_path, "--help").wait(PATIENCE) == 0
            assert "Run a Flower ClientApp" in said(process, "Flower ClientApp")
        assert process.poll() is None


def test_without_it_flowers_own_program_is_found(tmp_path: Path) -> None:
    """Where its mode was lost, or its disk is mounted so that nothing on it may be run, messages are slow, not lost."""
    unusable = tmp_path / PROGRAM
    unusable.write_bytes((PROGRAMS / PROGRAM).read_bytes())
    path = os.pathsep.join([str(tmp_path), str(Path(sys.executable).parent)])
    ran = subprocess.run([PROGRAM, "--help"], env=os.environ | {"PATH": path}, capture_output=True, check=True)
    assert b"Run a Flower ClientApp" in ran.stdout
