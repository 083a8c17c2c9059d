"""`mmfm` in processes of its own, for tests that interrupt and kill it; and documents as a person writes them."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import MODALITIES, tiny_federation, write_sites

from mmfm_core.config import Federation

MMFM = Path(sys.executable).with_name("mmfm")
PATIENCE = 180.0  # seconds; for what takes a few
ROUNDS = 5

SITES = {"north": MODALITIES, "south": ("note", "labs"), "healthy": ("scan", "labs")}
"""The third one has patients of one class only."""


@dataclass(frozen=True)
class Documents:
    """A federation and its sites as files."""

    federation: Path
    sites: Path

    def amend(self, folder: Path, change: Callable[[dict[str, Any], dict[str, Any]], None]) -> "Documents":
        """Both documents after `change(federation, sites)`, in another folder."""
        contents = [yaml.safe_load(path.read_text()) for path in (self.federation, self.sites)]
        change(*contents)
        return write_documents(folder, *contents)


def write_documents(folder: Path, federation: dict[str, Any], sites: dict[str, Any]) -> Documents:
    folder.mkdir(parents=True, exist_ok=True)
    documents = Documents(folder / "tiny.yaml", folder / "tiny.sites.yaml")
    for path, content in ((documents.federation, federation), (documents.sites, sites)):
        path.write_text(yaml.safe_dump(content, sort_keys=False))
    return documents


def hospitals(folder: Path, sites: Mapping[str, tuple[str, ...]] = SITES) -> Documents:
    """Generated hospitals and the two documents about them, as a person would write them."""
    written = {
        name: site.model_dump(mode="json", exclude_unset=True, exclude={"name"})
        for name, site in write_sites(folder / "hospitals", sites, patients=30).items()
    }
    for name, site in written.items():
        manifest = Path(site["manifest"])
        site["manifest"] = str(manifest.relative_to(folder))
        if name == "healthy":
            manifest.write_text(manifest.read_text().replace(",ill,", ",healthy,"))
    return write_documents(folder, plain(tiny_federation()), {"sites": written})


def plain(federation: Federation) -> dict[str, Any]:
    return federation.model_dump(mode="json", exclude_unset=True)


def longer(federation: dict[str, Any], _: dict[str, Any]) -> None:
    """More rounds, and a fusion that no site gives away."""
    federation["parameters"] = {"local": ["fusion.*"]}
    federation["stages"][0] |= {"rounds": ROUNDS, "local_steps": 8}


@dataclass
class Command:
    """A command at work in a session of its own."""

    process: subprocess.Popen[bytes]
    out: Path
    err: Path

    def kill(self, number: int) -> None:
        """Signal every process of the session, as a terminal does."""
        for member in self.members():
            with suppress(ProcessLookupError):
                os.kill(member, number)

    def members(self) -> list[int]:
        """The living processes of the session."""
        found = []
        for entry in Path("/proc").glob("[0-9]*/stat"):
            with suppress(OSError):
                state, _, _, session = entry.read_text().rpartition(")")[2].split()[:4]
                if int(session) == self.process.pid and state != "Z":
                    found.append(int(entry.parent.name))
        return found

    def wait(self) -> int:
        """The exit code."""
        return self.process.wait(PATIENCE)


@contextmanager
def started(folder: Path, *words: str | Path) -> Iterator[Command]:
    """`mmfm` with these words, in `folder`; after the block none of its processes is left."""
    folder.mkdir(parents=True, exist_ok=True)
    out, err = folder / "out.txt", folder / "err.txt"
    with out.open("wb") as to, err.open("wb") as errors:
        process = subprocess.Popen(
            [MMFM, *words], cwd=folder, stdin=subprocess.DEVNULL, stdout=to, stderr=errors, start_new_session=True
        )
    running = Command(process, out, err)
    try:
        yield running
    finally:
        running.kill(signal.SIGKILL)
        process.wait()


def mmfm(folder: Path, *words: str | Path) -> subprocess.CompletedProcess[str]:
    with started(folder, *words) as running:
        code = running.wait()
    return subprocess.CompletedProcess(words, code, running.out.read_text(), running.err.read_text())


def until(happened: Callable[[], object], running: Command) -> None:
    end = time.monotonic() + PATIENCE
    while not happened():
        assert running.process.poll() is None, f"ended before: {running.err.read_text()}"
        assert time.monotonic() < end
        time.sleep(0.005)


def nobody_left(running: Command) -> bool:
    end = time.monotonic() + PATIENCE
    while running.members() and time.monotonic() < end:
        time.sleep(0.05)
    return not running.members()


@contextmanager
def one_thread() -> Iterator[None]:
    """Torch with as many threads as a worker has, since sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
