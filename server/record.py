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
from mmfm_core.storage import Tensors, read_tensors, whole_folder, write_json, write_tensors, write_text

KEPT_CHECKPOINTS = 2
LOCK_SECONDS = 3.0  # a killed command's worker takes a moment to notice


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
        if (directory / "run.json").is_file():
            if run.checkpoint() is not None:
                raise MmfmError(
                    f"{directory}: a run is already here; go on with --resume, start over with --replace, "
                    "or name another place with --run"
                )
            run.delete()
        elif directory.exists() and (not directory.is_dir() or any(directory.iterdir())):
            raise MmfmError(f"{directory}: holds something that is not a run; name another place with --run")
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

    def delete(self) -> None:
        """Delete the run and all in its directory.

        Raises:
            MmfmError: another process works on it.
        """
        with self.locked():
            shutil.rmtree(self.directory)

    @classmethod
    def open(cls, directory: Path) -> "Run":
        """Open an existing run.

        Raises:
            MmfmError: there is none.
        """
        if not (directory / "run.json").is_file():
            raise MmfmError(f"{directory}: there is no run here; leave --resume out to start one")
        return cls(directory)

    @property
    def federation(self) -> Federation:
        """The run's own, resolved copy of the document."""
        return load_federation(self.directory / "federation.yaml")

    @property
    def facts(self) -> dict[str, Any]:
        """What `run.json` says."""
        try:
            facts: dict[str, Any] = json.loads((self.directory / "run.json").read_text())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            raise MmfmError(f"{self.directory / 'run.json'}: is damaged; start over with --replace") from error
        return facts

    def update(self, **facts: Any) -> None:
        """Add or replace facts of `run.json`."""
        write_json(self.directory / "run.json", self.facts | facts)

    def record(self, **line: Any) -> None:
        """Append one figure to `metrics.jsonl`."""
        _append(self.metrics, line)

    def tell(self, text: str, *, level: str = "info", **context: Any) -> None:
        """Append one event, a sentence for people, to `events.jsonl`."""
        _append(self.events, {"time": time.time(), "level": level, "text": text, **context})

    def save_checkpoint(self, round_number: int, shared: Tensors) -> None:
        """Keep the shared state after a round, whole or not at all, and drop all but the latest."""
        folder = self.directory / "checkpoints"
        with whole_folder(folder / f"round-{round_number:05d}") as checkpoint:
            write_tensors(checkpoint / "shared.safetensors", shared)
            write_json(checkpoint / "state.json", {"round": round_number, "federation": self.facts["federation"]})
        for old in sorted(folder.glob("round-*"))[:-KEPT_CHECKPOINTS]:
            shutil.rmtree(old)

    def checkpoint(self) -> tuple[int, Tensors] | None:
        """The last whole checkpoint: the round it was made after, and the shared state."""
        found = sorted((self.directory / "checkpoints").glob("round-*"))
        if not found:
            return None
        return int(found[-1].name.removeprefix("round-")), read_tensors(found[-1] / "shared.safetensors")

    def forget_after(self, round_number: int) -> None:
        """Drop the figures of rounds after `round_number`, which a resumed run will produce again."""
        lines = list(read_lines(self.metrics))
        write_text(self.metrics, "".join(json.dumps(line) + "\n" for line in lines if line["round"] <= round_number))

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the run for this process.

        Raises:
            MmfmError: another process works on it.
        """
        with (self.directory / ".lock").open("w") as file:
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


def read_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSON Lines file; a line cut off by a crash is not there."""
    if path.is_file():
        with path.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def _append(path: Path, line: Mapping[str, Any]) -> None:
    try:
        with path.open("a") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise MmfmError(f"{path}: cannot be written ({error.strerror}); make room, then go on with --resume") from error
