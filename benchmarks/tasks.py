"""Every example federation on real data, against what it must beat.

    python benchmarks/tasks.py [--only cells nuclei] [--seeds 3] [--out runs/benchmarks/tasks]

Runs `mmfm simulate` for every federation and seed (a finished run is kept, a killed one goes on) and writes its lines
of `benchmarks/results/tasks.md`; those of federations that were not asked for stay. A figure is of all sites' test
patients together, or of the worst site where each site has to pass, for the model that each site ends with: mean over
seeds, with a 95 % interval by bootstrap over patients of that mean. Where a target is a baseline, the baseline is
computed here from the same test patients. Of a figure that the head counts among its `LOWER_IS_BETTER`, the target is
the most that it may be.
"""

import argparse
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd
import yaml
from references import REFERENCES, shown, threshold

from mmfm_core.config import load_federation
from mmfm_core.config.part import HeadConfig
from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, bootstrap
from server.evidence import read_predictions
from server.record import Run

PROJECT = Path(__file__).parent.parent
FEDERATIONS = PROJECT / "deploy" / "federations"


RESULTS = PROJECT / "benchmarks" / "results" / "tasks.md"
HEADER = """# Every task on real data

`python benchmarks/tasks.py`: mean over seeds of the figure on test patients, with its 95 % interval by bootstrap over
patients, and SD over seeds. `--only NAME` measures one federation anew.

| federation | figure | task | measured | SD | seeds | must reach | |
|---|---|---|---|---|---|---|---|"""

SCRATCH = "from scratch + 0.03"
"""The target of a document that pre-trains: the same one that does not, and three points."""

FOLDING = 0.005
"""The share of pixels that may fold."""

THRESHOLD = "threshold"
"""The target where a contrast is removed: a value of one of the others, chosen on training studies."""


@dataclass(frozen=True)
class Claim:
    """One line of the table.

    Attributes:
        federation: a document in deploy/federations.
        target: what the figure must reach, or the name of a baseline in `references.py` that it must pass.
        each_site: whether every site must, and not only all patients together.
        without: a modality that the model is not shown. The baseline is not shown it either.
    """

    federation: str
    head: str
    metric: str
    target: float | str
    each_site: bool = False
    without: str = ""


def with_any_removed(federation: str) -> tuple[Claim, ...]:
    """Lesions from all contrasts, and with each one removed in turn."""
    left = [Claim(federation, "lesions", "dice", THRESHOLD, without=c) for c in ("t1", "t1post", "t2", "flair")]
    return Claim(federation, "lesions", "dice", "FLAIR threshold"), *left


CLAIMS = (
    *with_any_removed("mri-lesions"),
    *with_any_removed("mri-lesions-joint"),
    *with_any_removed("mri-lesions-3d"),
    Claim("nuclei", "nuclei", "dice", 0.85),
    Claim("vessels", "vessels", "dice", 0.72, each_site=True),
    Claim("cells", "cells", "map50", 0.60),
    Claim("brains-2d", "align", "dice", "unmoved"),
    Claim("brains-2d", "align", "dice", "affine"),
    Claim("brains-2d", "align", "folding", FOLDING),
    Claim("brains-3d", "align", "tre", "unmoved"),
    Claim("brains-3d", "align", "tre", "affine"),
    Claim("brains-3d", "align", "folding", FOLDING),
    Claim("brains-cross-2d", "align", "tre", "unmoved"),
    Claim("brains-cross-2d", "align", "tre", "affine"),
    Claim("brains-cross-2d", "align", "folding", FOLDING),
    Claim("cxr-findings", "findings", "auroc", 0.724),
    Claim("cxr-reports", "report", "bleu4", "commonest report"),
    Claim("cxr-reports", "report", "rouge_l", "commonest report"),
    Claim("cxr-reports", "report", "finding_f1", "commonest report"),
    Claim("cxr-reports", "report", "distinct", 0.5),
    Claim("cxr-reports", "report", "finding_f1", "dealt to others"),
    Claim("cxr-retrieval", "match", "image_to_text_at_10", "five times chance"),
    Claim("cxr-retrieval", "match", "text_to_image_at_10", "five times chance"),
    Claim("scarce-labels", "pneumonia", "auroc", SCRATCH),
    Claim("scarce-labels", "findings", "auroc", SCRATCH),
)


def main() -> None:
    """Run what is missing, measure, write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="federations; all of them where none is named")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("runs/benchmarks/tasks"))
    arguments = parser.parse_args()
    earlier = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    lines = []
    seeds = range(arguments.seeds)
    for claim in CLAIMS:
        if arguments.only and claim.federation not in arguments.only:
            lines += [line for line in earlier if line.startswith(prefix_of(claim)) and line not in lines]
            continue
        document = FEDERATIONS / f"{claim.federation}.yaml"
        if not document.exists():
            continue
        runs = [simulate(document, seed, arguments.out) for seed in seeds]
        target = claim.target
        if target == SCRATCH:
            variant = without_pretraining(document, arguments.out)
            target = figure_of(claim, [simulate(variant, seed, arguments.out) for seed in seeds]) + 0.03
        lines.append(line_of(replace(claim, target=target), runs))
        print(lines[-1], flush=True)
    RESULTS.write_text("\n".join([HEADER, *lines]) + "\n")


def prefix_of(claim: Claim) -> str:
    """How a claim's line begins."""
    without = f"without {claim.without} " if claim.without else ""
    return f"| {claim.federation} | {claim.head} {claim.metric} {without}"


