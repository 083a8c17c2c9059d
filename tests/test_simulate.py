"""`mmfm simulate` as a researcher meets it: what it leaves behind, what it says, and what no kill can take from it."""

import json
import os
import pty
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from command_line import MMFM, SITES, Documents, hospitals, longer, mmfm
from rich.console import Console
from tiny import tiny_federation

from mmfm_core import command
from mmfm_core.config import load_federation, load_sites
from mmfm_core.errors import MmfmError
from server import record
from server.display import Display, RunProgress, Tail, duration
from server.engines import in_process
from server.record import COMMAND_LOCK, Run, read_lines
from server.report import write_report
from server.simulation import prepare

# --- a run that goes well -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def documents(tmp_path_factory: pytest.TempPathFactory) -> Documents:
    return hospitals(tmp_path_factory.mktemp("federation"))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory, documents: Documents) -> tuple[Path, str]:
    """A run with baselines, and what the command said."""
    folder = tmp_path_factory.mktemp("finished")
    done = mmfm(folder, "simulate", documents.federation, "--seed", "7")
    assert (done.returncode, done.stderr) == (0, "")
    return folder / "runs" / "tiny", done.stdout


@pytest.mark.slow
def test_a_run_leaves_a_whole_directory(finished: tuple[Path, str]) -> None:
    directory, _ = finished
    facts = json.loads((directory / "run.json").read_text())
    text = (directory / "federation.yaml").read_bytes()
    assert sha256(text).hexdigest() == facts["federation"]
    assert yaml.safe_load(text)["stages"][0]["optimizer"]["weight_decay"] == 0.01  # a default, written out
    assert (facts["status"], facts["cause"], facts["seed"]) == ("completed", None, 7)
    assert load_federation(directory / "federation.yaml").seed == 7
    assert facts["finished"] > facts["started"]
    assert [path.name for path in sorted((directory / "checkpoints").iterdir())] == ["round-00002", "round-00003"]
    assert {line["round"] for line in read_lines(directory / "metrics.jsonl")} == {1, 2, 3}
    assert {path.name for path in (directory / "sites").iterdir()} == set(SITES)
    assert "<html" in (directory / "report.html").read_text()
    assert not list(directory.rglob(".partial*"))
    comparison = json.loads((directory / "comparison.json").read_text())
    assert comparison["methods"] == ["local-only", "fedavg", "adapted", "pooled"]
    for name in ("local-only", "pooled"):
        assert Run.open(directory / "baselines" / name).facts["status"] == "completed"


@pytest.mark.slow
def test_without_a_terminal_there_is_a_plain_line_for_each_round(finished: tuple[Path, str]) -> None:
    _, said = finished
    lines = said.splitlines()
    assert "\x1b" not in said
    assert "\r" not in said
    assert lines[0] == "Simulating tiny: 3 sites, in runs/tiny"
    rounds = [line for line in lines if line.startswith("federation: ")]
    assert re.fullmatch(
        r"federation: round 1/3 train, 3/3 sites, loss \d\.\d{3}, [\d.]+ s left, [\d.]+ s this round", rounds[0]
    )
    assert [line.split(",")[0] for line in rounds] == [
        f"federation: round {r}/3 {name}" for r, name in enumerate(("train", "train", "adapt"), 1)
    ]
    assert " left" not in rounds[-1]
    assert sum(line.startswith("local only: round ") for line in lines) == 1
    assert sum(line.startswith("pooled: round ") for line in lines) == 3
    assert lines[-1] == "Report: runs/tiny/report.html"
    assert max(len(line) for line in lines if not line.startswith("warning")) <= 80
    warnings = [line for line in lines if line.startswith("warning")]
    assert len(warnings) == len(set(warnings))  # though three runs have the same sites


@pytest.mark.slow
def test_a_site_with_one_class_takes_part_and_its_auroc_is_undefined(finished: tuple[Path, str]) -> None:
    directory, said = finished
    (task,) = json.loads((directory / "comparison.json").read_text())["tasks"]
    site = next(site for site in task["sites"] if site["site"] == "healthy")
    assert site["classes"] == {"healthy": 15, "ill": 0}
    assert {result["value"] for result in site["results"].values()} == {None}
    assert "At healthy the AUROC is undefined (15 healthy, 0 ill): it takes 5 patients of each class." in " ".join(
        said.split()
    )
    counted = [line["value"] for line in read_lines(directory / "metrics.jsonl") if line["metric"] == "sites"]
    assert counted == [3, 3, 3]
    assert task["mean_of_sites"]["fedavg"] == pytest.approx(
        np.mean([s["results"]["fedavg"]["value"] for s in task["sites"] if s["site"] != "healthy"])
    )


