"""What a federation lives through: a coordinator and four sites in network namespaces, and one fault after the other.

`make e2e`, as root; `python tests/e2e/faults.py NAME ...` for some of the scenarios. With `--or-skip` it does not fail
where there can be no network namespaces, and says why. Each prints what it saw, and fails where something does not
hold. Every scenario is a run of its own, of a document of its own.
"""

import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from unittest.mock import patch

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
from e2e.keeping import agent_killed, private_coordinator_killed, site_disk_full
from e2e.large import large, resident
from e2e.network import COORDINATOR, Network, obstacle
from e2e.world import AGENT, DEADLINE, LONG, PACE, SITES, World, document, events, seconds_of_rounds, sites_of_round
from hospital import BIN, Coordinator, Hospital, facts, wait
from tiny import write_sites

from server.consortium import certificates
from server.record import read_lines

PORT = 8443


def plain(world: World) -> None:
    """From init to the first round; what a round costs beyond training."""
    run = world.run("plain", rounds=6)
    wait(lambda: world.round_reached(run, 1), LONG)
    print(f"  from init to the first completed round: {time.monotonic() - world.began:.0f} s")
    world.completed(run)
    training: dict[int, float] = {}
    for line in read_lines(run / "metrics.jsonl"):
        if line["metric"] == "seconds" and line["site"] != "federation":
            training[line["round"]] = max(training.get(line["round"], 0), line["value"])
    overhead = [each - training[number] for number, each in enumerate(seconds_of_rounds(run), 1)]
    load = os.getloadavg()[0]
    print(f"  overhead per round: mean {np.mean(overhead):.1f} s, each {np.round(overhead, 1)} (load {load:.1f})")
    assert all(names == set(SITES) for names in sites_of_round(run).values())
    world.equals_simulation(run, "plain", 6)


def site_killed(world: World) -> None:
    """A site killed -9 mid-round, and back after 5 s and after 60 s."""
    for pause in (5, 60):
        name = f"killed-{pause}"
        run, victim = world.run(name, rounds=4), world.hospitals[0]
        wait(lambda run=run: world.round_reached(run, 1), LONG)
        victim.kill()
        time.sleep(pause)
        victim.start()
        world.completed(run)
        took = sites_of_round(run)
        print(f"  back after {pause} s; took part in rounds {[n for n, names in took.items() if victim.name in names]}")
        assert all(set(SITES) - {victim.name} <= names for names in took.values())
        assert max(seconds_of_rounds(run)) < DEADLINE + 30
        world.everyone_is_online()
        after = world.run(f"{name}-after", rounds=2)
        world.completed(after)
        assert victim.name in sites_of_round(after)[2], events(after, victim.name)


def coordinator_killed(world: World) -> None:
    """The coordinator killed -9 at moments spread over the rounds; the end is that of an undisturbed run."""
    run = world.run("coordinator", rounds=5)
    chance = random.Random(1)  # noqa: S311
    for number in range(1, 5):
        wait(lambda number=number: world.round_reached(run, number), LONG)
        time.sleep(chance.uniform(0, 6))
        at = facts(run).get("round", 0)
        world.coordinator.kill()
        world.coordinator.mmfm("up", "--detach")
        took = wait(lambda: facts(run)["status"] in ("failed", "completed"), 180 * PACE)
        print(f"  killed after round {at}; {facts(run)['status']} within {took:.0f} s: {facts(run)['cause']}")
        if facts(run)["status"] == "completed":
            break
        world.coordinator.mmfm("resume", run, "--no-follow")
    world.completed(run)
    sites_of_round(run)
    world.equals_simulation(run, "coordinator", 5)


def serverapp_killed(world: World) -> None:
    """Only the run's own process is killed: it is marked failed with a cause, and can be resumed."""
    run = world.run("serverapp", rounds=3)
    wait(lambda: world.round_reached(run, 1), LONG)
    for pid in world.coordinator.processes():
        with suppress(OSError):
            if b"flwr-serverapp" in Path(f"/proc/{pid}/cmdline").read_bytes():
                os.kill(pid, signal.SIGKILL)
    took = wait(lambda: facts(run)["status"] == "failed", 180)
    print(f"  failed within {took:.0f} s: {facts(run)['cause']}")
    world.coordinator.mmfm("resume", run, "--no-follow")
    world.completed(run)
    world.equals_simulation(run, "serverapp", 3)


