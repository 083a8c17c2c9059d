"""What a site must keep, whatever happens to it: its ledger, its head, its record of what left."""

import random
import shutil
import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from e2e.world import AGENT, DEADLINE, LONG, PACE, SITES, World, events, sites_of_round
from hospital import BIN, Hospital, facts, wait
from tiny import private_federation

from client.private import LEDGER
from mmfm_core.config import Federation
from mmfm_core.config.loading import sha256
from mmfm_core.privacy.accounting import composed, schedule_of
from mmfm_core.privacy.ledger import Entry, Ledger, charged
from mmfm_core.storage import digest, read_tensors

STEPS = 60  # of some milliseconds each: long enough to be killed within


def private_document(name: str, rounds: int, epsilon: float = 3) -> Federation:
    """A private federation whose heads stay at the sites."""
    federation = private_federation(
        {"epsilon": epsilon},
        name=name,
        seed=sum(name.encode()),
        parameters={"local": ["heads.*"]},
        aggregation={"min_sites": 2, "quorum_wait": 120, "deadline": DEADLINE},
    )
    (stage,) = [stage for stage in federation.stages if stage.federated]
    stage = stage.model_copy(update={"rounds": rounds, "local_steps": STEPS})
    return Federation.model_validate(federation.model_copy(update={"stages": (stage,)}).model_dump(mode="json"))


def lines(hospital: Hospital) -> list[Entry]:
    """A site's ledger, whose chain must be whole."""
    return Ledger(hospital.folder / LEDGER).entries()


def charged_once(hospital: Hospital, federation: Federation, took: dict[int, set[str]]) -> None:
    """No round was charged twice, every round that counted was charged, and all of it is within the document's word."""
    trained = sum(stage.rounds for stage in federation.stages)
    answered = {number for number, names in took.items() if hospital.name in names and number <= trained}
    own = [entry for entry in lines(hospital) if entry.document == sha256(federation)]
    for kind in ("reserved", "released"):
        rounds = [entry.round for entry in own if entry.kind == kind]
        assert len(rounds) == len(set(rounds)), (hospital.name, own)
    standing = charged(own).values()
    assert {entry.round for entry in standing if entry.kind == "released"} >= answered, (hospital.name, own)
    assert all(entry.steps == STEPS for entry in standing)
    assert federation.privacy
    spent = composed([entry.charge for entry in standing], federation.privacy.delta)
    assert spent <= composed([schedule_of(federation)], federation.privacy.delta) <= federation.privacy.epsilon
    print(f"  {hospital.name}: {len(standing)} rounds charged once each, ε {spent:.2f}")


def egress_is_whole(hospital: Hospital) -> None:
    """The site's record of what left verifies."""
    hospital.mmfm("egress", "verify")


def private_coordinator_killed(world: World) -> None:
    """The coordinator killed -9 while sites compute and answer private rounds; no ledger is charged twice."""
    federation = private_document("private", 5)
    run = world.begin(federation)
    chance = random.Random(3)  # noqa: S311
    for number in range(4):
        wait(lambda number=number: world.round_reached(run, number) and _works(world, federation, number + 1), LONG)
        time.sleep(chance.uniform(0, 4))
        world.coordinator.kill()
        at = [max((entry.round for entry in lines(hospital)), default=0) for hospital in world.hospitals]
        print(f"  killed after round {facts(run).get('round', 0)}; the sites had charged rounds {at}", flush=True)
        world.coordinator.mmfm("up", "--detach")
        wait(lambda: facts(run)["status"] in ("failed", "completed"), 180 * PACE)
        if facts(run)["status"] == "completed":
            break
        world.coordinator.mmfm("resume", run, "--no-follow")
    world.completed(run)
    took = sites_of_round(run)
    for hospital in world.hospitals:
        charged_once(hospital, federation, took)
        egress_is_whole(hospital)


