"""What a site's images take: in memory, and in a file of its cache, decoded or found there by a restarted agent.

    python benchmarks/speed/images.py FOLDER STUDIES

Prints a JSON object: GB of images, and of each way the seconds to read them and the MB by which the process grew (its
own pages, Linux's RssAnon; those of a mapped file go when another needs the room).
"""

import json
import multiprocessing
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from mmfm_core.config import Site
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import load_dataset

SIDE, STORED = 384, 64
WAYS = ("memory", "decoded", "found")

MODEL = {
    "dim": 12,
    "modalities": {"film": {"kind": "image2d", "size": [SIDE, SIDE]}},
    "encoders": {"film": {"type": "vit", "patch_size": 16, "depth": 1, "heads": 3}},
    "fusion": {"type": "concat"},
    "heads": {"label": {"type": "classification", "classes": ["no", "yes"]}},
}


def write(folder: Path, studies: int) -> Site:
    """A site of small films, which the model wants large."""
    folder.mkdir(parents=True)
    film, rows = np.random.default_rng(0).integers(0, 255, (STORED, STORED), np.uint8), ["study,patient,film,label"]
    for number in range(studies):
        Image.fromarray(np.roll(film, number, 0)).save(folder / f"{number}.png")
        rows.append(f"s{number},p{number},{number}.png,{number % 2}")
    (folder / "manifest.csv").write_text("\n".join(rows) + "\n")
    return Site.model_validate(
        {
            "name": "here",
            "manifest": str(folder / "manifest.csv"),
            "study": "study",
            "patient": "patient",
            "split": {"train": 0.7, "val": 0.1, "test": 0.2},
            "modalities": {"film": "film"},
            "targets": {"label": {"column": "label", "values": {"0": "no", "1": "yes"}}},
        }
    )


def own_pages() -> float:
    """MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon:")) / 1024


def read(line: Connection, site: Site, cache: Path | None) -> None:
    """Read the site and gather every tenth study, in a process of its own."""
    torch.set_num_threads(1)
    model, before, begun = Model.model_validate(MODEL), own_pages(), time.monotonic()
    dataset = load_dataset(site, model, cache=cache)
    seconds = time.monotonic() - begun
    for start in range(0, len(dataset), 160):
        dataset.batch(range(start, min(start + 16, len(dataset)))).inputs["film"].sum()
    line.send((seconds, own_pages() - before))


def main(folder: str, studies: str) -> None:
    """A process of its own."""
    site = write(Path(folder), int(studies))
    figures: dict[str, float] = {"gb": 4e-9 * SIDE**2 * int(studies)}
    for way in WAYS:
        ours, theirs = multiprocessing.get_context("fork").Pipe()
        child = multiprocessing.get_context("fork").Process(
            target=read, args=(theirs, site, None if way == "memory" else Path(folder) / "cache")
        )
        child.start()
        figures[f"{way}_seconds"], figures[f"{way}_mb"] = ours.recv()
        child.join()
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
