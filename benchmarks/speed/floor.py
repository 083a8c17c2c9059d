"""The floor: a bare PyTorch loop, which nobody could deploy: no messages, no gates, no records.

    python benchmarks/speed/floor.py HOSPITALS SIZE SITES PER_ROUND ROUNDS

Prints a JSON object: seconds of CPU and of the clock after the first round, counted from the start of the process, and
the peak of resident memory.
"""

import json
import random
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from federations import BATCH, CLASSES, SIZES, STEPS
from PIL import Image

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import MultimodalModel, full_model

State = Mapping[str, torch.Tensor]


def read(folder: Path) -> Batch:
    """A site's studies, as our own reader leaves them."""
    rows = [line.split(",") for line in (folder / "manifest.csv").read_text().splitlines()[1:]]
    pixels = np.stack([np.asarray(Image.open(folder / row[1])) for row in rows]).astype(np.float32) / 255
    images = torch.from_numpy(pixels)[:, None]
    images = (images - images.mean()) / images.std()
    here = torch.ones(len(rows), dtype=torch.bool)
    targets = torch.tensor([CLASSES.index(row[2]) for row in rows])
    return Batch({"image": images}, {"image": here}, {"label": targets}, {"label": here})


def one_round(model: MultimodalModel, sites: Sequence[Batch], state: State) -> State:
    """FedAvg over `sites` from a state; returns the next one."""
    total = {name: torch.zeros_like(tensor) for name, tensor in state.items()}
    studies = sum(len(site) for site in sites)
    for site in sites:
        model.load_state_dict(state)
        model.train()
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05, fused=True)  # as ours
        order = torch.randperm(len(site)).tolist()
        for step in range(STEPS):
            optimizer.zero_grad()
            batch = site.rows(order[step * BATCH : (step + 1) * BATCH])
            model.losses(batch, ["label"])["label"].mean().backward()
            optimizer.step()
        for name, tensor in model.state_dict().items():
            total[name] += tensor.detach() * (len(site) / studies)
    return total


class Floor:
    """The loop, to be asked for one round after the other."""

    def __init__(self, folder: Path, size: str, sites: int, per_round: int) -> None:
        self.model = full_model(Model.model_validate(SIZES[size].model), seed=0)
        self.sites = [read(folder / f"s{index:04d}") for index in range(sites)]
        self.state: State = {name: tensor.clone() for name, tensor in self.model.state_dict().items()}
        self.per_round, self._random = per_round, random.Random(0)  # noqa: S311 (no secret)

    def __call__(self) -> None:
        """One round."""
        self.state = one_round(self.model, self._random.sample(self.sites, self.per_round), self.state)


def main(folder: str, size: str, sites: str, per_round: str, rounds: str) -> None:
    """A process of its own."""
    torch.set_num_threads(1)
    loop = Floor(Path(folder), size, int(sites), int(per_round))
    loop()
    cpu, ended = time.process_time(), time.time()
    for _ in range(int(rounds) - 1):
        loop()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(json.dumps({"first_cpu": cpu, "first_ended": ended, "mb": peak}))


if __name__ == "__main__":
    main(*sys.argv[1:])
