"""What a site logs and what it sends: the log has file and row, the refusal neither, and no value is in either."""

import json
import logging
from pathlib import Path

import pytest
from test_agent import refusal
from tiny import prepare_run, tiny_federation, write_sites

import client.agent
from client import gates
from client.agent import Agent
from client.logs import JsonLines, about
from mmfm_core.config.loading import dump, sha256
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Describe

CANARY = "CANARY-PHI-123"


def line_of(record: logging.LogRecord) -> dict[str, object]:
    line: dict[str, object] = json.loads(JsonLines("north").format(record))
    return line


def test_a_line_says_what_it_is_about(caplog: pytest.LogCaptureFixture) -> None:
    with about(document="d" * 64, round=3):
        logging.getLogger("x").warning("a %s", "word")
        line = line_of(caplog.records[-1])
    assert (line["level"], line["site"], line["document"], line["round"], line["text"]) == (
        "warning",
        "north",
        "d" * 64,
        3,
        "a word",
    )
    logging.getLogger("x").warning("later")
    assert "round" not in line_of(caplog.records[-1])


def test_an_unexpected_error_is_logged_by_kind_and_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: object) -> None:
        patient = f"{CANARY} is not a number"
        raise ValueError(patient)

    monkeypatch.setattr(client.agent, "describe", fail)
    federation = tiny_federation()
    run = prepare_run(tmp_path / "run", federation, write_sites(tmp_path / "hospitals"))
    refusal(Agent.open(run / "sites/south").answer(Describe(sha256(federation))))
    line = line_of(caplog.records[-1])
    assert line["error"] == "ValueError"
    assert str(line["at"]).count("test_logs.py") == 1
    assert CANARY not in json.dumps([line_of(record) for record in caplog.records])


@pytest.mark.parametrize(
    ("change", "sent"),
    [
        (("north-23-0.png", "gone.png"), "column 'scan': the file does not exist; restore it, or set"),
        (("healthy", CANARY), "column 'disease' is none of healthy, ill; rename its values under"),
        (("north-1,train", "north-0,val"), "this patient is in split 'val' here and in 'train' there"),
    ],
)
def test_a_refusal_names_the_column_and_the_log_the_row(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, change: tuple[str, str], sent: str
) -> None:
    federation = tiny_federation()
    site = write_sites(tmp_path / "hospitals")["north"]
    run = prepare_run(tmp_path / "run", federation, {"north": site})
    text = site.manifest.read_text()
    site.manifest.write_text(text.replace(*change))
    assert site.manifest.read_text() != text
    reason = refusal(Agent.open(run / "sites/north").answer(Describe(sha256(federation))))
    assert sent in reason
    assert str(tmp_path) not in reason
    assert "row " not in reason
    logged = json.dumps([line_of(record) for record in caplog.records])
    assert f"{site.manifest}, row " in logged
    assert CANARY not in logged + reason


def test_a_missing_manifest_is_named_in_the_log_alone(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    federation = tiny_federation()
    site = write_sites(tmp_path / "hospitals")["north"]
    run = prepare_run(tmp_path / "run", federation, {"north": site})
    lost = tmp_path / "lost.csv"
    (run / "sites/north/site.yaml").write_text(dump(site.model_copy(update={"manifest": lost})))
    reason = refusal(Agent.open(run / "sites/north").answer(Describe(sha256(federation))))
    assert reason == "the manifest does not exist; check 'manifest' in the site's file"
    assert str(lost) in caplog.text


@pytest.mark.parametrize(
    "reason", ["/srv/x.csv: y", "cannot read '/data/a b/c.png'", "see (~/secret)", 'in "/root"', "x\n/etc/passwd"]
)
def test_a_reason_with_a_place_on_this_machine_does_not_leave(reason: str) -> None:
    assert (
        gates.tellable(reason)
        == "the site's files cannot be used as they are; its own log says which, and how to mend it"
    )


def test_other_reasons_leave_as_they_are_but_for_their_length() -> None:
    for reason in ("the tensor 'control/fusion.weight' is missing", "put it at artifacts/0af in the site's directory"):
        assert gates.tellable(reason) == reason
    assert len(gates.tellable("x" * 10**6)) == gates.LONGEST_REASON


def test_an_error_keeps_what_may_be_told_apart() -> None:
    error = MmfmError("the column is empty", "/srv/m.csv, row 3")
    assert (str(error), error.told) == ("/srv/m.csv, row 3: the column is empty", "the column is empty")
    assert MmfmError("a sentence").told == "a sentence"
