"""A model of 500 MB through the real link: how long a round takes, and what memory each program needs for it."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import numpy as np
from e2e.world import PACE, World, seconds_of_rounds, sites_of_round
from hospital import facts
from tiny import tiny_federation

from mmfm_core.config import Federation
from mmfm_core.storage import read_tensors

ROUNDS = 3
PARTICIPANTS = 2
PROGRAMS = ("supernode", "consortium.superlink", "serverapp", "courier", "agent-only")


def large(world: World) -> None:
    """500 MB of shared parameters to two sites and back, in the database that outlives the coordinator."""
    federation = document()
    for hospital in world.hospitals[:PARTICIPANTS]:  # the others refuse what they have not approved
        hospital.approve(federation)
    with peaks(world) as memory:
        run = world.coordinator.start_run(federation, federation.name)
        end = world.ended(run, 3600 * PACE)
    print(f"  {end['status']} {end.get('cause') or ''}; rounds of {np.round(seconds_of_rounds(run))} s")
    for program, megabytes in memory.items():
        print(f"  {program}: {megabytes} MB at most, all of that name together")
    database = sum(f.stat().st_size for f in (world.coordinator.directory / "state").rglob("*") if f.is_file())
    print(f"  the coordinator's state: {database / 1e6:.0f} MB on the disk")
    assert end["status"] == "completed", end
    shared = read_tensors(max(run.glob("checkpoints/round-*/shared.safetensors")))
    assert sum(tensor.nbytes for tensor in shared.values()) > 500e6
    took = sites_of_round(run)
    expected = {hospital.name for hospital in world.hospitals[:PARTICIPANTS]}
    assert all(took[number] == expected for number in range(1, ROUNDS + 1)), took
    assert facts(run)["round"] == ROUNDS + 1


def document() -> Federation:
    """One step a round of a text encoder with 126 million random parameters."""
    model = tiny_federation().model.model_dump(mode="json")
    model["dim"] = 1024
    for part in ("modalities", "encoders"):
        model[part] = {"note": model[part]["note"]}
    model["encoders"]["note"] |= {"depth": 10, "heads": 8}
    stage = {"name": "train", "rounds": ROUNDS, "local_steps": 1, "batch_size": 2, "tasks": {"disease": {}}}
    waits = {"min_sites": PARTICIPANTS, "quorum_wait": 300, "deadline": 1200 * PACE}
    return tiny_federation(name="large", model=model, stages=[stage], aggregation=waits)


@contextmanager
def peaks(world: World) -> Iterator[dict[str, int]]:
    """The most memory that programs of a name had at once, in MB, shared pages divided among those who share them."""
    most: dict[str, int] = {}
    ended = threading.Event()

    def watch() -> None:
        while not ended.wait(1):
            now: dict[str, int] = {}
            for pid in (*world.coordinator.processes(), *(p for each in world.hospitals for p in each.processes())):
                now[_name(pid)] = now.get(_name(pid), 0) + resident(pid)
            now["everything"] = sum(now.values())
            most.update({name: max(size, most.get(name, 0)) for name, size in now.items()})

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        yield most
    finally:
        ended.set()
        watching.join()


def resident(pid: int) -> int:
    """Memory of a process in MB, where it shares pages its part of them; 0 where it is gone."""
    with suppress(OSError):
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) // 1024
    return 0


def _name(pid: int) -> str:
    with suppress(OSError):
        line = Path(f"/proc/{pid}/cmdline").read_bytes().decode()
        return next((program for program in PROGRAMS if program in line), "others")
    return "others"