def agent_killed(world: World) -> None:
    """An agent killed -9 mid-step of a private round, and then its socket gone for a minute."""
    victim = world.hospitals[0]
    with _in_two_parts(victim):
        federation = private_document("agent", 6)
        run = world.begin(federation)
        wait(lambda: world.round_reached(run, 1) and _works(world, federation, 2), LONG)
        kept = _heads(victim)
        victim.kill(words=AGENT)
        cut_off = _charge(victim, federation, 2)
        assert cut_off and cut_off.kind == "reserved", "it was not killed within the round"
        wait(lambda: any("ended while it worked" in text for text in events(run, victim.name)), DEADLINE, "not told")
        assert _heads(victim) == kept, "its heads were changed"
        time.sleep(60)
        _start_agent(victim)
        world.completed(run)
    took = sites_of_round(run)
    told = sorted(set(events(run, victim.name)))
    absent = [number for number, names in took.items() if victim.name not in names]
    print(f"  {victim.name} was absent in rounds {absent}; told: {' | '.join(text[:90] for text in told)}")
    assert 2 in absent and victim.name in took[6]
    assert any("does not answer at its socket" in text for text in told), told
    assert all(set(SITES) - {victim.name} <= names for names in took.values())
    for hospital in world.hospitals:
        charged_once(hospital, federation, took)
        egress_is_whole(hospital)


def site_disk_full(world: World) -> None:
    """A site's disk is full for some rounds: it says so, nothing of it is corrupt, and it goes on with space."""
    victim = world.hospitals[1]
    with _small_disk(victim) as filler:
        federation = private_document("site-disk", 6)
        run = world.begin(federation)
        wait(lambda: world.round_reached(run, 1), LONG)
        _fill(filler)
        wait(lambda: world.round_reached(run, 3), LONG)
        filler.unlink()
        world.completed(run)
        took = sites_of_round(run)
        told = sorted({text for text in events(run, victim.name) if "left out" in text})
        absent = [number for number, names in took.items() if victim.name not in names]
        print(f"  {victim.name} was absent in rounds {absent}; told: {' | '.join(text[:110] for text in told)}")
        assert absent and victim.name in took[6]
        assert any("cannot write down what leaves" in text for text in told), told
        assert "disk is full); make room" in victim.log()
        assert all(set(SITES) - {victim.name} <= names for names in took.values())
        charged_once(victim, federation, took)
        egress_is_whole(victim)


def _charge(hospital: Hospital, federation: Federation, number: int) -> Entry | None:
    """What a hospital charged for a round."""
    of_round = (each for each in charged(lines(hospital)).values() if each.round == number)
    return next((each for each in of_round if each.document == sha256(federation)), None)


def _works(world: World, federation: Federation, number: int) -> bool:
    """Whether the first site has charged a round and not answered it."""
    entry = _charge(world.hospitals[0], federation, number)
    return entry is not None and (entry.kind == "reserved" or number == 1)


def _heads(hospital: Hospital) -> dict[str, str]:
    return {path.name: digest(read_tensors(path)) for path in hospital.folder.glob("state/*/round-*.safetensors")}


@contextmanager
def _in_two_parts(hospital: Hospital) -> Iterator[None]:
    """Agent and relay on their own, as the units run them; afterwards as before."""
    hospital.kill()
    hospital.run("relay", [BIN / "mmfm", "site", "run", "--relay-only"])
    _start_agent(hospital)
    wait(lambda: "SuperNode ID" in hospital.log("relay"), 240 * PACE, "the relay does not connect")
    try:
        yield
    finally:
        hospital.kill()
        hospital.start()


def _start_agent(hospital: Hospital) -> None:
    hospital.run("agent", [BIN / "mmfm", "site", "run", "--agent-only"])


@contextmanager
def _small_disk(hospital: Hospital) -> Iterator[Path]:
    """The site's directory on a disk of its own, but for its log; a file there that may be made large."""
    hospital.kill()
    aside, log = hospital.folder.with_name(f"{hospital.name}-aside"), hospital.folder.with_name(f"{hospital.name}.log")
    shutil.copytree(hospital.folder, aside, ignore=shutil.ignore_patterns("*.sock", "*.log"))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m,mode=700", "tmpfs", hospital.folder], check=True)
    try:
        shutil.copytree(aside, hospital.folder, dirs_exist_ok=True)
        (hospital.folder / "run.log").symlink_to(log)
        hospital.start()
        yield hospital.folder / ".filler"
    finally:
        hospital.kill(signal.SIGKILL)
        shutil.rmtree(aside)
        shutil.copytree(hospital.folder, aside, ignore=shutil.ignore_patterns("*.sock", "*.log", ".filler"))
        subprocess.run(["umount", "-l", hospital.folder], check=True)
        shutil.copytree(aside, hospital.folder, dirs_exist_ok=True)
        hospital.start()


def _fill(path: Path) -> None:
    with suppress(OSError), path.open("wb", buffering=0) as filler:
        while True:
            filler.write(bytes(4096))
