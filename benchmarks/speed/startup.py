"""From the start of the process to the end of the first round: `mmfm simulate` against the bare loop.

CPU seconds of all processes, as the clock of a shared machine tells little.
"""

import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory

from federations import document, documents, hospitals

TICKS = os.sysconf("SC_CLK_TCK")
HERE = Path(__file__).parent
LIBRARIES = "import mmfm_core.models._torchvision_ops, timm, transformers.models.bert.modeling_bert"
MMFM = Path(sys.executable).with_name("mmfm")


def first_round(data: Path, size: str, sites: int, per_round: int, repeats: int = 3) -> dict[str, float]:
    """CPU and wall seconds to the end of the first round, ours and the loop's, and the peak of the loop's memory.

    Of several runs the one with the median ratio: most of it is imports, which take half as long again by chance.
    """
    runs = [_first_round(data, size, sites, per_round) for _ in range(repeats)]
    return sorted(runs, key=lambda run: run["ratio"])[repeats // 2]


def _first_round(data: Path, size: str, sites: int, per_round: int) -> dict[str, float]:
    federation, files = document(size, 2, None if per_round == sites else per_round), hospitals(data, sites)
    begun = time.time()
    loop = [sys.executable, HERE / "floor.py", data, size, str(sites), str(per_round), "1"]
    floor = json.loads(subprocess.run(loop, check=True, capture_output=True, text=True).stdout)
    found = {"floor_cpu": floor["first_cpu"], "floor_wall": floor["first_ended"] - begun, "floor_mb": floor["mb"]}
    with TemporaryDirectory() as folder:
        found |= _until_the_first_round(
            documents(Path(folder), federation, files), Path(folder) / "run", "--no-baselines"
        )
    return found | {"ratio": found["ours_cpu"] / found["floor_cpu"], "target": 1.5}


def demo(document: Path, repeats: int = 3) -> dict[str, float]:
    """Seconds of the clock from `mmfm simulate` of the demonstration, baselines and all, to its first round's end."""
    runs = []
    for _ in range(repeats):
        with TemporaryDirectory() as folder:
            runs.append(_until_the_first_round(document, Path(folder) / "run"))
    found = sorted(runs, key=lambda run: run["ours_wall"])[repeats // 2]
    return {"ratio": found["ours_wall"], "cpu": found["ours_cpu"], "target": 5.0}


def _until_the_first_round(document: Path, run: Path, *options: str) -> dict[str, float]:
    command = [MMFM, "simulate", document, "--run", run, *options]
    begun = time.time()
    ours = subprocess.Popen(command, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        while not (run / "checkpoints" / "round-00001" / "state.json").exists():
            if ours.poll() is not None:
                raise SystemExit("mmfm simulate failed")
            time.sleep(0.02)
        return {"ours_cpu": _cpu(ours.pid), "ours_wall": time.time() - begun}
    finally:
        with suppress(ProcessLookupError):
            os.killpg(ours.pid, signal.SIGKILL)
        ours.wait()


def plan(document: Path, repeats: int = 3) -> dict[str, float]:
    """CPU seconds of `mmfm plan`, and of importing alone the libraries that the document's model is made of."""
    found = {
        name: statistics.median(cpu_of(command) for _ in range(repeats))
        for name, command in (("ratio", [MMFM, "plan", document]), ("imports_cpu", [sys.executable, "-c", LIBRARIES]))
    }
    return found | {"target": 3.0}


def cpu_of(command: list[str | Path]) -> float:
    """CPU seconds of a command and all that it starts."""
    before = os.times()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    after = os.times()
    return after.children_user + after.children_system - before.children_user - before.children_system


def _cpu(session: int) -> float:
    """CPU seconds of a session's living processes, and of the dead ones they have waited for."""
    return sum(ticks / TICKS for ticks in _ticks(session))


def _ticks(session: int) -> Iterator[int]:
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = entry.read_text().rpartition(")")[2].split()
            if int(fields[3]) == session:
                yield sum(map(int, fields[11:15]))
