"""What pre-training is worth as labels grow scarce: `scarce-labels` with 1, 5, 10, 50 and 100 % of its labels.

    python benchmarks/label_curve.py [--seeds 1] [--out runs/benchmarks/label_curve]

At each share, the document as it is (all films pre-train, the labelled ones train) and without its first stage. Writes
`benchmarks/results/label_curve.md`: AUROC of all sites' test patients, mean over seeds.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import yaml
from tasks import FEDERATIONS, PROJECT, figures, predictions, without_pretraining

from mmfm_core.config import load_federation
from server.record import Run

SHARES = (0.01, 0.05, 0.1, 0.5, 1.0)
DOCUMENT = FEDERATIONS / "scarce-labels.yaml"
RESULTS = PROJECT / "benchmarks" / "results" / "label_curve.md"


def main() -> None:
    """Run what is missing, and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/label_curve"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    documents = {"pre-trained": DOCUMENT, "from scratch": without_pretraining(DOCUMENT, arguments.out)}
    heads = load_federation(DOCUMENT).model.heads
    lines = [
        "# What pre-training is worth as labels grow scarce\n",
        f"`python benchmarks/label_curve.py --seeds {arguments.seeds}`: macro AUROC on the test patients of all sites",
        "together, with its 95 % interval by bootstrap over patients.\n",
        "| labelled | " + " | ".join(f"{head}, {how}" for head in heads for how in documents) + " |",
        "|---" * (1 + len(heads) * len(documents)) + "|",
    ]
    for share in SHARES:
        sites = with_labels(share, arguments.out)
        cells = {}
        for how, document in documents.items():
            runs = [simulate(document, sites, seed, arguments.out) for seed in range(arguments.seeds)]
            for head, config in heads.items():
                value, low, high, _ = figures(config, "auroc", [predictions(run, head) for run in runs])
                cells[head, how] = f"{value:.3f} [{low:.3f}, {high:.3f}]"
        lines.append(f"| {share:.0%} | " + " | ".join(cells[head, how] for head in heads for how in documents) + " |")
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join(lines) + "\n")


def with_labels(share: float, out: Path) -> Path:
    """The sites' file, with another share of labelled patients."""
    content = yaml.safe_load(DOCUMENT.with_name("scarce-labels.sites.yaml").read_text())
    content["defaults"]["labelled"] = share
    # Paths in it are relative to where it stood.
    text = yaml.safe_dump(content, sort_keys=False).replace("../../../shared", str(PROJECT.parent / "shared"))
    file = out / f"labelled-{share:g}.sites.yaml"
    file.write_text(text)
    return file


def simulate(document: Path, sites: Path, seed: int, out: Path) -> Path:
    """One run through the command; a finished one is kept, a killed one goes on."""
    run = out / f"{document.stem}-{sites.name.removesuffix('.sites.yaml')}-{seed}"
    if not run.exists() or Run(run).facts.get("status") != "completed":
        command = [str(Path(sys.executable).with_name("mmfm")), "simulate", str(document), "--sites", str(sites)]
        command += ["--run", str(run), "--seed", str(seed), "--no-baselines"]
        subprocess.run([*command, *(["--resume"] if run.exists() else [])], check=True, stdout=subprocess.DEVNULL)
    return run


if __name__ == "__main__":
    main()
