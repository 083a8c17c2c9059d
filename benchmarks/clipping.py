"""What one clipped gradient per patient costs: CPU seconds and memory of each engine against a step without privacy.

    OMP_NUM_THREADS=1 python benchmarks/clipping.py [--repeats 5]

Random studies, one per patient, all parameters trained. Times are of this process alone, medians of repeats in which
all engines take turns, with freed memory kept, as everywhere in `mmfm`. Memory is the peak of resident memory above
what it was before the step, of a process that does nothing else. Writes `benchmarks/results/clipping.md`.
"""

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.privacy.engines import ENGINES
from mmfm_core.process import keep_memory

RESULTS = Path(__file__).parent / "results" / "clipping.md"
WAYS = ("without privacy", *ENGINES)
BATCHES = (8, 32)
LEAST_SECONDS = 3.0  # of steps without privacy
FEATURES = 12
CLASSES = ["none", "mild", "severe"]


def document(image: int = 0, text: int = 0, table: bool = False) -> dict[str, Any]:
    """A model of a frontal image of `image` pixels a side, a note of `text` bytes and a table, where asked."""
    parts: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    if image:
        parts["frontal"] = {"kind": "image2d", "size": [image, image]}, {"type": "vit", "patch_size": 16}
    if text:
        parts["note"] = {"kind": "text", "max_length": text}, {"type": "bert"}
    if table:
        features = [f"f{index}" for index in range(FEATURES)]
        parts["labs"] = {"kind": "tabular", "features": features}, {"type": "feature_tokens"}
    return {
        "dim": 192,
        "modalities": {name: modality for name, (modality, _) in parts.items()},
        "encoders": {name: encoder for name, (_, encoder) in parts.items()},
        "fusion": {"type": "joint", "depth": 1, "modality_dropout": 0.0},
        "heads": {"task": {"type": "classification", "classes": CLASSES}},
    }


MODELS = {
    "image, 16 tokens": document(image=64),
    "image, 196 tokens": document(image=224),
    "image, 576 tokens": document(image=384),
    "text, 128 tokens": document(text=128),
    "image + text + table, 60 tokens": document(image=64, text=32, table=True),
}


def studies(config: Model, rows: int) -> Batch:
    """Random studies with everything."""
    inputs = {}
    for name, modality in config.modalities.items():
        inputs[name] = {
            "image2d": lambda form=modality: torch.randn(rows, 1, *form.size),
            "text": lambda form=modality: torch.randint(3, 259, (rows, form.max_length)),
            "tabular": lambda: torch.randn(rows, FEATURES),
        }[modality.kind]()
    here = torch.ones(rows, dtype=torch.bool)
    return Batch(inputs, dict.fromkeys(inputs, here), {"task": torch.randint(3, (rows,))}, {"task": here})


def step(way: str, model: MultimodalModel, batch: Batch) -> None:
    """The gradient that an optimiser would take."""

    def losses(batch: Batch) -> torch.Tensor:
        return model.losses(batch, ["task"])["task"]

    if way in ENGINES:
        ENGINES[way](model, losses, batch, torch.arange(len(batch)), dict(model.named_parameters()), 1.0)
    else:
        losses(batch).mean().backward()
        model.zero_grad()


def seconds(model: MultimodalModel, batch: Batch, repeats: int) -> dict[str, float]:
    """The median of each way, over so many repeats, or over more where a step is short."""
    taken: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:  # the first one warms up
        step(way, model, batch)
    while repeats and (len(taken[WAYS[0]]) < repeats or sum(taken[WAYS[0]]) < LEAST_SECONDS):
        for way in WAYS:
            start = time.process_time()
            step(way, model, batch)
            taken[way].append(time.process_time() - start)
    return {way: statistics.median(each) for way, each in taken.items() if each}


def peak(model: MultimodalModel, batch: Batch, way: str) -> float:
    """MB of resident memory that a step takes at most, of this process (Linux)."""
    step(way, model, batch.rows([0]))
    before = _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # forgets the peak so far
    step(way, model, batch)
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024


def built(name: str, rows: int) -> tuple[MultimodalModel, Batch]:
    """A model and a batch."""
    torch.manual_seed(0)
    config = Model.model_validate(MODELS[name])
    return full_model(config, seed=0).train(), studies(config, rows)


def in_child(measure: Callable[..., Any], name: str, rows: int, *arguments: object) -> Any:
    """What `measure` says of a model and a batch, in a process that has computed nothing before."""
    context = multiprocessing.get_context("fork")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=lambda: theirs.send(measure(*built(name, rows), *arguments)))
    child.start()
    found = ours.recv()
    child.join()
    return found


def main() -> None:
    """Measure everything, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    keep_memory()
    seconds(*built(next(iter(MODELS)), 1), 0)  # loads libraries, for all children
    lines = [
        "# What one clipped gradient per patient costs\n",
        f"`OMP_NUM_THREADS=1 python benchmarks/clipping.py --repeats {arguments.repeats}`, torch {torch.__version__}.",
        "CPU seconds per step in one thread, as multiples of the step without privacy, and the step's own peak of",
        "resident memory. Width 192, four layers an encoder, one of fusion; one study per patient; all parameters are",
        "trained.\n",
        "| model | batch | " + " | ".join(WAYS) + " |",
        "|---" * (2 + len(WAYS)) + "|",
    ]
    for name in MODELS:
        for rows in BATCHES:
            times = in_child(seconds, name, rows, arguments.repeats)
            cells = []
            for way in WAYS:
                time_cell = f"{times[way]:.2f} s" if way == WAYS[0] else f"{times[way] / times[WAYS[0]]:.2f} ×"
                cells.append(f"{time_cell}, {in_child(peak, name, rows, way):.0f} MB")
            lines.append(f"| {name} | {rows} | " + " | ".join(cells) + " |")
            print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
