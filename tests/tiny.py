"""A tiny federation for tests: two generated sites, a small model, seconds to run."""

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from client.gates import approve
from mmfm_core.config import Federation, Site
from mmfm_core.config.loading import dump
from mmfm_core.storage import write_text
from server.record import Run

SIDE = 16
MODALITIES = ("scan", "note", "labs")
SITES: Mapping[str, Sequence[str]] = {"north": MODALITIES, "south": ("note", "labs")}
WORDS = {"healthy": ("clear", "normal", "quiet"), "ill": ("fever", "cough", "opacity")}
SPLITS = ("train", "train", "train", "val", "test", "test")


def tiny_federation(**changes: Any) -> Federation:
    """A document with an image, a text, a table and one binary head; `changes` replace whole top-level entries."""
    document: dict[str, Any] = {
        "name": "tiny",
        "model": {
            "dim": 12,
            "modalities": {
                "scan": {"kind": "image2d", "size": [SIDE, SIDE], "optional": True},
                "note": {"kind": "text", "max_length": 24, "optional": True},
                "labs": {"kind": "tabular", "features": ["crp", "age"], "optional": True},
            },
            "encoders": {
                "scan": {"type": "vit", "patch_size": 8, "depth": 1},
                "note": {"type": "bert", "depth": 1},
                "labs": {"type": "feature_tokens"},
            },
            "fusion": {"type": "gated", "modality_dropout": 0.2},
            "heads": {"disease": {"type": "classification", "classes": list(WORDS)}},
        },
        "stages": [
            {"name": "train", "rounds": 2, "local_steps": 4, "batch_size": 8, "tasks": {"disease": {}}},
            {
                "name": "adapt",
                "federated": False,
                "local_steps": 4,
                "batch_size": 8,
                "train": ["fusion.*", "heads.*"],
                "tasks": {"disease": {}},
            },
        ],
        "aggregation": {"min_sites": 2, "quorum_wait": 120, "deadline": 240},
    }
    return Federation.model_validate(document | changes)


def private_federation(privacy: Mapping[str, Any] | None = None, **changes: Any) -> Federation:
    """The same with patient-level privacy, and nothing normalised by what a site's patients are like."""
    document = tiny_federation().model_dump(mode="json")
    document["model"]["modalities"]["scan"]["normalize"] = "study"
    declared = {"normalize": {"mean": 10, "std": 30}}
    document["model"]["modalities"]["labs"]["features"] = {"crp": declared, "age": declared}
    document["privacy"] = {"epsilon": 8, "delta": 1e-5, "rate": 0.5} | dict(privacy or {})
    return Federation.model_validate(document | changes)


def write_sites(folder: Path, sites: Mapping[str, Sequence[str]] = SITES, patients: int = 24) -> dict[str, Site]:
    """Write each site's manifest and images into `folder/<site>`; `sites` says which modalities each one holds.

    A patient has one study or two, in one split; every modality tells something about the label, and one study in six
    lacks each of them.
    """
    return {
        name: _write_site(folder / name, name, held, patients, seed) for seed, (name, held) in enumerate(sites.items())
    }


def prepare_run(folder: Path, federation: Federation, sites: Mapping[str, Site]) -> Path:
    """A run directory in which every site approved the document."""
    Run.create(folder, federation, expected_sites=len(sites))
    for name, site in sites.items():
        write_text(folder / "sites" / name / "site.yaml", dump(site))
        approve(folder / "sites" / name / "approved", federation)
    return folder


def _write_site(folder: Path, name: str, held: Sequence[str], patients: int, seed: int) -> Site:
    rng = np.random.default_rng(seed)
    (folder / "scans").mkdir(parents=True)
    rows: list[dict[str, str]] = []
    for patient in range(patients):
        split = SPLITS[patient % len(SPLITS)]
        label = list(WORDS)[(patient + patient // len(SPLITS)) % 2]  # both labels in every split
        for visit in range(1 + patient % 2):
            study = f"{name}-{patient}-{visit}"
            image = rng.normal(110 + 40 * (label == "ill"), 30, (SIDE, SIDE)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "scans" / f"{study}.png")
            crp, age = rng.normal(5 + 5 * (label == "ill"), 3), rng.integers(20, 90)
            cells = {
                "scan": {"scan": f"scans/{study}.png"},
                "note": {"note": " ".join(rng.choice(WORDS[label], 2))},
                "labs": {"crp": f"{crp:.2f}", "age": str(age)},
            }
            row = {"study": study, "patient_id": f"{name}-{patient}", "split": split, "disease": label}
            for index, modality in enumerate(MODALITIES):
                absent = len(rows) % 6 == index
                row |= {column: "" if absent else cell for column, cell in cells[modality].items()}
            rows.append(row)
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    mappings = {"scan": "scan", "note": "note", "labs": {"features": {"crp": "crp", "age": "age"}}}
    return Site.model_validate(
        {
            "name": name,
            "manifest": manifest.resolve(),
            "study": "study",
            "modalities": {modality: mappings[modality] for modality in held},
            "targets": {"disease": "disease"},
            "release": {"min_count": 1},
        }
    )