@pytest.mark.slow
def test_in_a_terminal_progress_is_live_and_leaves_it_clean(documents: Documents, tmp_path: Path) -> None:
    words = [MMFM, "simulate", documents.federation, "--no-baselines", "--run", "it's [red]"]
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(tmp_path)
        os.execve(MMFM, [str(word) for word in words], os.environ | {"TERM": "xterm", "COLUMNS": "80"})  # noqa: S606
    said = b""
    with suppress(OSError):  # how the end of a pseudo-terminal shows
        while data := os.read(terminal, 65536):
            said += data
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", said.decode())
    assert all(c.isprintable() or c in "\r\n" for c in text)
    lines = [line.rstrip() for line in re.split(r"[\r\n]+", text)]
    assert max(len(line) for line in lines if "warning" not in line) <= 80
    assert any(re.match(r"federation ━+[╸╺ ]?━* *starting", line) for line in lines)
    assert any(re.match(r"federation .* round \d/3 train, \d/3 sites, loss \d\.\d{3}", line) for line in lines)
    said_first = next(line for line in lines if line and "Checking that sites share no patients" not in line)
    assert said_first == "Simulating tiny: 3 sites, in it's [red]"
    assert "Report: it's [red]/report.html" in lines
    assert said.rindex(b"\x1b[?25h") > said.rindex(b"\x1b[?25l")  # the cursor is back
    assert not (tmp_path / "it's [red]" / "baselines").exists()


# --- wrong input ----------------------------------------------------------------------------------------------------


