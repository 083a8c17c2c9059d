"""Rounds of a simulation against those of the bare loop: in one process, taking turns round by round.

CPU seconds of neighbouring rounds see the same machine, whatever else runs on it: each round of ours is divided by the
mean of the loop's rounds before and after it, and the median of these ratios is told.
"""

import itertools
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from federations import SIZES, document, hospitals, prepared
from floor import Floor

from mmfm_core.process import keep_memory
from server.engines import in_process
from server.record import Run


@contextmanager
def at_each_round(call: Callable[[int], None]) -> Iterator[None]:
    """Inside the block `call` is made whenever a run has ended a round."""
    update = Run.update

    def told(run: Run, **facts: Any) -> None:
        update(run, **facts)
        if "round" in facts:
            call(facts["round"])

    Run.update = told  # type: ignore[method-assign]
    try:
        yield
    finally:
        Run.update = update  # type: ignore[method-assign]


def overhead(data: Path, size: str, sites: int, per_round: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a round, ours and the floor's, and how many times the floor's ours is.

    Both with freed memory kept, as `mmfm simulate` has it: page faults would fall on either at random.
    """
    torch.set_num_threads(1)
    keep_memory()
    federation, files = document(size, rounds + 1, None if per_round == sites else per_round), hospitals(data, sites)
    floor = Floor(data, size, sites, per_round)
    floor()
    ours: list[float] = []
    theirs: list[float] = []
    mark = time.process_time()

    def turn(number: int) -> None:
        nonlocal mark
        if 1 < number <= rounds + 1:  # the first one reads and warms up; the last one only measures
            ours.append(time.process_time() - mark)
            begun = time.process_time()
            floor()
            theirs.append(time.process_time() - begun)
        mark = time.process_time()

    with TemporaryDirectory() as folder, at_each_round(turn):
        in_process.simulate(prepared(Path(folder) / "run", federation, files))
    around = [(before + after) / 2 for before, after in itertools.pairwise(theirs)]
    ratio = statistics.median(engine / loop for engine, loop in zip(ours[1:], around, strict=True))
    medians = {"floor_cpu": statistics.median(theirs), "ours_cpu": statistics.median(ours)}
    return medians | {"ratio": ratio, "target": SIZES[size].target}
