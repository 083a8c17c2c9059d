"""How fast a simulation is, against references in the same run; fails where a ratio got worse than the stored one.

    python benchmarks/speed              # the short form: minutes (`make bench`)
    python benchmarks/speed --full       # all of it
    python benchmarks/speed --only NAME  # one question, as often as named
    ... --store                          # and keep the figures, in benchmarks/results/speed.md and speed.json

CPU seconds of whole processes with one thread each, medians; see each file here for how its question is asked.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported
import engines
import startup
from federations import STUDIES
from rounds import overhead

HERE = Path(__file__).parent
STORED = HERE.parent / "results" / "speed.json"
MARGIN = 0.10  # of a ratio: more than runs differ in on a busy machine
Figures = Mapping[str, float]


def program(name: str, *words: object) -> dict[str, float]:
    """The figures that a program beside this one prints."""
    command = [sys.executable, HERE / name, *map(str, words)]
    found: dict[str, float] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def many_sites(data: Path) -> dict[str, float]:
    """Memory of 1,000 sites against that of 20, both with 16 studies a site."""
    few, many = (program("memory.py", data / "small", sites, 10, 5, 16) for sites in (20, 1000))
    return {"20_mb": few["last"], "1000_mb": many["last"], "ratio": many["last"] / few["last"], "target": 1.3}


def many_rounds(data: Path) -> dict[str, float]:
    """Memory after 200 rounds against that after 20."""
    seen = program("memory.py", data, 20, 2, 200, STUDIES)
    return seen | {"ratio": seen["last"] / seen["tenth"], "target": 1.05}


def many_images(data: Path) -> dict[str, float]:
    """Memory that a restarted site takes for its images where they lie in a file, against all of them in memory."""
    seen = program("images.py", data / "images", 3000)
    return seen | {"ratio": seen["found_mb"] / seen["memory_mb"], "target": 0.1}


def questions(data: Path) -> dict[str, tuple[bool, Callable[[], Figures]]]:
    """What is asked, by name: whether the short form asks it, and who answers."""
    demo = HERE.parents[1] / "deploy" / "federations" / "demo.yaml"
    asked: dict[str, tuple[bool, Callable[[], Figures]]] = {
        "a round, 0.1 M, 10 of 20 sites": (True, lambda: overhead(data, "0.1 M", 20, 10, 90)),
        "a round, 1.2 M, 10 of 20 sites": (True, lambda: overhead(data, "1.2 M", 20, 10, 15)),
        "a round, 0.1 M, 10 of 100 sites": (False, lambda: overhead(data, "0.1 M", 100, 10, 90)),
        "a round, 1.2 M, 10 of 100 sites": (False, lambda: overhead(data, "1.2 M", 100, 10, 15)),
        "a round in one process against Ray, 0.1 M": (False, lambda: engines.against_ray(data, 20, 10, 20)),
        "a round in two workers, wall, 1.2 M": (False, lambda: engines.two_workers(data, 20, 10, 12)),
        "memory of two workers against the loop's + 150 MB": (
            False,
            lambda: engines.memory_of_two_workers(data, 20, 10, 6),
        ),
        "to the first round's end, 0.1 M": (True, lambda: startup.first_round(data, "0.1 M", 20, 10)),
        "aggregation, 50 replies of 100 MB": (True, lambda: program("aggregation.py")),
        "memory of 1,000 sites against 20": (False, lambda: many_sites(data)),
        "memory after 200 rounds against 20": (False, lambda: many_rounds(data)),
        "memory of 3,000 images of 384 x 384, in a file against in memory": (False, lambda: many_images(data)),
        "mmfm --help, CPU seconds": (True, lambda: {"ratio": startup.cpu_of([startup.MMFM, "--help"]), "target": 0.5}),
        "mmfm plan, CPU seconds": (True, lambda: startup.plan(demo)),
        "the demo's first round, seconds": (True, lambda: startup.demo(demo)),
    }
    return asked


def worse(new: Figures, old: Figures) -> bool:
    """Whether a ratio is worse than before by more than the margin; of aggregation more is better."""
    if "add_gb_per_s" in new:
        return new["ratio"] < old["ratio"] * (1 - MARGIN)
    return new["ratio"] > old["ratio"] * (1 + MARGIN)


def table(found: Mapping[str, Figures]) -> str:
    """The figures as Markdown."""
    lines = [
        "# How fast a simulation is\n",
        "`python benchmarks/speed --store`, or with `--only` one question at a time. Ratios of CPU seconds to those of",
        "a bare PyTorch loop with the same model, data, steps and optimiser in the same run, medians; of memory to",
        "memory; of aggregation to the bandwidth of numpy's own addition. `make bench` fails where one is worse than",
        f"here by more than {MARGIN:.0%}.\n",
        "| question | ratio | target | figures |",
        "|---|---|---|---|",
    ]
    for name, figures in found.items():
        beside = ", ".join(f"{key} {value:.3g}" for key, value in figures.items() if key not in ("ratio", "target"))
        lines.append(f"| {name} | {figures['ratio']:.3f} | {figures.get('target', 0.6):g} | {beside} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, compare with what is stored, and store it where that is wanted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true")
    parser.add_argument("--only", action="append", default=[])
    parser.add_argument("--store", action="store_true")
    arguments = parser.parse_args()
    stored: dict[str, Figures] = json.loads(STORED.read_text()) if STORED.is_file() else {}
    found: dict[str, Figures] = {}
    with TemporaryDirectory() as folder:
        data = Path(folder)
        subprocess.run([startup.MMFM, "demo-data", data / "demo"], check=True, stdout=subprocess.DEVNULL)
        os.environ["MMFM_DEMO"] = str(data / "demo")
        for name, (short, answer) in questions(data).items():
            if name in arguments.only or (not arguments.only and (short or arguments.full)):
                found[name] = answer()
                print(name, json.dumps(found[name]), flush=True)
    slower = [name for name in found if name in stored and worse(found[name], stored[name])]
    if arguments.store:
        stored |= found
        STORED.write_text(json.dumps(stored, indent=2) + "\n")
        STORED.with_suffix(".md").write_text(table(stored))
    sys.exit(f"slower than {STORED.name} by more than {MARGIN:.0%}: {', '.join(slower)}" if slower else 0)


if __name__ == "__main__":
    main()