def said_by(words: list[str | Path], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> str:
    """What `mmfm` says on stderr before it ends with exit code 1."""
    monkeypatch.setattr(sys, "argv", ["mmfm", *map(str, words)])
    monkeypatch.setattr(record, "LOCK_SECONDS", 0.2)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: ")
    assert said.err.count("\n") == 1
    return said.err.removeprefix("error: ").rstrip("\n")


Change = Callable[[dict[str, Any], dict[str, Any]], None]


def negative_rounds(federation: dict[str, Any], _: dict[str, Any]) -> None:
    federation["stages"][0]["rounds"] = -2


def unknown_fusion(federation: dict[str, Any], _: dict[str, Any]) -> None:
    federation["model"]["fusion"]["type"] = "gatedd"


def unknown_key(federation: dict[str, Any], _: dict[str, Any]) -> None:
    federation["stages"][0]["local_step"] = 3


def unknown_site_key(_: dict[str, Any], sites: dict[str, Any]) -> None:
    sites["sites"]["south"]["manifests"] = "x.csv"


def too_few_sites(federation: dict[str, Any], _: dict[str, Any]) -> None:
    federation["aggregation"]["min_sites"] = 4


def unknown_modality(_: dict[str, Any], sites: dict[str, Any]) -> None:
    sites["sites"]["south"]["modalities"]["notes"] = "note"


def unknown_target(_: dict[str, Any], sites: dict[str, Any]) -> None:
    sites["sites"]["south"]["targets"]["diseases"] = "disease"


def reserved_name(_: dict[str, Any], sites: dict[str, Any]) -> None:
    sites["sites"]["federation"] = sites["sites"].pop("south")


IN_DOCUMENTS: list[tuple[Change, tuple[str, ...]]] = [
    (negative_rounds, ("tiny.yaml: stages.0.rounds:", "greater than 0")),
    (unknown_fusion, ("tiny.yaml: model.fusion: unknown", "did you mean 'gated'?")),
    (unknown_key, ("tiny.yaml: stages.0: unknown key 'local_step'; did you mean 'local_steps'?",)),
    (unknown_site_key, ("tiny.sites.yaml: sites.south: unknown key 'manifests'; did you mean 'manifest'?",)),
    (too_few_sites, ("tiny.yaml: aggregation.min_sites is 4", "tiny.sites.yaml has 3 sites; add sites or lower it")),
    (unknown_modality, ("tiny.sites.yaml: sites.south.modalities.notes: ", "did you mean 'note'?")),
    (unknown_target, ("tiny.sites.yaml: sites.south.targets.diseases: ", "did you mean 'disease'?")),
    (reserved_name, ("tiny.sites.yaml: sites.federation: ", "give it another")),
]


@pytest.mark.parametrize("verb", ["simulate", "plan"])
@pytest.mark.parametrize(("change", "told"), IN_DOCUMENTS, ids=[change.__name__ for change, _ in IN_DOCUMENTS])
def test_a_mistake_in_a_document_is_one_sentence_and_leaves_nothing(
    verb: str,
    change: Change,
    told: tuple[str, ...],
    documents: Documents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    wrong = documents.amend(tmp_path, change)
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    sentence = said_by([verb, wrong.federation], monkeypatch, capsys)
    assert str(tmp_path) in sentence
    for part in told:
        assert part in sentence
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("files", "words", "told"),
    [
        ({}, ["tiny.yaml"], "tiny.yaml: cannot be read (No such file or directory)"),
        ({"tiny.yaml": "name: x\n"}, ["tiny.yaml"], "tiny.sites.yaml: there is no such file; name the sites' file"),
        ({"tiny.yaml": None}, ["tiny.yaml", "--sites", "other.yaml"], "other.yaml: cannot be read (No such file"),
        (
            {"tiny.yaml": "name: x\n\tseed: 1\n", "tiny.sites.yaml": ""},
            ["tiny.yaml"],
            "line 2, column 1: there is a tab",
        ),
    ],
    ids=["no federation", "no sites beside it", "no sites where named", "tab"],
)
def test_a_file_that_is_no_document_is_named(
    files: dict[str, str | None],
    words: list[str],
    told: str,
    documents: Documents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(documents.federation.read_text() if text is None else text)
    monkeypatch.chdir(tmp_path)
    assert told in said_by(["simulate", *words], monkeypatch, capsys)
    assert not (tmp_path / "runs").exists()


def test_a_directory_that_is_not_a_run_is_left_alone(
    documents: Documents, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    taken = tmp_path / "thesis"
    (taken / "chapter").mkdir(parents=True)
    (taken / "chapter" / "one.tex").write_text("precious")
    for other in ({}, {"run.json": "{}"}, {"run.json": "no json"}):
        for name, text in other.items():
            (taken / name).write_text(text)
        before = {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()}
        for words in (["--replace"], [], ["--resume"]):
            sentence = said_by(["simulate", documents.federation, "--run", taken, *words], monkeypatch, capsys)
            assert str(taken) in sentence
            assert {path: path.read_bytes() for path in taken.rglob("*") if path.is_file()} == before
    (tmp_path / "file").write_text("precious")
    for place in ("file", "file/run"):
        said_by(["simulate", documents.federation, "--run", tmp_path / place, "--replace"], monkeypatch, capsys)
    assert (tmp_path / "file").read_text() == "precious"


def test_a_run_directory_that_cannot_be_written_is_named(
    documents: Documents, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    sentence = said_by(["simulate", documents.federation, "--run", "/dev/null/run"], monkeypatch, capsys)
    assert sentence.startswith("/dev/null/run: cannot be written (Not a directory); ")
    assert "--run" in sentence


def test_a_run_is_resumed_only_as_what_it_was(
    documents: Documents,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    long = documents.amend(tmp_path, longer)
    began = prepare(tmp_path / "run", load_federation(long.federation), load_sites(documents.sites))
    began.save_checkpoint(1, {"x": np.zeros(2, np.float32)})

    def contents() -> dict[Path, bytes]:
        return {path: path.read_bytes() for path in began.directory.rglob("[!.]*") if path.is_file()}

    where = ["--run", began.directory, "--sites", documents.sites]
    before = contents()

    def told(*words: str | Path) -> str:
        return said_by(["simulate", *words], monkeypatch, capsys)

    assert "a run is already here; go on with --resume, start over with --replace" in told(long.federation, *where)
    assert "another document or seed" in told(documents.federation, *where, "--resume")
    assert "another document or seed" in told(long.federation, *where, "--resume", "--seed", "5")
    assert "give one of them" in told(long.federation, *where, "--resume", "--replace")
    assert "no run to go on with" in told(
        long.federation, "--sites", documents.sites, "--run", tmp_path / "x", "--resume"
    )

    def rename(_: dict[str, Any], sites: dict[str, Any]) -> None:
        sites["sites"]["south"]["missing"] = ["unknown"]

    amended = documents.amend(tmp_path / "amended", rename).sites
    sentence = told(long.federation, "--run", began.directory, "--sites", amended, "--resume")
    assert "site 'healthy' is not what it was when this run began" in sentence  # its manifest is looked for elsewhere
    assert contents() == before


def test_replace_starts_where_nothing_is_in_the_way(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", tiny_federation())
    run.save_checkpoint(1, {"x": np.zeros(2, np.float32)})
    run.record(round=1)
    with run.locked(COMMAND_LOCK):
        run.delete()
        assert [path.name for path in run.directory.iterdir() if path.name not in record.LOCKS] == []
        with pytest.raises(MmfmError, match="another process"), pytest.MonkeyPatch.context() as patch:
            patch.setattr(record, "LOCK_SECONDS", 0)
            Run(run.directory).locked(COMMAND_LOCK).__enter__()
        Run.create(run.directory, tiny_federation())  # the locks are not in the way


def rewrite(manifest: Path, change: Callable[[str], str]) -> None:
    manifest.write_text(change(manifest.read_text()))


def missing_manifest(folder: Path) -> None:
    (folder / "hospitals/south/manifest.csv").unlink()


def missing_column(folder: Path) -> None:
    rewrite(folder / "hospitals/south/manifest.csv", lambda text: text.replace("crp", "crpp", 1))


def unreadable_image(folder: Path) -> None:
    (folder / "hospitals/north/scans/north-1-0.png").write_bytes(b"no image")


def empty_site(folder: Path) -> None:
    rewrite(folder / "hospitals/south/manifest.csv", lambda text: text.splitlines()[0] + "\n")


def patient_in_two_splits(folder: Path) -> None:
    rewrite(
        folder / "hospitals/south/manifest.csv",
        lambda text: text.replace("south-1-1,south-1,train", "south-1-1,south-1,test"),
    )


IN_DATA: list[tuple[Callable[[Path], None], tuple[str, ...]]] = [
    (missing_manifest, ("south/manifest.csv: the manifest does not exist", "check 'manifest'")),
    (
        missing_column,
        ("south/manifest.csv: there is no column 'crp'", "modalities.labs.features.crp", "did you mean 'crpp'?"),
    ),
    (unreadable_image, ("north/manifest.csv, row 3: ", "restore the file")),
    (empty_site, ("south/manifest.csv: site 'south' is empty: it has no rows",)),
    (patient_in_two_splits, ("south/manifest.csv, row ", "keep each patient in one split")),
]


@pytest.mark.parametrize(("spoil", "told"), IN_DATA, ids=[spoil.__name__ for spoil, _ in IN_DATA])
def test_a_mistake_in_the_data_is_named_and_trains_nothing(
    spoil: Callable[[Path], None], told: tuple[str, ...], tmp_path: Path
) -> None:
    documents = hospitals(tmp_path)
    spoil(tmp_path)
    federation, sites = load_federation(documents.federation), load_sites(documents.sites)
    run = prepare(tmp_path / "run", federation, sites, expected_sites=len(sites))
    with pytest.raises(MmfmError) as error:
        in_process.simulate(run.directory)
    for part in told:
        assert part in str(error.value)
    assert run.checkpoint() is None
    assert not run.metrics.exists()


def test_a_pattern_or_part_that_no_site_can_serve_is_named_and_trains_nothing(
    documents: Documents, tmp_path: Path
) -> None:
    def wrong_pattern(federation: dict[str, Any], _: dict[str, Any]) -> None:
        federation["stages"][1]["train"] = ["fuson.*"]

    def no_holder(_: dict[str, Any], sites: dict[str, Any]) -> None:
        for site in sites["sites"].values():
            site["modalities"].pop("scan", None)

    def no_target(_: dict[str, Any], sites: dict[str, Any]) -> None:
        for site in sites["sites"].values():
            del site["targets"]

    for change, told in (
        (wrong_pattern, r"stages\.1\.train: the pattern 'fuson\.\*' matches no parameter; did you mean 'fusion\.\*'\?"),
        (no_holder, r"model\.modalities\.scan: no site holds it; map it in a site's file, or take it out"),
        (no_target, r"stages\.0\.tasks\.disease: no site has a training label for it; map a column under 'targets'"),
    ):
        folder = tmp_path / change.__name__
        wrong = hospitals(folder).amend(folder, change)
        federation, sites = load_federation(wrong.federation), load_sites(wrong.sites)
        run = prepare(folder / "run", federation, sites, expected_sites=len(sites))
        with pytest.raises(MmfmError, match=told):
            in_process.simulate(run.directory)
        assert run.facts["status"] == "failed"
        assert run.checkpoint() is None


@pytest.mark.slow
def test_a_mended_mistake_leaves_nothing_in_the_way(tmp_path: Path) -> None:
    documents = hospitals(tmp_path)
    image = tmp_path / "hospitals/north/scans/north-1-0.png"
    whole = image.read_bytes()
    image.write_bytes(b"no image")
    failed = mmfm(tmp_path, "simulate", documents.federation)
    assert failed.returncode == 1
    assert failed.stderr.startswith("error: ")
    assert failed.stderr.count("\n") == 1
    assert "north/manifest.csv, row 3: " in failed.stderr
    for name in (".", "baselines/local-only", "baselines/pooled"):
        assert Run.open(tmp_path / "runs/tiny" / name).facts["status"] in ("failed", "interrupted")
    # Whichever of the three read the image first has failed, and the others were stopped.
    assert re.search("This run (failed|was interrupted) after 0 of", write_report(tmp_path / "runs/tiny").read_text())

    image.write_bytes(whole)
    mended = mmfm(tmp_path, "simulate", documents.federation, "--no-baselines")
    assert (mended.returncode, mended.stderr) == (0, "")
    assert "against FedAvg" in mended.stdout
    assert "training alone" not in mended.stdout


def test_a_file_that_may_not_be_read_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail() -> None:
        raise PermissionError(13, "Permission denied", "[a]/manifest.csv")

    monkeypatch.setattr(command, "build", fail)
    with pytest.raises(SystemExit) as ended:
        command.main()
    assert ended.value.code == 1
    assert capsys.readouterr().err == "error: [a]/manifest.csv: Permission denied; mend that, then try again\n"


# --- progress -------------------------------------------------------------------------------------------------------


def test_progress_follows_a_file_that_is_cut_and_grows_again(tmp_path: Path) -> None:
    path = tmp_path / "lines.jsonl"
    tail = Tail(path)
    assert tail.lines() == []
    path.write_text("1\n2\n3")
    assert tail.lines() == [1, 2]
    path.write_text("1\n22222\n3\n4\n")  # 2 was taken back, and the file is longer than before already
    assert tail.lines() == [22222, 3, 4]
    path.write_text("1\n")
    assert tail.lines() == []
    path.write_text("1\n5\n")
    assert tail.lines() == [5]


def test_progress_estimates_what_is_left_from_the_rounds_that_were(tmp_path: Path) -> None:
    run = Run.create(tmp_path / "run", tiny_federation())
    progress = RunProgress("federation", run, rounds=4, sites=2)
    assert progress.what == "waiting"
    run.update(status="running")
    assert list(progress.look()) == []
    assert progress.what == "starting"
    for seconds in (30.0, 50.0):
        for site in ("north", "south", "federation"):
            run.record(round=1 + (seconds > 40), stage="train", site=site, metric="seconds", value=seconds)
    assert list(progress.look()) == [
        "federation: round 1/4 train, 2/2 sites, 90 s left, 30 s this round",
        "federation: round 2/4 train, 2/2 sites, 80 s left, 50 s this round",
    ]
    resumed = RunProgress("federation", run, rounds=4, sites=2)
    assert (resumed.done, list(resumed.look())) == (2, [])


@pytest.mark.parametrize("terminal", ["dumb", ""])
def test_a_terminal_that_cannot_move_its_cursor_gets_plain_lines(
    terminal: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TERM", terminal or "xterm")
    run = Run.create(tmp_path / "run", tiny_federation())
    screen = StringIO()
    console = Console(file=screen, force_terminal=terminal == "dumb", width=100)
    with Display([RunProgress("federation", run, rounds=2, sites=1)], console):
        for site in ("north", "federation"):
            run.record(round=1, stage="train", site=site, metric="seconds", value=20)
    assert screen.getvalue() == "federation: round 1/2 train, 1/1 sites, 20 s left, 20 s this round\n"


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.04, "0.0 s"),
        (9.94, "9.9 s"),
        (9.96, "10 s"),
        (99.4, "99 s"),
        (99.6, "2 min"),
        (5900, "98 min"),
        (7500, "2 h 05 min"),
    ],
)
def test_durations_read_as_people_say_them(seconds: float, said: str) -> None:
    assert duration(seconds) == said