def network_cut(world: World) -> None:
    """The network of one site is cut for two minutes, then flaps for thirty seconds."""
    run, victim = world.run("cut", rounds=8), world.hospitals[1]
    wait(lambda: world.round_reached(run, 1), LONG)
    world.network.cut(1)
    time.sleep(120)
    world.network.join(1)
    for _ in range(5):
        time.sleep(3)
        world.network.cut(1)
        time.sleep(3)
        world.network.join(1)
    world.completed(run)
    took = sites_of_round(run)
    print(f"  {victim.name} took part in rounds {[number for number, names in took.items() if victim.name in names]}")
    assert all(set(SITES) - {victim.name} <= names for names in took.values())
    world.everyone_is_online()
    after = world.run("cut-after", rounds=2)
    world.completed(after)
    assert victim.name in sites_of_round(after)[2]


def bad_line(world: World) -> None:
    """200 ms of delay each way, and connections that break at one chunk in a hundred."""
    victim = world.hospitals[2]
    with world.network.bad_line(2, PORT, delay=0.2, loss=0.01) as address:
        victim.kill()
        victim.dial(address)
        victim.start()
        world.everyone_is_online()
        run = world.run("line", rounds=4)
        world.completed(run)
        took = sites_of_round(run)
        print(f"  {victim.name} took part in {sum(victim.name in names for names in took.values())} of 4 rounds")
        assert all(set(SITES) - {victim.name} <= names for names in took.values())
        victim.kill()
    victim.dial(f"{COORDINATOR}:{PORT}")
    victim.start()


def straggler(world: World) -> None:
    """A site's agent stands still for three rounds, then goes on."""
    run, slow = world.run("straggler", rounds=7, deadline=25.0 * PACE), world.hospitals[3]
    wait(lambda: world.round_reached(run, 1), LONG)
    slow.kill(signal.SIGSTOP, AGENT)
    wait(lambda: world.round_reached(run, 4), LONG)
    slow.kill(signal.SIGCONT, AGENT)
    world.completed(run)
    took = sites_of_round(run)
    absent = [number for number, names in took.items() if slow.name not in names]
    print(f"  {slow.name} was absent in rounds {absent}; seconds {np.round(seconds_of_rounds(run))}")
    assert len(absent) >= 2
    assert slow.name in took[7], "it was not accepted again"
    assert all(set(SITES) - {slow.name} <= names for names in took.values())
    # The relay notices that nobody answers at the socket, and says so before the deadline.
    assert sum("answer" in text for text in events(run, slow.name)) == len(absent)
    assert max(seconds_of_rounds(run)) < 25 * PACE + 20


def refused(world: World) -> None:
    """Unknown key, revoked site, wrong CA, expired certificate, plain text, control endpoints, unapproved document."""
    address, trusted = f"{COORDINATOR}:{PORT}", world.hospitals[0].folder / "relay" / "ca.crt"
    stranger = Hospital(
        world.folder / "strangers",
        world.sites["north"].model_copy(update={"name": "stranger"}),
        world.network.inside(0),
    )
    other = world.folder / "other"
    certificates.make_authority("other", other / "ca.key", other / "ca.crt")
    for what, trust in (
        ("unknown key", ["--root-certificates", trusted]),
        ("wrong CA", ["--root-certificates", other / "ca.crt"]),
        ("plain text", ["--insecure"]),
    ):
        key = ["--auth-supernode-private-key", stranger.folder / "relay" / "node.key"] if what != "plain text" else []
        node = ["--superlink", address, *trust, *key, "--max-retries", "2", "--port", "9099"]
        began = stranger.run(what, [BIN / "flower-supernode", *node])
        with suppress(subprocess.TimeoutExpired):
            began.wait(60 * PACE)
        stranger.kill()
        assert began.returncode not in (None, 0), stranger.log(what)
        assert "SuperNode ID" not in stranger.log(what), stranger.log(what)
        told = [line for line in stranger.log(what).splitlines() if "rror" in line or "ailed" in line or "xit" in line]
        print(f"  {what}: exit code {began.returncode}; {told[0][:120] if told else ''}")

    for path in (
        "/v1/control/list-runs",
        "/v1/control/start-run",
        "/v1/runtime/acquire-task",
        "/health",
        "/v1/fleet/register-node",
        "/v1/fleet/../control/list-runs",
        "/v1/fleet/%2e%2e/control/list-runs",
        "//v1/control/list-runs",
    ):
        asked = subprocess.run(
            [
                *world.network.inside(0),
                "curl",
                "-s",
                "--path-as-is",
                "--cacert",
                trusted,
                "-o",
                "/dev/null",
                "-w",
                "%{http_code}",
                "-X",
                "POST",
                "-H",
                "content-type: application/protobuf",
                f"https://{address}{path}",
            ],
            check=False,
            text=True,
            capture_output=True,
        )
        print(f"  {path}: {asked.stdout}")
        assert asked.stdout == "403", asked
    reached = subprocess.run(
        [*world.network.inside(0), "bash", "-c", f"</dev/tcp/{COORDINATOR}/8000"],
        check=False,
        stderr=subprocess.DEVNULL,
    )
    assert reached.returncode != 0, "the link itself can be reached from a site"

    unapproved = document("unapproved", 2, quorum_wait=20)
    run = world.coordinator.start_run(unapproved, "unapproved")
    end = world.ended(run)
    assert end["status"] == "failed"
    assert all(any("refused" in text for text in events(run, name)) for name in SITES), list(
        read_lines(run / "events.jsonl")
    )
    print(f"  unapproved document: {end['cause'][:60]} ...; {events(run, 'north')[0][:120]}")

    revoked = world.hospitals[3]
    world.coordinator.mmfm("revoke", revoked.name)
    run = world.run("without", rounds=2)
    world.completed(run)
    assert all(names == set(SITES) - {revoked.name} for names in sites_of_round(run).values())
    revoked.kill()
    size = len(revoked.log())
    revoked.start()
    wait(lambda: "relay ended with code" in revoked.log()[size:], 120 * PACE, "a revoked site stays connected")
    told = world.coordinator.mmfm("enrol", revoked.request, "--out", revoked.enrolment, check=False)
    assert "was revoked" in told, told
    revoked.kill()
    (revoked.folder / "relay").rename(revoked.folder / "old-relay")
    (revoked.folder / "site.yaml").unlink()
    revoked.begin()
    world.coordinator.enrol(revoked)
    revoked.start()
    world.everyone_is_online()
    run = world.run("again", rounds=2)
    world.completed(run)
    assert revoked.name in sites_of_round(run)[2]
    print("  revoked: not asked, cannot connect, and its key not accepted again; with a new key it is back")


