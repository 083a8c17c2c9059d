"""Heart disease at four real hospitals, against the figures measured before this project began.

    python benchmarks/heart.py [--seeds 3] [--out runs/benchmarks/heart]

Runs `mmfm simulate` for every seed, and once more with a local head, and writes `benchmarks/results/heart.md`. The
anchor is the AUROC over all sites' test patients together. It rewards a per-site offset where prevalence differs, so it
only serves to compare with those figures; per site is what counts.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import yaml

PROJECT = Path(__file__).parent.parent
FEDERATION = PROJECT / "deploy" / "federations" / "heart.yaml"
SITES = FEDERATION.with_name("heart.sites.yaml")
ANCHORS = {  # mean and standard deviation over 3 seeds
    "local-only": ("local only", 0.853, 0.008),
    "fedavg": ("FedAvg", 0.835, 0.006),
    "local-head": ("local head", 0.862, 0.007),
    "adapted": ("FedAvg, then adapted fusion and head", 0.866, 0.007),
}


def main() -> None:
    """Run, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/heart"))
    arguments = parser.parse_args()
    started = time.monotonic()
    local_head = arguments.out / "local-head.yaml"
    arguments.out.mkdir(parents=True, exist_ok=True)
    document = yaml.safe_load(FEDERATION.read_text()) | {"parameters": {"shared": ["*"], "local": ["heads.*"]}}
    local_head.write_text(yaml.safe_dump(document, sort_keys=False))
    tasks = []
    for seed in range(arguments.seeds):
        main_run = simulate(FEDERATION, arguments.out / f"seed-{seed}", seed)
        head_run = simulate(local_head, arguments.out / f"local-head-{seed}", seed, "--no-baselines")
        tasks.append(results(main_run) | {"local-head": results(head_run)["fedavg"]})
    text = table(tasks, time.monotonic() - started)
    (PROJECT / "benchmarks" / "results" / "heart.md").write_text(text)
    print(text)


def simulate(federation: Path, run: Path, seed: int, *options: str) -> Path:
    """One run through the command, as a user would start it."""
    command = [str(Path(sys.executable).with_name("mmfm")), "simulate", str(federation), "--sites", str(SITES)]
    command += ["--run", str(run), "--seed", str(seed), *options, *(["--replace"] if run.exists() else [])]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=os.environ)
    return run


def results(run: Path) -> dict[str, dict[str, float | None]]:
    """Method -> site (and 'all') -> AUROC."""
    task = json.loads((run / "comparison.json").read_text())["tasks"][0]
    found = {m: {"all": value["value"]} for m, value in task["all_patients"].items()}
    for site in task["sites"]:
        for method, result in site["results"].items():
            found[method][site["site"]] = result["value"]
    return found


def table(tasks: list[dict[str, dict[str, float | None]]], seconds: float) -> str:
    """Mean and standard deviation over seeds, beside the anchors."""
    sites = [site for site in tasks[0]["fedavg"] if site != "all"]
    lines = [
        "# Heart disease, four hospitals: AUROC on test patients",
        "",
        f"`python benchmarks/heart.py --seeds {len(tasks)}`: {seconds / 60:.1f} minutes on 2 cores. "
        "Mean ± standard deviation over seeds; '–' is undefined (fewer than 5 patients of a class).",
        "",
        "| method | all sites together | anchor | " + " | ".join(sites) + " |",
        "|---" * (3 + len(sites)) + "|",
    ]
    for method, (title, anchor, deviation) in ANCHORS.items():
        cells = [spread([task[method][site] for task in tasks]) for site in ["all", *sites]]
        lines.append(f"| {title} | {cells[0]} | {anchor:.3f} ± {deviation:.3f} | " + " | ".join(cells[1:]) + " |")
    cells = [spread([task["pooled"][site] for task in tasks]) for site in ["all", *sites]]
    lines.append(f"| pooled data (bound) | {cells[0]} | | " + " | ".join(cells[1:]) + " |")
    return "\n".join(lines) + "\n"


def spread(values: list[float | None]) -> str:
    """Mean ± standard deviation."""
    known = [value for value in values if value is not None]
    return f"{np.mean(known):.3f} ± {np.std(known, ddof=1):.3f}" if len(known) > 1 else "–"


if __name__ == "__main__":
    main()
