"""The egress log: everything that leaves is in it first, nothing of a patient is, and no later change goes unseen."""

import hashlib
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from test_agent import Coordination, agents, refusal
from tiny import tiny_federation, write_sites

from client.egress import FIRST, EgressLog
from mmfm_core.config import Site
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Metric, RoundReply, RoundRequest


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


def filled(path: Path, entries: int = 6) -> EgressLog:
    log = EgressLog(path)
    for number in range(entries):
        reply = RoundReply("north", number, {}, [], None, 1.0, {"w": np.full(3, number, np.float32)})
        log.append(reply, RoundRequest("d" * 64, number))
    return log


def altered(log: EgressLog, *statements: str) -> None:
    """What somebody does who may write to the file: triggers stop no one."""
    with sqlite3.connect(log.path) as database:
        for statement in ("DROP TRIGGER no_change", "DROP TRIGGER no_removal", *statements):
            database.execute(statement)
    database.close()


def test_what_a_round_sent_is_written_down_by_name_size_and_hash(tmp_path: Path, sites: dict[str, Site]) -> None:
    federation = tiny_federation(parameters={"local": ["fusion.*"]})
    coordination = Coordination(federation, agents(tmp_path / "run", federation, sites))
    agent = coordination.agents["south"]
    reply = agent.answer(coordination.request("south", 1))
    refused = agent.answer(replace(coordination.request("south", 1), round=99))
    garbled = agent.refuse("the message ends before all that it declares")
    assert isinstance(reply, RoundReply)
    described, answered, no, odd = (entry for _, entry in agent.egress.entries())
    assert [entry["kind"] for entry in (described, answered, no, odd)] == [
        "SiteDescription",
        "RoundReply",
        "Refusal",
        "Refusal",
    ]
    assert (answered["document"], answered["round"]) == (coordination.document, 1)
    assert answered["tensors"] == [
        {
            "name": name,
            "dtype": "float32",
            "shape": list(tensor.shape),
            "bytes": 4 * tensor.size,
            "sha256": hashlib.sha256(tensor.tobytes()).hexdigest(),
        }
        for name, tensor in reply.tensors.items()
    ]
    assert [figure["metric"] for figure in answered["metrics"]] == [metric.metric for metric in reply.metrics]
    assert no["reason"] == refusal(refused)
    assert (odd["reason"], odd["document"]) == (garbled.reason, None)
    assert agent.egress.verify()[0] == 4


def test_no_value_of_a_figure_is_written_down(tmp_path: Path) -> None:
    figure = Metric("disease", "shared", "val", "auroc", 0.123456789, 40, 0.1111, 0.9999)
    log = EgressLog(tmp_path / "egress.sqlite")
    log.append(RoundReply("north", 1, {}, [figure], 0.87654321, 1.0), RoundRequest("d" * 64, 1))
    ((_, entry),) = log.entries()
    assert (entry["metrics"][0]["metric"], entry["metrics"][0]["n"]) == ("auroc", 40)
    assert not [value for value in ("0.123", "0.1111", "0.9999", "0.8765") if value in json.dumps(entry)]


def test_a_chain_can_be_checked_without_this_code(tmp_path: Path) -> None:
    """By the definition in the module's own words, from the file alone."""
    log = filled(tmp_path / "egress.sqlite")
    head = "0" * 64
    with sqlite3.connect(log.path) as database:
        for entry, stated in database.execute("SELECT entry, hash FROM egress ORDER BY number"):
            head = hashlib.sha256((head + "\n" + entry).encode()).hexdigest()
            assert head == stated
    assert log.verify() == log.head() == (6, head)


TAMPERED = {
    "changed": ("UPDATE egress SET entry = replace(entry, '\"round\": 2', '\"round\": 3') WHERE number = 3", "entry 3"),
    "first changed": ("UPDATE egress SET entry = '{}' WHERE number = 1", "entry 1"),
    "last changed": ("UPDATE egress SET entry = '{}' WHERE number = 6", "entry 6"),
    "hash changed": ("UPDATE egress SET hash = entry WHERE number = 4", "entry 4"),
    "removed": ("DELETE FROM egress WHERE number = 3", "entry 3 was removed"),
    "first removed": ("DELETE FROM egress WHERE number = 1", "entry 1 was removed"),
    "removed, numbers closed": (
        "DELETE FROM egress WHERE number = 3; UPDATE egress SET number = number - 1 WHERE number > 3",
        "entry 3",
    ),
    "reordered": (
        "UPDATE egress SET number = 99 WHERE number = 2; UPDATE egress SET number = 2 WHERE number = 3; "
        "UPDATE egress SET number = 3 WHERE number = 99",
        "entry 2",
    ),
    "inserted": ("INSERT INTO egress SELECT 7, entry, hash FROM egress WHERE number = 6", "entry 7"),
}


