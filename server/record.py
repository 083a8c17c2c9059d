"""The run directory: the only place where a run's state, figures and events live."""

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from mmfm_core.config import Federation, load_federation
from mmfm_core.config.loading import dump, sha256
from mmfm_core.errors import MmfmError
from mmfm_core.storage import Tensors, flush, read_tensors, whole_folder, write_json, write_tensors, write_text

KEPT_CHECKPOINTS = 2
LOCK_SECONDS = 3.0  # a killed command's worker takes a moment to notice
LOCKS = ROUNDS_LOCK, COMMAND_LOCK = ".lock", ".command.lock"
TOLD_CHARACTERS = 500
ROOM, ROOM_BYTES = ".room", 64 << 10


class Run:
    """A run directory: `federation.yaml`, `run.json`, `metrics.jsonl`, `events.jsonl`, `checkpoints/`, `sites/`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.metrics, self.events = directory / "metrics.jsonl", directory / "events.jsonl"

    @classmethod
    def create(cls, directory: Path, federation: Federation, **facts: Any) -> "Run":
        """Start a new run. A run that never came to a checkpoint has nothing to lose, and is replaced.

        Raises:
            MmfmError: the directory is in use.
        """
        run = cls(directory)
        run._check_place()
        if run.exists:
            if run.checkpoint() is not None:
                raise MmfmError(
                    f"{directory}: a run is already here; go on with --resume, start over with --replace, "
                    "or name another place with --run"
                )
            run.delete()
        run.update(
            name=federation.name,
            federation=sha256(federation),
            status="preparing",
            cause=None,
            started=time.time(),
            **facts,
        )
        write_text(directory / "federation.yaml", dump(federation))
        return run

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """Open an existing run.

        Raises:
            MmfmError: there is none.
        """
        run = cls(directory)
        if not run.exists:
            raise MmfmError(f"{directory}: there is no run here; check the path, or start a run with 'mmfm simulate'")
        return run

    @property
    def exists(self) -> bool:
        """Whether there is a run in the directory."""
        return "federation" in self.facts

    def delete(self) -> None:
        """Delete the run and all in its directory but its locks, which somebody may be holding.

        Raises:
            MmfmError: another process works on it, or a file cannot be deleted.
        """
        with self.locked():
            # The directory counts as a run to the end, should this be interrupted.
            for path in sorted(self.directory.iterdir(), key=lambda path: path.name == "run.json"):
                if path.name not in LOCKS:
                    try:
                        shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink()
                    except OSError as error:
                        raise MmfmError(f"{path}: cannot be deleted ({error.strerror}); delete it yourself") from error

    @property
    def federation(self) -> Federation:
        """The run's own, resolved copy of the document."""
        return load_federation(self.directory / "federation.yaml")

    @property
    def facts(self) -> dict[str, Any]:
        """What `run.json` says."""
        try:
            facts: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, ValueError) as error:
            raise MmfmError(f"{self.directory / 'run.json'}: cannot be read; restore it, or delete the run") from error
        return facts

    def update(self, **facts: Any) -> None:
        """Add or replace facts of `run.json`."""
        # A line each, and not indented: this is written in every round, with what every site said of itself.
        lines = (f"  {json.dumps(name)}: {json.dumps(fact)}" for name, fact in (self.facts | facts).items())
        write_text(self.directory / "run.json", "{\n" + ",\n".join(lines) + "\n}\n")

    def record(self, **line: Any) -> None:
        """Append one figure to `metrics.jsonl`; it is on the disk once its round's checkpoint is."""
        _append(self.metrics, line)

    def tell(self, text: str, *, level: str = "info", **context: Any) -> None:
        """Append one event, a sentence for people, to `events.jsonl`."""
        # A site's own words may end up in a terminal, which obeys control characters.
        event = {"time": time.time(), "level": level, "text": text, **context}
        _append(
            self.events,
            {key: _printable(value) if isinstance(value, str) else value for key, value in event.items()},
            flush=True,
        )

    def save_checkpoint(self, round_number: int, shared: Tensors, memory: Tensors | None = None) -> None:
        """Keep the shared state after a round, whole or not at all, and drop all but the latest.

        With it, what the strategy remembers beside it (`server.strategy`), if anything.
        """
        folder = self.directory / "checkpoints"
        with whole_folder(folder / f"round-{round_number:05d}") as checkpoint:
            if self.metrics.is_file():
                flush(self.metrics)
            write_tensors(checkpoint / "shared.safetensors", shared)
            if memory:
                write_tensors(checkpoint / "memory.safetensors", memory)
            write_json(checkpoint / "state.json", {"round": round_number, "federation": self.facts["federation"]})
        for old in sorted(folder.glob("round-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def checkpoint(self) -> tuple[int, Tensors] | None:
        """The last whole checkpoint: the round it was made after, and the shared state."""
        found = sorted((self.directory / "checkpoints").glob("round-*"))
        if not found:
            return None
        return int(found[-1].name.removeprefix("round-")), read_tensors(found[-1] / "shared.safetensors")

    def memory(self) -> Tensors:
        """What the strategy remembered at the last whole checkpoint; empty where there was nothing."""
        found = sorted((self.directory / "checkpoints").glob("round-*"))
        path = found[-1] / "memory.safetensors" if found else None
        return read_tensors(path) if path and path.is_file() else {}

    def forget_after(self, round_number: int) -> None:
        """Drop the figures of rounds after `round_number`, which will come again, and lines that a crash cut off."""
        kept = [line for line in read_lines(self.metrics) if line["round"] <= round_number]
        for path, lines in ((self.metrics, kept), (self.events, list(read_lines(self.events)))):
            if path.is_file():
                write_text(path, "".join(json.dumps(line) + "\n" for line in lines))

    @contextmanager
    def locked(self, lock: str = ROUNDS_LOCK) -> Iterator[None]:
        """Hold the run for this process: its rounds, or all of it for a command with workers.

        Raises:
            MmfmError: another process works on it, or the directory is something else or cannot be written.
        """
        self._check_place()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            held = (self.directory / lock).open("w")
        except OSError as error:
            raise MmfmError(
                f"{self.directory}: cannot be written ({error.strerror}); mend the permissions, or name another place "
                "with --run"
            ) from error
        with held as file:
            end = time.monotonic() + LOCK_SECONDS
            while True:
                try:
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() > end:
                        raise MmfmError(
                            f"{self.directory}: another process is working on this run; wait for it to end, or stop it"
                        ) from error
                    time.sleep(0.1)
            yield

    @contextmanager
    def room_kept(self) -> Iterator[None]:
        """Inside, a little of the disk is kept free, so that after it the outcome can be written on a full disk, too.

        Raises:
            MmfmError: there is no room.
        """
        room = self.directory / ROOM
        try:
            try:
                room.write_bytes(os.urandom(ROOM_BYTES))  # what is all zeros may take no room
            except OSError as error:
                raise MmfmError(f"{room}: cannot be written ({error.strerror}); make room, then go on") from error
            yield
        finally:
            room.unlink(missing_ok=True)

    def _check_place(self) -> None:
        # Hidden files are locks, or what a killed process left of a run it was about to create.
        if self.exists or not self.directory.exists():
            return
        if not self.directory.is_dir() or any(not path.name.startswith(".") for path in self.directory.iterdir()):
            raise MmfmError(f"{self.directory}: holds something that is not a run; name another place with --run")


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a line cut off by a crash is not there."""
    if path.is_file():
        with path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else " " for c in text[:TOLD_CHARACTERS])


def _append(path: Path, line: Mapping[str, Any], flush: bool = False) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            if flush:
                file.flush()
                os.fsync(file.fileno())
    except OSError as error:
        raise MmfmError(f"{path}: cannot be written ({error.strerror}); make room, then go on with --resume") from error