def expired_certificate(world: World) -> None:
    """The server's certificate expires: `up` says so; renewed, all come back. Then renewed within a run."""
    coordinator = world.coordinator
    with patch.object(certificates, "datetime") as clock:
        clock.now.return_value = datetime.now(UTC) - timedelta(days=certificates.SERVER_DAYS + 1)
        keys = coordinator.directory / "keys"
        certificates.issue(
            COORDINATOR,
            keys / "ca.key",
            coordinator.directory / "certificates/ca.crt",
            keys / "server.key",
            coordinator.directory / "certificates/server.crt",
        )
    coordinator.mmfm("down")
    told = coordinator.mmfm("up", "--detach", check=False)
    assert "expired on" in told and "certificate --renew" in told, told
    coordinator.mmfm("certificate", "--renew")
    coordinator.mmfm("up", "--detach")
    world.everyone_is_online()
    print("  refused by 'up'; renewed, and every site is back")
    run = world.run("renewed", rounds=3)
    wait(lambda: world.round_reached(run, 1), LONG)
    before = coordinator.mmfm("certificate")
    told = coordinator.mmfm("certificate", "--renew")
    assert "start again" in told, (before, told)
    world.completed(run)
    assert all(len(names) >= 2 for names in sites_of_round(run).values())
    print(f"  renewed within a run, which completed without help; rounds took {np.round(seconds_of_rounds(run))} s")


def disk_full(world: World) -> None:
    """The coordinator's disk is full during a run: it fails with a sentence, and goes on once there is space."""
    place = world.coordinator.directory / "runs" / "disk"
    place.mkdir(parents=True)
    # A program sees the mounts that there were when its namespace was entered.
    world.coordinator.mmfm("down")
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", place], check=True)
    try:
        world.coordinator.mmfm("up", "--detach")
        world.everyone_is_online()
        federation = document("disk", 4)
        for hospital in world.hospitals:
            hospital.approve(federation)
        run = world.coordinator.start_run(federation, "disk")
        wait(lambda: world.round_reached(run, 1), LONG)
        with suppress(OSError), (place / ".filler").open("wb") as filler:
            while True:
                filler.write(bytes(4096))
                filler.flush()
        wait(lambda: facts(run)["status"] in ("failed", "completed"), 300 * PACE)
        print(f"  {facts(run)['status']}: {facts(run)['cause']}")
        (place / ".filler").unlink()
        world.coordinator.mmfm("resume", run, "--no-follow")
        world.completed(run)
        world.equals_simulation(run, "disk")
    finally:
        subprocess.run(["umount", "-l", place], check=False)


