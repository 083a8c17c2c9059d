"""What patient-level privacy costs in AUROC: each private example at several epsilons and without privacy.

    python benchmarks/public_weights.py
    python benchmarks/privacy_utility.py [--only heart-private] [--seeds 3] [--out runs/benchmarks/privacy]

Runs `mmfm simulate` (a finished run is kept, a killed one goes on) and writes its part of
`benchmarks/results/privacy_utility.md`: mean of sites on test patients, mean over seeds, with a 95 % interval by
bootstrap over patients; and at how many sites the private federation is above that site training alone without noise.
"""

import argparse
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import yaml
from tasks import FEDERATIONS, PROJECT

from mmfm_core.config import load_federation
from server.evidence import Evidence, Figure, evidence, read_predictions
from server.record import Run

EXAMPLES = {  # document -> its sites
    "heart-private": "heart",
    "pneumonia-private": "pneumonia-private",
    "cxr-private": "cxr-findings",
}
EPSILONS = (1.0, 3.0, 8.0, None)
RESULTS = PROJECT / "benchmarks" / "results" / "privacy_utility.md"
NOT_PRIVATE = "none"


def main() -> None:
    """Run what is missing, and write the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", default=list(EXAMPLES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/privacy"))
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "artifacts").exists() or (arguments.out / "artifacts").symlink_to(FEDERATIONS / "artifacts")
    parts = dict(earlier(RESULTS))
    for name in arguments.only:
        parts[name] = "\n".join(table(name, measured(name, arguments.seeds, arguments.out), arguments.seeds)) + "\n"
        print(parts[name], flush=True)
        heading = (
            "# What patient-level privacy costs\n\n`python benchmarks/privacy_utility.py`. Epsilon is of each patient"
        )
        heading += " at each site, by Renyi differential privacy, at the document's delta.\n"
        RESULTS.write_text("\n".join([heading, *(parts[name] for name in EXAMPLES if name in parts)]))


def earlier(results: Path) -> Iterator[tuple[str, str]]:
    """The tables that stand in a file of results, which are kept where they are not measured anew."""
    for part in results.read_text().split("\n## ")[1:] if results.is_file() else ():
        yield part.split(",")[0], f"## {part}"


def measured(name: str, seeds: int, out: Path) -> Evidence:
    """The leading metric of all ways, on the same draws of each site's patients."""
    ways: dict[str, list[tuple[Path, tuple[str, ...]]]] = {}
    for epsilon in EPSILONS:
        for seed in range(seeds):
            run = simulate(with_epsilon(name, epsilon, out), epsilon, seed, out)
            told = f"ε {epsilon:g}" if epsilon else NOT_PRIVATE
            ways.setdefault(f"federated, {told}", []).append((run, ("shared",)))
            ways.setdefault(f"adapted, {told}", []).append((run, ("adapted",)))
            if epsilon is None:
                ways.setdefault("alone", []).append((run / "baselines" / "local-only", ("adapted",)))
    federation = load_federation(FEDERATIONS / f"{name}.yaml")
    (head,) = federation.model.heads
    tables = {way: [read_predictions(run, head, states) for run, states in runs] for way, runs in ways.items()}
    predictions = {way: {site: [t[site] for t in found] for site in found[0]} for way, found in tables.items()}
    return evidence(federation.model.heads[head], head, federation.metrics_of(head)[0], predictions)


def with_epsilon(name: str, epsilon: float | None, out: Path) -> Path:
    """The document with another epsilon, or without privacy."""
    content = yaml.safe_load((FEDERATIONS / f"{name}.yaml").read_text())
    if epsilon is None:
        del content["privacy"]
    else:
        content["privacy"]["epsilon"] = epsilon
    document = out / f"{name}-{f'{epsilon:g}' if epsilon else NOT_PRIVATE}.yaml"
    document.write_text(yaml.safe_dump(content, sort_keys=False))
    return document


def simulate(document: Path, epsilon: float | None, seed: int, out: Path) -> Path:
    """One run through the command; the bounds are trained beside the one without privacy."""
    run = out / f"{document.stem}-{seed}"
    if not run.exists() or Run(run).facts.get("status") != "completed":
        name = document.stem.rpartition("-")[0]
        command = [str(Path(sys.executable).with_name("mmfm")), "simulate", str(document), "--run", str(run)]
        command += ["--sites", str(FEDERATIONS / f"{EXAMPLES[name]}.sites.yaml"), "--seed", str(seed)]
        command += ["--no-baselines"] * (epsilon is not None) + ["--resume"] * run.exists()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    return run


def table(name: str, found: Evidence, seeds: int) -> Iterator[str]:
    """One example's lines."""
    columns = [f"ε {epsilon:g}" if epsilon else "without privacy" for epsilon in EPSILONS]
    yield f"## {name}, {found.metric}, mean of {len(found.defined)} sites, {seeds} seeds\n"
    yield f"| | {' | '.join(columns)} |"
    yield "|---" * (1 + len(columns)) + "|"
    alone = Figure.of(found.mean_of_sites("alone"))
    yield f"| each site alone | {' | '.join(['–'] * (len(columns) - 1))} | {shown(alone)} |"
    for way in ("federated", "adapted"):
        of = [f"{way}, {f'ε {epsilon:g}' if epsilon else NOT_PRIVATE}" for epsilon in EPSILONS]
        yield f"| {way} | {' | '.join(shown(Figure.of(found.mean_of_sites(each))) for each in of)} |"
    yield ""
    for way in ("federated", "adapted"):
        lost = Figure.of(found.mean_of_sites(f"{way}, ε 8") - found.mean_of_sites(f"federated, {NOT_PRIVATE}"))
        interval = f"[{lost.low:+.3f}, {lost.high:+.3f}]"
        yield f"- {way.capitalize()} at ε 8 against federated without privacy: {lost.value:+.3f} {interval}."
    for way in ("federated, ε 8", "adapted, ε 8"):
        better = [s for s in found.defined if found.site(way, s).value > found.site("alone", s).value]
        yield f"- {way}: above training alone without noise at {len(better)} of {len(found.defined)} sites."


def shown(figure: Figure) -> str:
    """A value with its interval."""
    return f"{figure.value:.3f} [{figure.low:.3f}, {figure.high:.3f}]"


if __name__ == "__main__":
    main()
