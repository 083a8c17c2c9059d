"""Generated federations: small grey images of ten classes, an ordinary document, a folder per hospital."""

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump
from mmfm_core.config.text import to_yaml
from mmfm_core.storage import write_text
from server.simulation import prepare

CLASSES = [f"class-{digit}" for digit in range(10)]
SIDE, STUDIES, STEPS, BATCH = 28, 64, 4, 16  # one pass over a site's studies


@dataclass(frozen=True)
class Size:
    """A model: its document, and the most that a round may cost as a multiple of the bare loop's."""

    model: Mapping[str, Any]
    target: float


def _vit(dim: int, depth: int, heads: int, patch: int) -> dict[str, Any]:
    return {
        "dim": dim,
        "modalities": {"image": {"kind": "image2d", "size": [SIDE, SIDE]}},
        "encoders": {"image": {"type": "vit", "patch_size": patch, "depth": depth, "heads": heads}},
        "fusion": {"type": "concat"},
        "heads": {"label": {"type": "classification", "classes": CLASSES}},
    }


SIZES = {
    "0.1 M": Size(_vit(48, 3, 3, 7), 1.10),
    "1.2 M": Size(_vit(128, 6, 4, 4), 1.03),
}


def document(size: str, rounds: int, sites_per_round: int | None) -> Federation:
    """One pass of plain SGD over each site's studies in each round, as in the comparison with other simulators."""
    stage = {
        "name": "train",
        "rounds": rounds,
        "local_steps": STEPS,
        "batch_size": BATCH,
        "tasks": {"label": {}},
        "optimizer": {"type": "sgd", "lr": 0.05, "weight_decay": 0.0},
    }
    aggregation = {"min_sites": 2, "sites_per_round": sites_per_round}
    document = {"name": "speed", "model": SIZES[size].model, "stages": [stage], "aggregation": aggregation}
    return Federation.model_validate(document)


def hospitals(folder: Path, sites: int, studies: int = STUDIES) -> dict[str, Site]:
    """Write the sites' images and manifests; what is there already is kept."""
    return {f"s{index:04d}": _hospital(folder / f"s{index:04d}", index, studies) for index in range(sites)}


def _hospital(folder: Path, index: int, studies: int) -> Site:
    manifest = folder / "manifest.csv"
    if not manifest.is_file():
        rng = np.random.default_rng(index)
        folder.mkdir(parents=True)
        rows = []
        for number in range(studies):
            label = number % len(CLASSES)
            pixels = rng.normal(90, 30, (SIDE, SIDE))
            pixels[2 * label : 2 * label + 6] += 60
            Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number}.png")
            rows.append((number, f"{number}.png", CLASSES[label], "train"))
        with manifest.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(("patient_id", "image", "label", "split"))
            writer.writerows(rows)
    return Site.model_validate(
        {
            "name": folder.name,
            "manifest": manifest.resolve(),
            "modalities": {"image": "image"},
            "targets": {"label": "label"},
        }
    )


def prepared(folder: Path, federation: Federation, sites: Mapping[str, Site]) -> Path:
    """A run directory in which every site approved the document."""
    prepare(folder, federation, sites, expected_sites=len(sites))
    return folder


def documents(folder: Path, federation: Federation, sites: Mapping[str, Site]) -> Path:
    """The two files that `mmfm simulate` is given; returns the federation's."""
    write_text(folder / "speed.yaml", dump(federation))
    entries = {name: site.model_dump(mode="json") for name, site in sites.items()}
    write_text(folder / "speed.sites.yaml", to_yaml({"sites": entries}))
    return folder / "speed.yaml"
