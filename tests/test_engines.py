"""One federation on three engines: the same figures, failures that surface, and no process left behind."""

import importlib.util
import json
import math
import signal
import subprocess
import sys
import time
import zipfile
from io import BytesIO
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from flwr.cli.build import build_fab_from_disk
from flwr.common.config import parse_config_args
from tiny import prepare_run, tiny_federation, write_sites

from mmfm_core.config import Site
from mmfm_core.errors import MmfmError
from mmfm_core.storage import Tensors, read_tensors
from server import bundle, programs
from server.engines import in_process, ray, superlink
from server.record import Run, read_lines

OTHER_ENGINES = pytest.mark.parametrize("engine", [ray, superlink], ids=["ray", "superlink"])

# Sums may be taken in another order where another process has other threads; on one thread it was none, bit for bit.
TOLERANCE = 1e-6


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Site]) -> Path:
    run = prepare_run(tmp_path_factory.mktemp("reference") / "run", tiny_federation(), sites)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    in_process.simulate(run)
    torch.set_num_threads(threads)
    return run


@pytest.mark.slow
@OTHER_ENGINES
def test_every_engine_gives_the_same_result(
    engine: ModuleType, sites: dict[str, Site], reference: Path, tmp_path: Path
) -> None:
    run = prepare_run(tmp_path / 'a run\'s "folder"', tiny_federation(), sites)
    engine.simulate(run)
    assert_same(tensors_of(run, "checkpoints/round-*/shared"), tensors_of(reference, "checkpoints/round-*/shared"))
    for site in sites:
        adapted = f"sites/{site}/state/*/round-*"
        assert_same(tensors_of(run, adapted), tensors_of(reference, adapted))
    assert figures(run) == pytest.approx(figures(reference), rel=0, abs=TOLERANCE, nan_ok=True)
    assert Run.open(run).facts["status"] == "completed"
    assert not list(read_lines(run / "events.jsonl"))
    assert not processes_of(run)


@pytest.mark.slow
@OTHER_ENGINES
def test_an_engine_that_is_stopped_leaves_no_process(
    engine: ModuleType, sites: dict[str, Site], tmp_path: Path
) -> None:
    run = prepare_run(tmp_path / "run", tiny_federation(), sites)
    code = f"from pathlib import Path; import {engine.__name__} as engine; engine.simulate(Path({str(run)!r}))"
    with subprocess.Popen([sys.executable, "-c", code]) as simulation:
        end = time.monotonic() + 120
        while Run.open(run).facts["status"] != "running" and time.monotonic() < end and simulation.poll() is None:
            time.sleep(0.1)
        assert len(processes_of(run)) >= 3
        simulation.send_signal(signal.SIGTERM)
    assert simulation.returncode == 128 + signal.SIGTERM
    assert not processes_of(run)


@pytest.mark.slow
def test_a_failure_in_rays_simulation_surfaces(sites: dict[str, Site], tmp_path: Path) -> None:
    run = prepare_run(tmp_path / "run", tiny_federation(), sites)
    (run / "federation.yaml").unlink()
    with pytest.raises(MmfmError, match=r"federation\.yaml: cannot be read"):
        ray.simulate(run)
    assert Run.open(run).facts["status"] == "failed"
    assert not processes_of(run)


def test_ray_is_asked_for_where_it_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda _name: None)
    with pytest.raises(MmfmError, match=r"install mmfm\[ray\]"):
        ray.simulate(tmp_path)


def test_what_flower_sends_to_sites_holds_no_code(tmp_path: Path, sites: dict[str, Site]) -> None:
    run = Run.open(prepare_run(tmp_path / "run", tiny_federation(), sites))
    bundle.write_bundle(tmp_path / "bundle", run)
    built = build_fab_from_disk(tmp_path / "bundle")
    with zipfile.ZipFile(BytesIO(built)) as files:
        assert sorted(files.namelist()) == [".info/CONTENT", "federation.yaml", "pyproject.toml"]
        assert files.read("federation.yaml") == (run.directory / "federation.yaml").read_bytes()


def test_any_path_reaches_flower_whole(tmp_path: Path) -> None:
    values = {"site-directory": '/tmp/it\'s "ours"/späť \\ = \t x'}  # noqa: S108 (only a text)
    bundle.write_values(tmp_path / "node.toml", values)
    assert parse_config_args([str(tmp_path / "node.toml")]) == values


