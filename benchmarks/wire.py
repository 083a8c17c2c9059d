"""What fewer bits on the wire cost in AUROC: an example federation in full precision, half precision and int8.

    python benchmarks/wire.py [--only heart] [--seeds 3] [--out runs/benchmarks/wire]

Runs `mmfm simulate` (a finished run is kept, a killed one goes on) and writes `benchmarks/results/wire.md`: MB that a
round sends, and the leading metric of the adapted models, mean of sites on test patients, mean over seeds; with the
difference to full precision on the same patients and its 95 % interval by bootstrap over patients.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from privacy_utility import shown
from tasks import FEDERATIONS, PROJECT

from mmfm_core.config import load_federation
from server.evidence import Figure, evidence, read_predictions
from server.record import Run, read_lines

FORMS = {
    "full precision": {},
    "half precision": {"state": "fp16", "update": "fp16"},
    "half down, int8 up": {"state": "fp16", "update": "int8"},
}
RESULTS = PROJECT / "benchmarks" / "results" / "wire.md"


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=["heart"])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/wire"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    lines = ["# What fewer bits on the wire cost\n", "`python benchmarks/wire.py`.\n"]
    for name in arguments.only:
        lines += table(name, arguments.seeds, arguments.out)
    RESULTS.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def table(name: str, seeds: int, out: Path) -> Iterator[str]:
    """One example's lines."""
    federation = load_federation(FEDERATIONS / f"{name}.yaml")
    (head,) = federation.model.heads
    runs = {form: [simulate(name, form, seed, out) for seed in range(seeds)] for form in FORMS}
    tables = {form: [read_predictions(run, head, ("adapted", "shared")) for run in of] for form, of in runs.items()}
    predictions = {form: {site: [t[site] for t in found] for site in found[0]} for form, found in tables.items()}
    found = evidence(federation.model.heads[head], head, federation.metrics_of(head)[0], predictions)
    yield f"## {name}, {found.metric}, mean of {len(found.defined)} sites, {seeds} seeds\n"
    yield "| | MB up a round | MB down a round | measured | against full precision |"
    yield "|---|---|---|---|---|"
    full = found.mean_of_sites("full precision")
    for form, of in runs.items():
        up, down = (megabytes(of[0], way) for way in ("bytes_up", "bytes_down"))
        change = Figure.of(found.mean_of_sites(form) - full)
        told = f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]" if FORMS[form] else ""
        yield f"| {form} | {up:.3f} | {down:.3f} | {shown(Figure.of(found.mean_of_sites(form)))} | {told} |"


def megabytes(run: Path, way: str) -> float:
    """What the first round sent."""
    lines = read_lines(Run(run).metrics)
    return next(float(line["value"]) for line in lines if line["metric"] == way and line["round"] == 1) / 1e6


def simulate(name: str, form: str, seed: int, out: Path) -> Path:
    """One run through the command."""
    content = yaml.safe_load((FEDERATIONS / f"{name}.yaml").read_text())
    content["aggregation"] = content.get("aggregation", {}) | {"wire": FORMS[form]}
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
