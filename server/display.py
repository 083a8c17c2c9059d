"""Live progress of runs, read from their directories: the same for every engine, in a terminal and in a log."""

import json
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from server.record import Run


class Tail:
    """The lines that were added to a JSON Lines file since the last look."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._size, self._seen = 0, list[bytes]()

    def lines(self) -> list[dict[str, Any]]:
        """New whole lines; where the coordinator took lines back, those that came instead."""
        if not self._path.is_file() or self._path.stat().st_size == self._size:
            return []
        data = self._path.read_bytes()
        lines = data[: data.rfind(b"\n") + 1].splitlines()
        kept = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(self._seen, lines, strict=False)))
        self._size, self._seen = len(data), lines
        return [json.loads(line) for line in lines[kept:]]


class RunProgress:
    """What is known of one run while it goes on.

    Attributes:
        what: the round it is in, as a short text.
        done: rounds done, with the share of sites that answered in the one that goes on.
    """

    def __init__(self, title: str, run: Run, rounds: int, sites: int) -> None:
        self.title, self.rounds, self.sites = title, rounds, sites
        self.what, self.done = "waiting", 0.0
        self._run, self._metrics, self._events = run, Tail(run.metrics), Tail(run.events)
        self._round = self._answered = 0
        self._losses: list[float] = []
        self._seconds: list[float] = []
        list(self.look())  # what a run to be resumed has done already is no news

    def look(self) -> Iterator[str]:
        """Read what is new; yields a line for each warning and each round that ended."""
        for event in self._events.lines():
            if event["level"] == "warning":
                yield f"warning: {event.get('site') or self.title}: {event['text']}"
        for line in self._metrics.lines():
            if line["round"] != self._round:
                self._round, self._answered, self._losses = line["round"], 0, []
            if line["metric"] == "loss":
                self._losses.append(line["value"])
            ended = line["site"] == "federation" and line["metric"] == "seconds"
            if ended:
                self._seconds.append(line["value"])
            elif line["metric"] == "seconds":
                self._answered += 1
            loss = f", loss {sum(self._losses) / len(self._losses):.3f}" if self._losses else ""
            self.done = self._round - 1 + (1 if ended else 0.99 * self._answered / self.sites)
            self.what = f"round {self._round}/{self.rounds} {line['stage']}, {self._answered}/{self.sites} sites{loss}"
            self.what += self._left()
            if ended:
                yield f"{self.title}: {self.what}, {duration(line['value'])} this round"
        status = self._run.facts.get("status")
        if status == "starting" or (status == "running" and not self._round):
            self.what = "starting"

    def _left(self) -> str:
        if not self._seconds or self.done >= self.rounds:
            return ""
        return f", {duration(sum(self._seconds) / len(self._seconds) * (self.rounds - self.done))} left"


class Display:
    """Bars where there is a terminal, one plain line per round where there is none."""

    def __init__(self, runs: list[RunProgress], console: Console) -> None:
        self._runs, self._console = runs, console
        self._live = console.is_terminal and not console.is_dumb_terminal
        self._warned: set[str] = set()
        self._bars = Progress(
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=10),
            TextColumn("{task.fields[what]}", markup=False),
            console=console,
            disable=not self._live,
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
                warning = line.startswith("warning")
                # What is wrong with a site is wrong with it in every run.
                if line not in self._warned and (warning or not self._live):
                    self._console.print(line, highlight=False, markup=False, soft_wrap=True)
                if warning:
                    self._warned.add(line)
            total = None if run.what == "starting" else run.rounds  # a bar without a total moves by itself
            self._bars.update(self._tasks[run.title], total=total, completed=run.done, what=run.what)


def duration(seconds: float) -> str:
    """A length of time as people say it."""
    if seconds < 99.5:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60:02d} min"