@pytest.mark.parametrize(
    ("facts", "sentence"),
    [({"status": "failed", "cause": "the reason"}, "the reason"), ({"status": "running"}, "log says why")],
)
def test_an_unfinished_run_is_an_error(
    facts: dict[str, str], sentence: str, sites: dict[str, Site], tmp_path: Path
) -> None:
    run = Run.open(prepare_run(tmp_path / "run", tiny_federation(), sites))
    run.update(**facts)
    with pytest.raises(MmfmError, match=sentence):
        programs.check_completed(run, tmp_path / "run.log")


def test_an_earlier_outcome_is_not_taken_for_this_one(sites: dict[str, Site], tmp_path: Path) -> None:
    run = Run.open(prepare_run(tmp_path / "run", tiny_federation(), sites))
    run.update(status="failed", cause="the reason")
    programs.begin(run)
    assert not programs.over(run)


def test_a_stubborn_program_and_its_children_end_with_the_block(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "GRACE_SECONDS", 0.5)
    code = """
import signal, subprocess, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
if len(sys.argv) == 1:
    subprocess.Popen([sys.executable, __file__, "child"])
time.sleep(100)
"""
    (tmp_path / "stubborn.py").write_text(code)
    with pytest.raises(KeyboardInterrupt), programs.programs(tmp_path / "logs") as started:
        started.start("stubborn", [sys.executable, tmp_path / "stubborn.py"], home=tmp_path)
        while len(processes_of(tmp_path)) < 2:
            time.sleep(0.05)
        raise KeyboardInterrupt
    assert not processes_of(tmp_path)


def test_a_program_that_ends_early_is_named_with_its_log(tmp_path: Path) -> None:
    with programs.programs(tmp_path) as started:
        failing = started.start("failing", [sys.executable, "-c", "raise SystemExit('no luck')"], home=tmp_path)
        with pytest.raises(MmfmError, match=rf"failing ended early; {tmp_path / 'failing.log'} says why"):
            programs.wait_for(lambda: False, [failing])
    assert failing.log.read_text() == "no luck\n"


def test_programs_call_nobody(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("FLWR_TELEMETRY_ENABLED", "RAY_USAGE_STATS_ENABLED"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("https_proxy", "http://proxy.invalid")
    # Asked of Flower and Ray themselves: a new version may listen to another name.
    code = """
import json, os
from flwr.supercore import telemetry, update_check
from ray._common.usage import usage_lib
telemetry.urllib.request.urlopen = None
update_checks = []
update_check._start_flwr_update_check_refresh_thread = update_checks.append
update_check.warn_if_flwr_update_available("test")
print(json.dumps({
    "flower": telemetry.create_event(telemetry.EventType.PING, None),
    "update checks": update_checks,
    "ray": usage_lib.usage_stats_enabled(),
    "proxies": [name for name in os.environ if name.lower().endswith("_proxy")],
}))
"""
    with programs.programs(tmp_path) as started:
        asked = started.start("asked", [sys.executable, "-c", code], home=tmp_path)
        programs.wait_for(lambda: asked.ended, [])
    quiet = {"flower": "disabled", "update checks": [], "ray": False, "proxies": []}
    assert json.loads(asked.log.read_text()) == quiet


def tensors_of(run: Path, pattern: str) -> Tensors:
    """The tensors of the last of the matching files."""
    return read_tensors(max(run.glob(f"{pattern}.safetensors")))


def assert_same(some: Tensors, others: Tensors) -> None:
    """The same names, and values within the tolerance."""
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        np.testing.assert_allclose(tensor, others[name], rtol=0, atol=TOLERANCE, err_msg=name)


def figures(run: Path) -> dict[str, float]:
    """All figures but times, by what they measure; NaN where one is undefined."""
    found: dict[str, float] = {}
    for line in read_lines(run / "metrics.jsonl"):
        if line["metric"] != "seconds":
            values = {name: line.pop(name, None) for name in ("value", "low", "high")}
            what = json.dumps(line, sort_keys=True)
            found |= {f"{what} {name}": math.nan if value is None else value for name, value in values.items()}
    return found


def processes_of(folder: Path) -> list[int]:
    """The living processes that an engine started for a run: all of them keep Flower's files in its directory."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_bytes().split(b"\0")
        except OSError:  # it ended meanwhile
            continue
        if any(variable.startswith(f"FLWR_HOME={folder}".encode()) for variable in variables):
            found.append(int(process.name))
    return found
