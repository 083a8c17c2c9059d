"""What a site's images take: in memory, and in a file of its cache, decoded or found there by a restarted agent.

    python benchmarks/speed/images.py FOLDER STUDIES

Prints a JSON object: GB of images, and of each way the seconds to read them and the MB by which the process grew (its
own pages, Linux's RssAnon; those of a mapped file go when another needs the room). Then the milliseconds that a batch
out of a file that the system holds nothing of is waited for, beside a step of computing: `cold`, and `foreseen` where
the one before told of it.
"""

import json
import multiprocessing
import os
import statistics
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


def waited(site: Site, cache: Path, ahead: bool) -> float:
    """Milliseconds, the mean of batches of 16 in a random order, each followed by a step of about 40 ms."""
    (file,) = (cache / "images").glob("*.npy")
    with file.open() as opened:
        os.fsync(opened.fileno())
        os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dataset = load_dataset(site, Model.model_validate(MODEL), cache=cache)
    order = np.random.default_rng(0).permutation(len(dataset)).tolist()
    matrix, waits = torch.rand(700, 700), []
    for start in range(0, len(order) - 16, 16):
        begun = time.monotonic()
        dataset.batch(order[start : start + 16], order[start + 16 : start + 32] if ahead else ()).inputs["film"]
        waits.append(time.monotonic() - begun)
        for _ in range(4):
            matrix @ matrix
    return 1e3 * statistics.mean(waits)


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
    torch.set_num_threads(1)
    for name, ahead in (("cold_ms", False), ("foreseen_ms", True)):
        figures[name] = waited(site, Path(folder) / "cache", ahead)
    print(json.dumps(figures))


if __name__ == "__main__":
    main(*sys.argv[1:])
