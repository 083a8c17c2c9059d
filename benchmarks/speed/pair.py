"""The bare loop in two processes: each trains half of a round's sites, and the parent adds up what they send.

    python benchmarks/speed/pair.py HOSPITALS SIZE SITES PER_ROUND ROUNDS

Prints a JSON object: seconds of the clock of a round after the first, and MB (Linux's Pss) of the three processes.
"""

import json
import multiprocessing
import random
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from engines import resident_of
from federations import SIZES
from floor import one_round, read

from mmfm_core.config.model import Model
from mmfm_core.models.model import full_model

WORKERS = 2
Arrays = dict[str, np.ndarray]


def work(line: Connection, folder: Path, size: str, sites: int) -> None:
    """Train the sites that are asked for from the state that is sent; never returns."""
    torch.set_num_threads(1)
    model = full_model(Model.model_validate(SIZES[size].model), seed=0)
    data = [read(folder / f"s{index:04d}") for index in range(sites)]
    while True:
        state, chosen = line.recv()
        mean = one_round(model, [data[index] for index in chosen], {n: torch.from_numpy(a) for n, a in state.items()})
        line.send(({name: tensor.numpy() for name, tensor in mean.items()}, sum(len(data[index]) for index in chosen)))


def main(folder: str, size: str, sites: str, per_round: str, rounds: str) -> None:
    """A process of its own."""
    torch.set_num_threads(1)
    context = multiprocessing.get_context("fork")
    lines, children = [], []
    for _ in range(WORKERS):
        ours, theirs = context.Pipe()
        children.append(context.Process(target=work, args=(theirs, Path(folder), size, int(sites)), daemon=True))
        children[-1].start()
        lines.append(ours)
    model = full_model(Model.model_validate(SIZES[size].model), seed=0)
    state: Arrays = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    chooses, begun = random.Random(0), 0.0  # noqa: S311 (no secret)
    for number in range(int(rounds)):
        if number == 1:
            begun = time.time()
        chosen = chooses.sample(range(int(sites)), int(per_round))
        for index, line in enumerate(lines):
            line.send((state, chosen[index::WORKERS]))
        sent = [line.recv() for line in lines]
        studies = sum(count for _, count in sent)
        state = {name: sum(part[name] * (count / studies) for part, count in sent) for name in state}
    wall = (time.time() - begun) / (int(rounds) - 1)
    processes = [Path("/proc/self"), *(Path(f"/proc/{child.pid}") for child in children)]
    print(json.dumps({"wall": wall, "mb": sum(map(resident_of, processes))}))


if __name__ == "__main__":
    main(*sys.argv[1:])
