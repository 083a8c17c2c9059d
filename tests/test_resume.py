"""What no kill, interruption or full disk can take from a run: `--resume` gives the same bits."""

import os
import re
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from command_line import ROUNDS, Documents, hospitals, longer, mmfm, nobody_left, one_thread, started, until

from mmfm_core.config import load_federation, load_sites
from mmfm_core.storage import Tensors, read_tensors
from server import baselines
from server.comparison import compare
from server.engines import in_process, pooled
from server.record import Run, read_lines
from server.report import write_report
from server.simulation import prepare


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return hospitals(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> Path:
    """An undisturbed run with a local fusion, longer than the others."""
    folder = tmp_path_factory.mktemp("reference")
    long = documents.amend(folder, longer)
    federation, sites = load_federation(long.federation), load_sites(documents.sites)
    prepare(folder / "run", federation, sites, expected_sites=len(sites))
    with one_thread():
        in_process.simulate(folder / "run")
    return folder / "run"


def assert_same_outcome(run: Path, reference: Path) -> None:
    """Bit for bit the same shared state, site states, predictions and figures; only times may differ."""
    for pattern in ("checkpoints/*/*.safetensors", "sites/*/state/*/*.safetensors"):
        names = {path.relative_to(reference) for path in reference.glob(pattern)}
        assert {path.relative_to(run) for path in run.glob(pattern)} == names
        assert names
        for name in names:
            assert_same_bits(read_tensors(run / name), read_tensors(reference / name))
    predictions = list(reference.glob("sites/*/predictions/*/*.csv"))
    assert predictions
    for path in predictions:
        assert (run / path.relative_to(reference)).read_text() == path.read_text()
    assert figures(run) == figures(reference)
    assert Run.open(run).facts["status"] == "completed"
    assert not list(run.rglob(".partial*"))


def assert_same_bits(some: Tensors, others: Tensors) -> None:
    assert some.keys() == others.keys()
    assert all(some[name].tobytes() == others[name].tobytes() for name in some)


def figures(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_lines(run / "metrics.jsonl") if line["metric"] != "seconds"]


def round_began(run: Path, number: int) -> bool:
    """Whether the first site has answered in a round."""
    with suppress(OSError):
        return f'{{"round": {number}, ' in (run / "metrics.jsonl").read_text()
    return False


KILLS: dict[str, Callable[[Path], bool]] = {
    "while it prepares": lambda run: (run / "run.json").exists(),
    "in a round": lambda run: round_began(run, ROUNDS - 1),
    "after a checkpoint": lambda run: (run / "checkpoints" / "round-00002" / "state.json").exists(),
    "while sites adapt": lambda run: round_began(run, ROUNDS + 1),
}


@pytest.mark.slow
@pytest.mark.parametrize("moments", [("while it prepares", "in a round"), ("after a checkpoint", "while sites adapt")])
def test_killed_again_and_again_a_run_goes_on_as_if_nothing_had_happened(
    moments: tuple[str, str], documents: Documents, reference: Path, tmp_path: Path
) -> None:
    long = documents.amend(tmp_path, longer)
    words = ["simulate", long.federation, "--sites", documents.sites, "--no-baselines", "--run", "run"]
    for moment in moments:
        with started(tmp_path, *words) as running:
            until(lambda moment=moment: KILLS[moment](tmp_path / "run"), running)
            running.kill(signal.SIGKILL)
            assert running.wait() == -signal.SIGKILL
        if "--resume" not in words:
            words.append("--resume")
    resumed = mmfm(tmp_path, *words)
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_outcome(tmp_path / "run", reference)


@pytest.mark.slow
def test_workers_of_a_killed_command_end_by_themselves(documents: Documents, reference: Path, tmp_path: Path) -> None:
    long = documents.amend(tmp_path, longer)
    words = ["simulate", long.federation, "--sites", documents.sites, "--run", "run"]
    with started(tmp_path, *words) as running:
        until(lambda: round_began(tmp_path / "run", 2), running)
        assert len(running.members()) >= 3
        running.kill(signal.SIGSTOP)  # so that a fast machine does not finish it before the second command asks
        for way in ("--resume", "--replace"):
            second = mmfm(tmp_path / "second", *words[:-1], tmp_path / "run", way)
            assert second.returncode == 1
            assert re.fullmatch(r"error: .*another process is working on this run; wait for .*\n", second.stderr)
        running.process.kill()
        running.kill(signal.SIGCONT)
        assert running.wait() == -signal.SIGKILL
        assert nobody_left(running)
    resumed = mmfm(tmp_path, *words, "--no-baselines", "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_outcome(tmp_path / "run", reference)


@pytest.mark.slow
def test_workers_side_by_side_change_no_bit_and_one_that_is_killed_ends_the_run_cleanly(
    documents: Documents, reference: Path, tmp_path: Path
) -> None:
    long = documents.amend(tmp_path, longer)
    words = ["simulate", long.federation, "--sites", documents.sites, "--no-baselines", "--run", "run"]
    with started(tmp_path, *words, "--workers", "2") as running:
        until(lambda: round_began(tmp_path / "run", 2), running)
        *others, last_born = sorted(running.members())
        assert len(others) >= 3  # the command, the process of the run, and the other worker
        os.kill(last_born, signal.SIGKILL)
        assert running.wait() == 1
        assert nobody_left(running)
    assert re.fullmatch(r"error: a process that worked for this run ended early: .*\n", running.err.read_text())
    assert Run.open(tmp_path / "run").facts["status"] == "failed"
    resumed = mmfm(tmp_path, *words, "--workers", "2", "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_outcome(tmp_path / "run", reference)


@pytest.fixture(scope="module")
def compared(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> Path:
    """An undisturbed run with its baselines and their comparison, without the command."""
    federation, sites = load_federation(documents.federation), load_sites(documents.sites)
    directory = tmp_path_factory.mktemp("compared") / "run"
    with one_thread():
        for folder, document, simulate in (
            (directory, federation, in_process.simulate),
            (directory / "baselines" / "local-only", baselines.local_only(federation), in_process.simulate),
            (directory / "baselines" / "pooled", baselines.pooled(federation, len(sites)), pooled.simulate),
        ):
            prepare(folder, document, sites)
            simulate(folder)
    compare(directory)
    return directory


@pytest.mark.slow
def test_ctrl_c_stops_everything_and_loses_nothing(documents: Documents, compared: Path, tmp_path: Path) -> None:
    words = ["simulate", documents.federation]
    with started(tmp_path, *words) as running:
        until(lambda: round_began(tmp_path / "runs/tiny", 1), running)
        for _ in range(3):  # who presses it once will press it again
            running.kill(signal.SIGINT)
            time.sleep(0.1)
        assert running.wait() == 130
        assert nobody_left(running)
    assert running.err.read_text() == ""
    *_, last = running.out.read_text().splitlines()
    assert last == "Interrupted; nothing is lost. Go on with the same command and --resume."
    run = tmp_path / "runs/tiny"
    assert Run.open(run).facts["status"] == "interrupted"
    assert "stopped by Ctrl-C" in write_report(run).read_text()
    resumed = mmfm(tmp_path, *words, "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_outcome(run, compared)
    for baseline in ("baselines/local-only", "baselines/pooled"):
        assert figures(run / baseline) == figures(compared / baseline)
    assert (run / "comparison.json").read_text() == (compared / "comparison.json").read_text()


@pytest.mark.slow
def test_ctrl_c_is_answered_by_the_command_alone_while_its_workers_start(documents: Documents, tmp_path: Path) -> None:
    with started(tmp_path, "simulate", documents.federation) as running:
        until(lambda: len(running.members()) > 2, running)  # Python's own tracker of resources is one of them
        running.kill(signal.SIGINT)
        assert running.wait() == 130
        assert nobody_left(running)
    assert running.err.read_text() == ""
    assert "Interrupted; nothing is lost." in running.out.read_text()


@pytest.mark.slow
def test_a_full_disk_costs_only_the_round_it_came_in(documents: Documents, reference: Path, tmp_path: Path) -> None:
    long = documents.amend(tmp_path, longer)
    words = ["simulate", long.federation, "--sites", documents.sites, "--no-baselines", "--run", "run"]
    first = tmp_path / "run" / "checkpoints" / "round-00001" / "shared.safetensors"
    with started(tmp_path, *words) as running:
        until(lambda: first.with_name("state.json").exists(), running)
        for member in running.members():
            resource.prlimit(member, resource.RLIMIT_FSIZE, (first.stat().st_size - 1, resource.RLIM_INFINITY))
        assert running.wait() == 1
    said = running.err.read_text()
    assert re.fullmatch(r"error: .*shared\.safetensors: cannot be written \(File too large\); make room .*\n", said)
    run = Run.open(tmp_path / "run")
    assert run.facts["status"] == "failed"
    assert run.checkpoint() is not None
    assert not list(run.directory.rglob(".partial*"))
    resumed = mmfm(tmp_path, *words, "--resume")
    assert (resumed.returncode, resumed.stderr) == (0, "")
    assert_same_outcome(run.directory, reference)
