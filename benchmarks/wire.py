"""What sending less costs in AUROC: fewer bits a number, and fewer numbers (adapters alone; a fusion that stays).

    python benchmarks/public_weights.py
    python benchmarks/wire.py [--only heart] [--seeds 3] [--out runs/benchmarks/wire]

Runs `mmfm simulate` (a finished run is kept, a killed one goes on) and writes its part of `benchmarks/results/wire.md`:
MB that a round sends, and the leading metric of the models that sites end with, mean of sites on test patients, mean
over seeds; with the difference to the first row on the same patients and its 95 % interval by bootstrap over patients.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from privacy_utility import earlier, shown
from tasks import FEDERATIONS, PROJECT

from mmfm_core.config import load_federation
from server.evidence import Figure, evidence, read_predictions
from server.record import Run, read_lines

Lines = Mapping[str, Any]
"""What replaces a document's own, by top-level entry; `stages` goes into each stage."""

HALF = {"aggregation": {"wire": {"state": "fp16", "update": "fp16"}}}
INT8 = {"aggregation": {"wire": {"state": "fp16", "update": "int8"}}}
EVERYTHING = {
    "model": {"adapters": {}},
    "parameters": {"frozen": [], "shared": ["*"]},
    "stages": {"optimizer": {"type": "adamw", "lr": 2.0e-4, "weight_decay": 0.01}},
}


FUSION_STAYS = {"parameters": {"local": ["fusion.*"]}}

EXAMPLES: Mapping[str, Mapping[str, Lines]] = {
    "heart": {"full precision": {}, "half precision": HALF, "half down, int8 up": INT8},
    "report-labels": {
        "everything trained and sent": EVERYTHING,
        "adapters, fusion and head": {},
        "adapters and head": FUSION_STAYS,
        "adapters, half down, int8 up": INT8,
    },
}
"""The forms that each document is run in; the others are compared with the first."""

RESULTS = PROJECT / "benchmarks" / "results" / "wire.md"


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(EXAMPLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/wire"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "artifacts").exists() or (arguments.out / "artifacts").symlink_to(FEDERATIONS / "artifacts")
    parts = dict(earlier(RESULTS))
    for name in arguments.only:
        parts[name] = "\n".join(table(name, arguments.seeds, arguments.out)) + "\n"
        print(parts[name], flush=True)
    heading = "# What sending less costs\n\n`python benchmarks/wire.py`.\n"
    RESULTS.write_text("\n".join([heading, *(parts[name] for name in EXAMPLES if name in parts)]))


def table(name: str, seeds: int, out: Path) -> Iterator[str]:
    """One example's lines."""
    federation = load_federation(FEDERATIONS / f"{name}.yaml")
    (head,) = federation.model.heads
    runs = {form: [simulate(name, form, seed, out) for seed in range(seeds)] for form in EXAMPLES[name]}
    tables = {form: [read_predictions(run, head, ("adapted", "shared")) for run in of] for form, of in runs.items()}
    predictions = {form: {site: [t[site] for t in found] for site in found[0]} for form, found in tables.items()}
    found = evidence(federation.model.heads[head], head, federation.metrics_of(head)[0], predictions)
    first = next(iter(EXAMPLES[name]))
    yield f"## {name}, {found.metric}, mean of {len(found.defined)} sites, {seeds} seeds\n"
    yield f"| | MB up a round | MB down a round | measured | against {first} |"
    yield "|---|---|---|---|---|"
    for form, of in runs.items():
        up, down = (megabytes(of[0], way) for way in ("bytes_up", "bytes_down"))
        change = Figure.of(found.mean_of_sites(form) - found.mean_of_sites(first))
        told = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if form != first else ""
        yield f"| {form} | {up:.3f} | {down:.3f} | {shown(Figure.of(found.mean_of_sites(form)))} | {told} |"


def megabytes(run: Path, way: str) -> float:
    """What the first round sent."""
    lines = read_lines(Run(run).metrics)
    return next(float(line["value"]) for line in lines if line["metric"] == way and line["round"] == 1) / 1e6


def simulate(name: str, form: str, seed: int, out: Path) -> Path:
    """One run through the command."""
    content = yaml.safe_load((FEDERATIONS / f"{name}.yaml").read_text())
    for entry, lines in EXAMPLES[name][form].items():
        if entry == "stages":
            content[entry] = [stage | lines for stage in content[entry]]
        else:
            content[entry] = content.get(entry, {}) | lines
    stem = f"{name}-{form.replace(', ', '-').replace(' ', '-')}"
    document, run = out / f"{stem}.yaml", out / f"{stem}-{seed}"
    document.write_text(yaml.safe_dump(content, sort_keys=False))
    if not run.exists() or Run(run).facts.get("status") != "completed":
        command = [str(Path(sys.executable).with_name("mmfm")), "simulate", str(document), "--run", str(run)]
        command += ["--sites", str(FEDERATIONS / f"{name}.sites.yaml"), "--seed", str(seed), "--no-baselines"]
        subprocess.run([*command, *["--resume"] * run.exists()], check=True, stdout=subprocess.DEVNULL)
    return run


if __name__ == "__main__":
    main()
