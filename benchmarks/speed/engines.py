"""What a round costs as `mmfm simulate` runs it: by Flower's own simulation on Ray, and in two workers.

From the end of the first round to that of the last: seconds of the clock, and CPU seconds of all processes that the
command started, wherever they belong.
"""

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from federations import document, documents, hospitals
from floor import Floor
from startup import MMFM, TICKS

MARK = "MMFM_SPEED"


def against_ray(data: Path, sites: int, per_round: int, rounds: int) -> dict[str, float]:
    """CPU seconds of a round in one process over those on Ray with two actors, and both in all figures."""
    ours = a_round(data, "0.1 M", sites, per_round, rounds)
    rays = a_round(data, "0.1 M", sites, per_round, rounds, "--engine", "ray")
    figures = {f"{what}_{name}": value for what, of in (("ours", ours), ("ray", rays)) for name, value in of.items()}
    return figures | {"ratio": ours["cpu"] / rays["cpu"], "target": 1.0}


def two_workers(data: Path, sites: int, per_round: int, rounds: int) -> dict[str, float]:
    """Seconds of the clock of a round in two workers over those of the bare loop in one process."""
    floor = Floor(data, "1.2 M", sites, per_round)
    floor()
    begun = time.time()
    for _ in range(rounds - 1):
        floor()
    loop = (time.time() - begun) / (rounds - 1)
    ours = a_round(data, "1.2 M", sites, per_round, rounds, "--workers", "2")
    return {"floor_wall": loop, "ours_wall": ours["wall"], "ratio": ours["wall"] / loop, "target": 0.6}


def memory_of_two_workers(data: Path, sites: int, per_round: int, rounds: int) -> dict[str, float]:
    """MB of all processes over what the bare loop in two processes may take: its own, and 150."""
    hospitals(data, sites)
    command = [sys.executable, Path(__file__).with_name("pair.py"), data, "1.2 M", sites, per_round, rounds]
    told = subprocess.run([*map(str, command)], check=True, stdout=subprocess.PIPE, text=True).stdout
    pair: dict[str, float] = json.loads(told)
    ours = a_round(data, "1.2 M", sites, per_round, rounds, "--workers", "2")
    figures = {"pair_mb": pair["mb"], "ours_mb": ours["mb"], "pair_wall": pair["wall"], "ours_wall": ours["wall"]}
    return figures | {"ratio": ours["mb"] / (pair["mb"] + 150), "target": 1.0}


def a_round(data: Path, size: str, sites: int, per_round: int, rounds: int, *options: str) -> dict[str, float]:
    """Seconds of CPU and of the clock of one round, and MB of all processes after the last."""
    federation, files = document(size, rounds + 1, per_round), hospitals(data, sites)
    mark = f"{MARK}={uuid.uuid4()}"
    with TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        command = [MMFM, "simulate", documents(Path(folder), federation, files), "--no-baselines", "--run", run]
        environment = os.environ | {MARK: mark.partition("=")[2]}
        started = subprocess.Popen(
            [*command, *options], stdout=subprocess.DEVNULL, start_new_session=True, env=environment
        )
        try:
            seen = [_at(run, number, started, mark) for number in (1, rounds)]
        finally:
            for process in _marked(mark):
                with suppress(ProcessLookupError):
                    os.kill(int(process.name), signal.SIGKILL)
            started.wait()
    (first_time, first_cpu, _), (last_time, last_cpu, megabytes) = seen
    taken = rounds - 1
    return {"cpu": (last_cpu - first_cpu) / taken, "wall": (last_time - first_time) / taken, "mb": megabytes}


def _at(run: Path, number: int, started: "subprocess.Popen[bytes]", mark: str) -> tuple[float, float, float]:
    while not (run / "run.json").exists() or json.loads((run / "run.json").read_text()).get("round", 0) < number:
        if started.poll() is not None:
            raise SystemExit("mmfm simulate failed")
        time.sleep(0.01)
    now = time.time()
    processes = list(_marked(mark))
    return now, sum(map(_cpu, processes)), sum(map(resident_of, processes))


def _marked(mark: str) -> Iterator[Path]:
    for process in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark.encode() in (process / "environ").read_bytes().split(b"\0"):
                yield process


def _cpu(process: Path) -> float:
    """CPU seconds of a process, and of the dead ones it has waited for."""
    with suppress(OSError):
        return sum(map(int, (process / "stat").read_text().rpartition(")")[2].split()[11:15])) / TICKS
    return 0.0


def resident_of(process: Path) -> float:
    """MB, shared pages divided among those who share them."""
    with suppress(OSError):
        lines = (process / "smaps_rollup").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("Pss:")) / 1024
    return 0.0