def without_pretraining(document: Path, out: Path) -> Path:
    """The same document without the stages that train objectives alone."""
    content = yaml.safe_load(document.read_text())
    objectives = content["model"].pop("objectives")
    content["stages"] = [stage for stage in content["stages"] if not stage["tasks"].keys() <= objectives.keys()]
    variant = out / f"{document.stem}-scratch.yaml"
    variant.write_text(yaml.safe_dump(content | {"name": variant.stem}, sort_keys=False))
    return variant


def figure_of(claim: Claim, runs: Sequence[Path]) -> float:
    """The mean over seeds on all sites' test patients."""
    head = load_federation(FEDERATIONS / f"{claim.federation}.yaml").model.heads[claim.head]
    return figures(head, claim.metric, [predictions(run, claim.head) for run in runs])[0]


def simulate(document: Path, seed: int, out: Path) -> Path:
    """One run through the command, as a user would start it."""
    run = out / f"{document.stem}-{seed}"
    if not run.exists() or Run(run).facts.get("status") != "completed":
        command = [str(Path(sys.executable).with_name("mmfm")), "simulate", str(document)]
        command += ["--sites", str(FEDERATIONS / f"{document.stem.removesuffix('-scratch')}.sites.yaml")]
        command += ["--run", str(run), "--seed", str(seed), "--no-baselines"]
        subprocess.run([*command, *(["--resume"] if run.exists() else [])], check=True, stdout=subprocess.DEVNULL)
    return run


def line_of(claim: Claim, runs: Sequence[Path]) -> str:
    """One line of the table."""
    federation = load_federation(FEDERATIONS / f"{claim.federation}.yaml")
    head, left = federation.model.heads[claim.head], set(federation.model.modalities) - {claim.without}
    tables = [shown(run, claim.head, left) if claim.without else predictions(run, claim.head) for run in runs]
    groups = {"": tables}
    if claim.each_site:
        sites = list(tables[0]["site"].unique())
        groups = {site: [t[t["site"] == site].reset_index(drop=True) for t in tables] for site in sites}
    measured = {name: figures(head, claim.metric, group) for name, group in groups.items()}
    less = -1 if claim.metric in head.LOWER_IS_BETTER else 1
    worst, (value, low, high, deviation) = min(measured.items(), key=lambda item: less * item[1][0])
    target = claim.target
    if target == THRESHOLD:
        target = threshold(runs[0], claim.head, sorted(left))
    elif isinstance(target, str):
        target = REFERENCES[target](runs[0], claim.head, claim.metric, tables[0])
    named = f"{claim.target}: {target:.3f}" if isinstance(claim.target, str) else f"{target:.3g}"
    named = f"at most {named}" if less < 0 else named
    passed = "reached" if less * value >= less * target else "**missed**"
    where = f"(worst site: {worst}) " if worst else ""
    interval = f"[{low:.3f}, {high:.3f}]" if np.isfinite(low) else "(no interval)"
    spread = f"{deviation:.3f}" if np.isfinite(deviation) else "–"
    return (
        f"{prefix_of(claim)}{where}| {head.type} | {value:.3f} {interval} "
        f"| {spread} | {len(runs)} | {named} | {passed} |"
    )


def predictions(run: Path, head: str) -> pd.DataFrame:
    """All sites' predictions on their test patients, of the model that each ends with."""
    tables = [
        table.assign(site=site, patient=site + "/" + table["patient"])
        for site, table in read_predictions(run, head, ("adapted", "shared")).items()
    ]
    return pd.concat(tables, ignore_index=True)


def figures(head: HeadConfig, metric: str, tables: Sequence[pd.DataFrame]) -> tuple[float, float, float, float]:
    """Mean over seeds, its interval over patients, and the standard deviation over seeds."""
    statistics = [head.statistic(metric, table) for table in tables]
    each = [
        float(s(np.ones((1, len(t))))[0]) if callable(s) else s or np.nan
        for s, t in zip(statistics, tables, strict=True)
    ]
    deviation = float(np.std(each, ddof=1)) if len(each) > 1 else np.nan
    if not all(callable(statistic) for statistic in statistics):
        return float(np.mean(each)), np.nan, np.nan, deviation
    return *bootstrap(mean_of_seeds(statistics), list(tables[0]["patient"])), deviation  # type: ignore[arg-type]


def mean_of_seeds(statistics: Sequence[Callable[[Floats], Floats]]) -> Statistic:
    """The mean of one statistic per seed, all at the same draws of patients."""
    return lambda weights: np.mean([statistic(weights) for statistic in statistics], axis=0)


if __name__ == "__main__":
    main()