@pytest.mark.parametrize(("statement", "said"), TAMPERED.values(), ids=TAMPERED.keys())
def test_tampering_is_seen(tmp_path: Path, statement: str, said: str) -> None:
    log = filled(tmp_path / "egress.sqlite")
    altered(log, *statement.split("; "))
    with pytest.raises(MmfmError, match=said):
        log.verify()


def test_an_entry_that_is_no_longer_one_is_named(tmp_path: Path) -> None:
    log = filled(tmp_path / "egress.sqlite")
    altered(log, "UPDATE egress SET entry = 'xx' WHERE number = 3")
    with pytest.raises(MmfmError, match="entry 3 is not what was written"):
        list(log.entries())


def test_a_cut_tail_and_a_rewritten_chain_are_seen_against_a_noted_head_alone(tmp_path: Path) -> None:
    log = filled(tmp_path / "egress.sqlite")
    _, noted = log.head()
    early = next(iter(sqlite3.connect(log.path).execute("SELECT hash FROM egress WHERE number = 2")))[0]
    assert log.verify(noted) == log.verify(early) == log.verify(FIRST) == (6, noted)
    altered(log, "DELETE FROM egress WHERE number > 4")
    assert log.verify()[0] == 4, "what is left is a whole chain"
    assert log.verify(early)[0] == 4
    with pytest.raises(MmfmError, match="cut off, or rewritten"):
        log.verify(noted)


@pytest.mark.parametrize("statement", ["UPDATE egress SET entry = '{}'", "DELETE FROM egress"])
def test_the_file_itself_refuses_changes(tmp_path: Path, statement: str) -> None:
    log = filled(tmp_path / "egress.sqlite")
    with pytest.raises(sqlite3.DatabaseError, match="append only"), sqlite3.connect(log.path) as database:
        database.execute(statement)


@pytest.mark.parametrize("spoil", [lambda path: path.write_bytes(b"x" * 5000), lambda path: path.mkdir()])
def test_nothing_leaves_that_cannot_be_written_down(
    tmp_path: Path, sites: dict[str, Site], spoil: Callable[[Path], object]
) -> None:
    federation = tiny_federation()
    made = agents(tmp_path / "run", federation, sites)
    spoil(made["south"].directory / "egress.sqlite")
    reasons = {refusal(made["south"].answer(RoundRequest("d" * 64, 1))), made["south"].refuse("x").reason}
    assert reasons == {"this site cannot write down what leaves, so nothing does; its own log says why"}


@pytest.mark.slow
def test_entries_survive_a_kill_at_any_moment(tmp_path: Path) -> None:
    """What the process said it had written is there, and the chain is whole."""
    code = f"""
from pathlib import Path
from client.egress import EgressLog
from mmfm_core.protocol import Refusal
log = EgressLog(Path({str(tmp_path / "egress.sqlite")!r}))
while True:
    print(log.append(Refusal("north", "no"), None), flush=True)
"""
    heads: list[str] = []
    for moment in range(4):
        with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as writing:
            assert writing.stdout
            heads += [writing.stdout.readline().strip() for _ in range(3 + moment)]
            time.sleep(0.003 * moment)
            os.kill(writing.pid, signal.SIGKILL)
            heads += [line.strip() for line in writing.stdout if line.endswith("\n")]
    log = EgressLog(tmp_path / "egress.sqlite")
    for head in heads:
        log.verify(head)
    assert len(heads) <= log.verify()[0] <= len(heads) + 4


def test_an_empty_log_is_a_whole_one(tmp_path: Path) -> None:
    log = EgressLog(tmp_path / "egress.sqlite")
    assert (log.verify(), list(log.entries())) == ((0, FIRST), [])