def endurance(world: World) -> None:
    """24 rounds, and in each a fault drawn by lot; every process's memory stays flat."""
    chance = random.Random(2)  # noqa: S311
    run = world.run("endurance", rounds=24, deadline=40.0 * PACE)
    memory: dict[int, list[int]] = {}
    done = 0
    while facts(run)["status"] not in ("completed", "failed"):
        if facts(run).get("round", 0) > done:
            done = facts(run)["round"]
            for pid in (*world.coordinator.processes(), *(pid for each in world.hospitals for pid in each.processes())):
                memory.setdefault(pid, []).append(resident(pid))
            hospital, fault = chance.choice(world.hospitals), chance.choice(sorted(FAULTS))
            print(f"  round {done}: {fault} at {hospital.name}; all processes {_sum(memory)} MB", flush=True)
            FAULTS[fault](world, hospital)
        time.sleep(0.5)
    world.completed(run)
    took = sites_of_round(run)
    print(f"  replies counted: {sum(map(len, took.values()))} of {len(SITES) * len(took)}")
    lasting = {pid: sizes for pid, sizes in memory.items() if len(sizes) >= 8}
    for pid, sizes in lasting.items():
        early, late = max(sizes[: len(sizes) // 2]), max(sizes[-2:])
        print(f"  {_name(pid)}: {len(sizes)} rounds, {early} MB at most in the first half, {late} MB at the end")
        assert late < 1.15 * early + 20, sizes
    assert len(lasting) >= 12, "too few processes lasted to say anything"


def _cut_shortly(world: World, hospital: Hospital) -> None:
    number = world.hospitals.index(hospital)
    world.network.cut(number)
    time.sleep(5)
    world.network.join(number)


def _restart(_: World, hospital: Hospital) -> None:
    hospital.kill()
    hospital.start()


def _pause(_: World, hospital: Hospital) -> None:
    hospital.kill(signal.SIGSTOP, AGENT)
    time.sleep(8)
    hospital.kill(signal.SIGCONT, AGENT)


FAULTS: dict[str, Callable[[World, Hospital], None]] = {
    "none": lambda _, __: None,
    "agent killed": lambda _, hospital: hospital.kill(words=AGENT),
    "courier killed": lambda _, hospital: hospital.kill(words="client.courier"),
    "site killed": _restart,
    "line cut": _cut_shortly,
    "agent paused": _pause,
}


SCENARIOS: list[Callable[[World], None]] = [
    plain,
    site_killed,
    coordinator_killed,
    serverapp_killed,
    straggler,
    refused,
    expired_certificate,
    network_cut,
    bad_line,
    disk_full,
    agent_killed,
    private_coordinator_killed,
    site_disk_full,
    endurance,
]
BY_NAME = [large]  # what takes more time and memory than a fault is worth


def main(names: list[str]) -> int:
    """Run the scenarios, all of them where none is named; how many failed."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that nothing is left behind
    names, or_skip = [name for name in names if name != "--or-skip"], "--or-skip" in names
    if reason := obstacle():
        print(f"e2e {'skipped' if or_skip else 'cannot run'}: {reason}")
        return 0 if or_skip else 1
    known = {each.__name__: each for each in (*SCENARIOS, *BY_NAME)}
    if unknown := [name for name in names if name not in known]:
        sys.exit(f"no scenario is called '{unknown[0]}'; known: {', '.join(known)}")
    chosen = [known[name] for name in names] or SCENARIOS
    folder = Path(tempfile.mkdtemp(prefix="e2e-"))
    network = Network(len(SITES))
    print(f"Everything is in {folder}", flush=True)
    failed = 0
    hospitals: list[Hospital] = []
    coordinator = Coordinator(folder, network.inside())
    try:
        network.build()
        sites = write_sites(folder / "data", SITES)
        began = time.monotonic()
        coordinator.mmfm("init", coordinator.directory, "--name", "trial", "--address", f"{COORDINATOR}:{PORT}")
        coordinator.mmfm("up", "--detach")
        for number, site in enumerate(sites.values()):
            hospitals.append(Hospital(folder / "sites", site, network.inside(number)))
            coordinator.enrol(hospitals[-1])
            hospitals[-1].start()
        world = World(folder, network, coordinator, hospitals, sites, began)
        world.everyone_is_online()
        for scenario in chosen:
            print(f"{scenario.__name__}: {scenario.__doc__}", flush=True)
            started = time.monotonic()
            try:
                scenario(world)
                print(f"  holds ({time.monotonic() - started:.0f} s)", flush=True)
            except Exception:
                failed += 1
                traceback.print_exc()
                print(f"  FAILED ({time.monotonic() - started:.0f} s)", flush=True)
    finally:
        for hospital in hospitals:
            hospital.kill(signal.SIGCONT)
            hospital.kill()
        coordinator.mmfm("down", check=False)
        network.remove()
    print(f"{len(chosen) - failed} of {len(chosen)} scenarios hold")
    return failed


def _sum(memory: dict[int, list[int]]) -> int:
    return sum(sizes[-1] for pid, sizes in memory.items() if Path(f"/proc/{pid}").exists())


def _name(pid: int) -> str:
    with suppress(OSError):
        words = Path(f"/proc/{pid}/cmdline").read_bytes().replace(b"\0", b" ").decode().split(" --")[0]
        return " ".join(word.rpartition("/")[2] for word in words.split())[-60:]
    return f"process {pid}, which has ended"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
