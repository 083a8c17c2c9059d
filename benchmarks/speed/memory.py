"""Resident memory of a simulation: of many sites against few, and over many rounds.

    python benchmarks/speed/memory.py HOSPITALS SITES PER_ROUND ROUNDS STUDIES

Prints a JSON object: MB (Linux's Pss) after the first round, after the tenth part of the rounds, and after the last.
"""

import json
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from federations import document, hospitals, prepared
from rounds import at_each_round

from server.engines import in_process


def resident() -> float:
    """MB of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024


def main(folder: str, sites: int, per_round: int, rounds: int, studies: int) -> None:
    """A process of its own."""
    seen: list[float] = []
    federation = document("0.1 M", rounds, per_round if per_round < sites else None)
    files = hospitals(Path(folder), sites, studies)
    with TemporaryDirectory() as run, at_each_round(lambda _: seen.append(resident())):
        in_process.simulate(prepared(Path(run) / "run", federation, files))
    trained = seen[:rounds]
    print(json.dumps({"first": trained[0], "tenth": trained[max(len(trained) // 10 - 1, 0)], "last": trained[-1]}))


if __name__ == "__main__":
    main(sys.argv[1], *map(int, sys.argv[2:]))
