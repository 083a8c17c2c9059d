"""`mmfm coordinator` with real processes on loopback, from nothing to a completed run; and what it refuses."""

import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from hospital import Coordinator, Hospital, free_ports
from tiny import prepare_run, tiny_federation, write_sites

from mmfm_core.config import Federation, Site
from mmfm_core.storage import read_tensors
from server.engines import in_process
from server.record import Run, read_lines


@pytest.fixture(scope="module")
def federation() -> Federation:
    """One round that trains, and one that only measures."""
    return tiny_federation(
        stages=[{"name": "train", "rounds": 1, "local_steps": 4, "batch_size": 8, "tasks": {"disease": {}}}],
        aggregation={"min_sites": 2, "quorum_wait": 120, "deadline": 120},
    )


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def coordinator(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Coordinator]:
    """A coordinator that is up."""
    made = Coordinator(tmp_path_factory.mktemp("consortium"))
    link, monitor = free_ports(2)
    made.mmfm("init", made.directory, "--name", "trial", "--address", f"127.0.0.1:{link}")
    settings = made.directory / "coordinator.yaml"
    settings.write_text(re.sub(r"monitor: .*", f'monitor: "127.0.0.1:{monitor}"', settings.read_text()))
    made.mmfm("up", "--detach")
    yield made
    made.mmfm("down")
    assert not made.processes()


@pytest.fixture(scope="module")
def hospitals(
    tmp_path_factory: pytest.TempPathFactory, sites: dict[str, Site], federation: Federation, coordinator: Coordinator
) -> Iterator[list[Hospital]]:
    """Two sites that are enrolled and run."""
    folder = tmp_path_factory.mktemp("sites")
    made = [Hospital(folder, site) for site in sites.values()]
    try:
        for each in made:
            each.approve(federation)
            coordinator.enrol(each)
            each.start()
        yield made
    finally:
        for each in made:
            each.kill()


@pytest.mark.slow
@pytest.mark.timeout(1200)  # a dozen processes: minutes where other tests want the cores too
def test_from_nothing_to_a_run_that_equals_the_simulation(
    coordinator: Coordinator,
    hospitals: list[Hospital],
    sites: dict[str, Site],
    federation: Federation,
    tmp_path: Path,
) -> None:
    document = tmp_path / "tiny.yaml"
    document.write_text(
        Run.open(prepare_run(tmp_path / "reference", federation, sites))
        .directory.joinpath("federation.yaml")
        .read_text()
    )
    told = coordinator.mmfm("run", document, seconds=900)
    assert "round 2/2" in told
    assert (coordinator.directory / "runs" / "tiny" / "report.html").is_file()
    in_process.simulate(tmp_path / "reference")
    expected = read_tensors(tmp_path / "reference" / "checkpoints" / "round-00002" / "shared.safetensors")
    got = read_tensors(coordinator.directory / "runs" / "tiny" / "checkpoints" / "round-00002" / "shared.safetensors")
    assert got.keys() == expected.keys()
    for name, tensor in got.items():
        np.testing.assert_allclose(tensor, expected[name], rtol=0, atol=1e-6, err_msg=name)
    assert not list(read_lines(coordinator.directory / "runs" / "tiny" / "events.jsonl"))
    status = coordinator.mmfm("status")
    assert re.search(r"north +online", status)
    assert re.search(r"south +online", status)
    assert re.search(r"tiny +completed +2/2", status)
    assert hospitals


def test_the_link_waits_for_its_database_longer_than_a_large_model_takes(tmp_path):
    """What connections are told, in a process of its own: Flower reads it when it is imported."""
    code = f"""
import sys, types
import server.consortium.superlink as link

def flower_superlink():
    from sqlalchemy import text
    from flwr.supercore.sql_mixin import SqlMixin

    class Database(SqlMixin):
        pass

    database = Database("{tmp_path / "link.db"}")
    database.initialize()
    with database.session() as session:
        print(session.execute(text("PRAGMA busy_timeout")).scalar())

sys.modules["flwr.superlink.cli"] = types.SimpleNamespace(flower_superlink=flower_superlink)
link.main()
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert int(ran.stdout.split()[-1]) == 300_000
