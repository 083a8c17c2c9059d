"""Live progress of runs, read from their directories: the same for every engine, in a terminal and in a log."""

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from server.record import Run


class Tail:
    """The lines that were added to a JSON Lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path, self._position = path, path.stat().st_size if path.is_file() else 0

    def lines(self) -> list[dict[str, Any]]:
        """New whole lines."""
        if not self._path.is_file():
            return []
        with self._path.open("rb") as file:
            size = file.seek(0, 2)
            self._position = min(self._position, size)  # a resumed run shortens its file
            file.seek(self._position)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._position += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


class RunProgress:
    """What is known of one run while it goes on.

    Attributes:
        what: the round it is in, as a short text.
        done: rounds done, with the share of sites that answered in the one that goes on.
    """

    def __init__(self, title: str, run: Run, rounds: int, sites: int) -> None:
        self.title, self.rounds, self.sites = title, rounds, sites
        self.what, self.done = "starting", 0.0
        self._metrics, self._events = Tail(run.metrics), Tail(run.events)
        self._round = self._answered = 0
        self._losses: list[float] = []
        self._since: tuple[float, float] | None = None  # when, and how many rounds were done then

    def look(self) -> Iterator[str]:
        """Read what is new; yields a line for each warning and each round that ended."""
        for event in self._events.lines():
            if event["level"] == "warning":
                yield f"warning: {event.get('site') or self.title}: {event['text']}"
        for line in self._metrics.lines():
            if line["round"] != self._round:
                self._round, self._answered, self._losses = line["round"], 0, []
                self._since = self._since or (time.monotonic(), self._round - 1)
            if line["metric"] == "loss":
                self._losses.append(line["value"])
            ended = line["site"] == "federation" and line["metric"] == "seconds"
            if line["metric"] == "seconds" and not ended:
                self._answered += 1
            loss = f", loss {sum(self._losses) / len(self._losses):.3f}" if self._losses else ""
            self.what = f"round {self._round}/{self.rounds} {line['stage']}, {self._answered}/{self.sites} sites{loss}"
            self.done = self._round - 1 + (1 if ended else 0.99 * self._answered / self.sites)
            if ended:
                yield f"{self.title}: {self.what}, {line['value']:.1f} s{self._left()}"

    def _left(self) -> str:
        if self._since is None or self.done >= self.rounds:
            return ""
        began, done_then = self._since
        left = (time.monotonic() - began) / (self.done - done_then) * (self.rounds - self.done)
        return f", about {left:.0f} s left"


class Display:
    """Bars where there is a terminal, one plain line per round where there is none."""

    def __init__(self, runs: list[RunProgress], console: Console) -> None:
        self._runs, self._console = runs, console
        self._bars = Progress(
            TextColumn("{task.description:<12}"),
            BarColumn(bar_width=20),
            TextColumn("{task.fields[what]:<44}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )
        self._tasks = {run.title: self._bars.add_task(run.title, total=run.rounds, what=run.what) for run in runs}

    def __enter__(self) -> "Display":
        self._bars.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.refresh()
        self._bars.stop()

    def refresh(self) -> None:
        """Show what happened since the last refresh."""
        for run in self._runs:
            for line in run.look():
                if line.startswith("warning") or not self._console.is_terminal:
                    self._console.print(line, highlight=False, markup=False, soft_wrap=True)
            self._bars.update(self._tasks[run.title], completed=run.done, what=run.what)
