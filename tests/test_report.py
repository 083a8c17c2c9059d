"""The report tells what the run's files say, no more, and whatever they hold it stays one harmless, whole page."""

import json
import subprocess
import sys
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from tiny import private_federation, tiny_federation

from mmfm_core.config import Federation
from mmfm_core.config.part import described
from mmfm_core.errors import MmfmError
from mmfm_core.registry import HEADS
from server.record import Run
from server.report import write_report
from server.report.wording import METRICS

HOSTILE = "<script>alert(1)</script>"
INTERVALS = {"above": (0.03, 0.01, 0.05), "across": (0.02, -0.01, 0.05), "below": (-0.04, -0.08, -0.01)}


class Page(HTMLParser):
    """What a reader of the page meets: every tag, the rows of its tables by their heads, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.rows: list[list[str]] = []
        self._text: list[str] = []
        self._in_cell = False
        self.feed(self.source)
        self.text = " ".join("".join(self._text).split())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
            self._in_cell = True

    def handle_endtag(self, tag: str) -> None:
        if tag in ("td", "th"):
            self.rows[-1][-1] = " ".join(self.rows[-1][-1].split())
        self._in_cell = self._in_cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self.lasttag != "style":
            self._text.append(data)
        if self._in_cell:
            self.rows[-1][-1] += data

    def row(self, head: str) -> dict[str, str]:
        """The first row that begins with `head`, by the heads of its table's columns."""
        for row in self.rows:
            if row and row[0] == head:
                columns = next(r for r in self.rows[: self.rows.index(row)][::-1] if r[0] in ("Hospital", "Stage"))
                return dict(zip(columns, row, strict=True))
        raise AssertionError(f"no row '{head}' among {[row[:1] for row in self.rows]}")


def site_facts(**counts: int) -> dict[str, Any]:
    """A site's facts as in run.json: every study has a note, half have labs, none a scan. `counts`: test classes."""
    studies = {"train": 20, "val": 4, "test": sum(counts.values()) or 20}
    halves = {split: count // 2 for split, count in studies.items()}
    labels = {
        "train": {"healthy": 15, "ill": 5},
        "val": {"healthy": 2, "ill": 2},
        "test": counts or {"healthy": 10, "ill": 10},
    }
    return {
        "studies": studies,
        "patients": studies,
        "modalities": {"note": studies, "labs": halves},
        "targets": {"disease": labels},
    }


def make_run(
    folder: Path,
    sites: Mapping[str, Any] | None = None,
    rounds: int = 3,
    federation: Federation | None = None,
    **facts: Any,
) -> Run:
    """A run of `rounds` of three rounds (two of training together, one of adaptation) at `sites`."""
    sites = {"north": site_facts(), "south": site_facts()} if sites is None else sites
    run = Run.create(folder, federation or tiny_federation())
    run.update(**({"status": "completed", "rounds": 3, "sites": sites, "finished": 2e9} | facts))
    for number in range(1, rounds + 1):
        stage, up = ("train", 4000) if number < 3 else ("adapt", 0)
        for index, site in enumerate(sites):
            line = {"round": number, "stage": stage, "site": site}
            run.record(**line, split="train", metric="loss", value=1 / number)
            figure = {**line, "task": "disease", "metric": "auroc", "n": 20}
            run.record(**figure, model="shared", split="val", value=0.5 + number / 10)
            if number == 3:
                run.record(**figure, model="shared", split="test", value=0.7 + index / 10, low=0.6, high=0.95)
                run.record(**figure, model="adapted", split="test", value=0.75 + index / 10, low=0.65, high=0.96)
        for metric, value in {"sites": len(sites), "bytes_down": 5000, "bytes_up": up, "seconds": 1.0}.items():
            run.record(round=number, stage=stage, site="federation", metric=metric, value=value)
    return run


def compare(run: Run, differences: Mapping[str, tuple[float | None, ...]], metric: str = "auroc", **site: Any) -> None:
    """A comparison in which each named site's adapted model differs from FedAvg by the given value, low and high."""

    def estimate(values: tuple[float | None, ...]) -> dict[str, float | None]:
        return dict(zip(("value", "low", "high"), values, strict=True))

    results = {"fedavg": estimate((0.8, 0.7, 0.9)), "adapted": estimate((0.812345, 0.71, 0.91))}
    rows = [
        {
            "site": name,
            "studies": 20,
            "patients": 20,
            "classes": {"healthy": 10, "ill": 10},
            "results": results,
            "differences": {"adapted - fedavg": estimate(values)},
        }
        | site
        for name, values in differences.items()
    ]
    task = {
        "task": "disease",
        "metric": metric,
        "sites": rows,
        "mean_of_sites": {"fedavg": 0.8, "adapted": 0.812},
        "worst_site": {"fedavg": 0.78, "adapted": None},
        "all_patients": {"fedavg": estimate((0.85, 0.8, 0.9))},
    }
    (run.directory / "comparison.json").write_text(json.dumps({"methods": list(results), "tasks": [task]}))


def page_of(run: Run) -> Page:
    return Page(write_report(run.directory))


def test_a_difference_is_marked_only_where_its_interval_excludes_zero(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    compare(run, INTERVALS)
    page = page_of(run)
    cells = {name: page.row(name)["Adapted minus FedAvg"] for name in INTERVALS}
    assert cells == {
        "above": "+0.030 [+0.010, +0.050] ▲ better",
        "across": "+0.020 [−0.010, +0.050] no clear difference",
        "below": "−0.040 [−0.080, −0.010] ▼ worse",
    }
    assert "better at one of three hospitals (above) and worse at one of three hospitals (below)" in page.text
    assert "at the other one there is no clear difference" in page.text


def test_a_lower_calibration_error_is_the_better_one(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    compare(run, INTERVALS, metric="ece")
    page = page_of(run)
    assert "▼ worse" in page.row("above")["Adapted minus FedAvg"]
    assert "▲ better" in page.row("below")["Adapted minus FedAvg"]
    assert "better at one of three hospitals (below)" in page.text


def test_the_summary_says_when_nothing_differs(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    compare(run, {"north": INTERVALS["across"], "south": INTERVALS["across"]})
    page = page_of(run)
    assert "no difference beyond what chance explains, at any of two hospitals" in page.text
    assert "the adapted model is" not in page.text


def test_the_table_shows_intervals_classes_and_summaries(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    compare(run, {"north": INTERVALS["above"], "south": INTERVALS["above"]})
    page = page_of(run)
    assert page.row("north")["FedAvg + adapted head"] == "0.812 [0.710, 0.910]"
    assert page.row("north")["Test patients"] == "20 10 healthy, 10 ill"
    assert page.row("north").keys().isdisjoint({"Local only", "Pooled data"})
    assert [row[1:3] for row in page.rows if row[0] == "Mean of hospitals"] == [["0.800", "0.812"]]
    assert [row[1:3] for row in page.rows if row[0] == "Worst at any hospital"] == [["0.780", "–"]]
    assert "FedAvg 0.850 [0.800, 0.900]" in page.text
    assert "rewards a model for telling hospitals apart" in page.text


def test_undefined_and_unmeasured_are_told_apart(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    nothing = {"value": None, "low": None, "high": None}
    compare(
        run,
        {"north": (None, None, None)},
        classes={"healthy": 3, "ill": 40},
        results={"fedavg": nothing, "local-only": nothing},
    )
    comparison = json.loads((run.directory / "comparison.json").read_text())
    measured = {"adapted": {"value": 0.9, "low": float("nan"), "high": 0.95}}
    comparison["tasks"][0]["sites"].append(comparison["tasks"][0]["sites"][0] | {"site": "south", "results": measured})
    (run.directory / "comparison.json").write_text(json.dumps(comparison))
    page = page_of(run)
    assert page.row("north") == {
        "Hospital": "north",
        "Test patients": "20 3 healthy, 40 ill",
        "Local only": "undefined (3 of class 'healthy')",
        "FedAvg": "undefined (3 of class 'healthy')",
        "FedAvg + adapted head": "not measured",
        "Adapted minus FedAvg": "undefined",
    }
    assert page.row("south")["FedAvg + adapted head"] == "0.900"
    assert "Whether the adapted model differs from the shared FedAvg model could not be determined" in page.text
    assert "AUROC is undefined at north" in page.text


def test_a_deployment_has_its_table_from_the_sites_last_test_figures(tmp_path: Path) -> None:
    run = make_run(
        tmp_path / "run", {"north": site_facts(), "south": site_facts(), "west": site_facts(healthy=2, ill=18)}
    )
    test = {"round": 3, "stage": "adapt", "task": "disease", "split": "test", "metric": "auroc", "n": 20}
    run.record(**test, site="north", model="adapted", value=0.9, low=0.8, high=0.95)
    for model in ("shared", "adapted"):
        run.record(**test, site="west", model=model, value=None, low=None, high=None)
    page = page_of(run)
    assert page.row("north") == {
        "Hospital": "north",
        "Test patients": "20 10 healthy, 10 ill",
        "FedAvg": "0.700 [0.600, 0.950]",
        "FedAvg + adapted head": "0.900 [0.800, 0.950]",
    }
    assert page.row("west")["FedAvg"] == "undefined (2 of class 'healthy')"
    assert [row[1:3] for row in page.rows if row[0] == "Mean of hospitals"] == [["0.750", "0.875"]]
    assert [row[1:3] for row in page.rows if row[0] == "Worst at any hospital"] == [["0.700", "0.850"]]
    assert "Whether these differ by more than chance is not known" in page.text
    assert "simulation" not in page.text


def test_figures_with_noise_are_called_so_unless_a_simulation_knows_the_exact_ones(tmp_path: Path) -> None:
    said = "Each hospital added noise to its figure"
    run = make_run(tmp_path / "run", federation=private_federation({"figures": "noised"}))
    assert said in page_of(run).text
    compare(run, {"north": (0.0, -0.1, 0.1)})
    assert said not in page_of(run).text
    assert said not in page_of(make_run(tmp_path / "other", federation=private_federation({"figures": "exact"}))).text


def test_the_opening_counts_hospitals_and_rounds_of_training_together(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run"))
    assert (
        "Two hospitals trained one model together over two rounds; no patient's record left either of them" in page.text
    )
    assert "adapted a part of the model" in page.text


@pytest.mark.parametrize(
    ("rounds", "facts", "said"),
    [
        (1, {"status": "running"}, "This run is not over: it is running, after 1 of 3 rounds"),
        (
            1,
            {"status": "failed", "cause": "the disk is full."},
            "This run failed after 1 of 3 rounds: the disk is full. What",
        ),
        (2, {"status": "interrupted"}, "This run was interrupted after 2 of 3 rounds."),
        (0, {"status": "starting", "sites": {}, "finished": None}, "No hospital has taken part in this run yet."),
        (0, {"status": "running"}, "for 0 of the two planned rounds"),
    ],
)
def test_a_partial_run_has_a_report_that_says_so(tmp_path: Path, rounds: int, facts: dict[str, Any], said: str) -> None:
    page = page_of(make_run(tmp_path / "run", rounds=rounds, **facts))
    assert said in page.text
    assert "There is no figure on test patients yet" in page.text
    assert "Afterwards each hospital adapted" not in page.text


def test_a_line_cut_off_by_a_crash_is_not_counted(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=2, status="running")
    with run.metrics.open("a") as file:
        file.write('{"round": 3, "stage": "adapt", "site": "federation", "met')
    assert "after 2 of 3 rounds" in page_of(run).text


def test_whatever_the_files_hold_is_text_and_never_markup(tmp_path: Path) -> None:
    hostile = site_facts() | {"targets": {"disease": {"test": {HOSTILE: 3}}}}
    blocks = [{"block": f"encoders.{HOSTILE}", "fate": HOSTILE, "parameters": 1, "bytes": 4}]
    run = make_run(
        tmp_path / "run",
        {HOSTILE: hostile, "a$b^$_{": site_facts()},
        status="failed",
        cause=HOSTILE,
        name=HOSTILE,
        engine=HOSTILE,
        seed=HOSTILE,
        versions={HOSTILE: HOSTILE},
        blocks=blocks,
    )
    run.tell(HOSTILE, level=HOSTILE, site=HOSTILE, round=HOSTILE)
    compare(run, {HOSTILE: (None, None, None), "a$b^$_{": INTERVALS["above"]}, classes={HOSTILE: 3})
    page = page_of(run)
    assert "script" not in {tag for tag, _ in page.tags}
    assert "<script" not in page.source
    assert page.row(HOSTILE)["Adapted minus FedAvg"] == "undefined"
    assert f"1 of 3 rounds: {HOSTILE}" not in page.text
    assert f"failed after 3 of 3 rounds: {HOSTILE}" in page.text
    assert page.source.count("&lt;script&gt;") > 10


def test_the_page_loads_nothing_and_its_identifiers_are_its_own(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    compare(run, {"north": INTERVALS["above"], "south": INTERVALS["below"]})
    page = page_of(run)
    assert not {tag for tag, _ in page.tags} & {"script", "link", "iframe", "object", "embed", "img", "image", "base"}
    for tag, attributes in page.tags:
        for name, value in attributes.items():
            if not name.startswith("xmlns"):
                assert "//" not in (value or ""), (tag, name, value)
            if name in ("src", "href", "xlink:href"):
                assert (value or "").startswith("#"), (tag, name, value)
    assert "@import" not in page.source
    assert {"http-equiv": "Content-Security-Policy", "content": "default-src 'none'; style-src 'unsafe-inline'"} in [
        attributes for tag, attributes in page.tags if tag == "meta"
    ]
    identifiers = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    assert len(identifiers) == len(set(identifiers)) > 0
    figures = sum(tag == "svg" for tag, _ in page.tags)
    described = [a for _, a in page.tags if a.get("role") == "img" and a.get("aria-label")]
    assert len(described) == figures == 3  # one of the methods, one of each site's training


def test_every_subset_of_modalities_that_was_measured_has_its_row(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    line = {"round": 3, "stage": "adapt", "task": "disease", "metric": "auroc", "split": "test", "n": 20}
    for site, shown, model, figure in (
        ("north", "note", "shared", 0.51),
        ("north", "note", "adapted", 0.6),
        ("south", "note", "adapted", 0.7),
        ("south", "scan+labs", "adapted", None),
        ("south", HOSTILE, "adapted", 0.1),
    ):
        run.record(**line, site=site, model=model, modalities=shown, value=figure, low=figure, high=figure)
    page = page_of(run)
    start = page.rows.index(["Shown", "north", "south", "Mean of hospitals"])
    assert page.rows[start + 1 : start + 4] == [
        ["scan + labs", "not measured", "undefined", "–"],
        ["note", "0.600 [0.600, 0.600]", "0.700 [0.700, 0.700]", "0.650"],
        [HOSTILE, "not measured", "0.100 [0.100, 0.100]", "0.100"],
    ]
    assert page.row("north")["FedAvg + adapted head"].startswith("0.750")  # of all modalities, as before
    assert not any(row[:1] == ["Shown"] for row in page_of(make_run(tmp_path / "none")).rows)


def test_every_metric_that_a_document_asks_for_has_its_row(tmp_path: Path) -> None:
    run = make_run(tmp_path)
    line = {"round": 3, "stage": "adapt", "task": "disease", "split": "test", "n": 20}
    for site, metric, model, figure in (
        ("south", "ece", "adapted", None),
        ("north", "auprc", "shared", 0.3),
        ("north", "auprc", "adapted", 0.4),
        ("south", "auprc", "shared", 0.6),
        ("north", HOSTILE, "adapted", 0.1),
    ):
        run.record(**line, site=site, metric=metric, model=model, value=figure, low=figure, high=figure)
    run.record(**line | {"split": "val"}, site="north", metric="f1", model="shared", value=0.9)
    run.record(**line, site="north", metric="auprc", model="adapted", modalities="note", value=0.2)
    page = page_of(run)
    start = page.rows.index(["Figure", "north", "south", "Mean of hospitals"])
    assert page.rows[start + 1 : start + 3] == [
        ["AUPRC", "0.400 [0.400, 0.400]", "0.600 [0.600, 0.600]", "0.500"],
        ["Calibration error", "not measured", "undefined", "–"],
    ]
    assert HOSTILE not in page.text
    assert not any(row[:1] == ["Figure"] for row in page_of(make_run(tmp_path / "none")).rows)


@pytest.mark.parametrize("head", HEADS)
def test_every_metric_of_every_head_is_told_in_words(head: str) -> None:
    assert set(described(HEADS, head).METRICS) <= METRICS.keys()  # type: ignore[attr-defined]


@pytest.mark.parametrize("adapted", [True, False])
def test_adaptation_is_spoken_of_only_where_there_is_any(tmp_path: Path, adapted: bool) -> None:
    federation = tiny_federation()
    if not adapted:
        federation = federation.model_copy(update={"stages": federation.stages[:1]})
    text = page_of(make_run(tmp_path, federation=federation)).text
    assert ("each hospital adapts on its own" in text) == adapted


def test_a_site_without_validation_shows_its_loss_alone(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", rounds=2)
    lines = [
        line for line in run.metrics.read_text().splitlines(keepends=True) if '"south"' not in line or '"loss"' in line
    ]
    run.metrics.write_text("".join(lines))
    labels = [attributes.get("aria-label") or "" for _, attributes in page_of(run).tags]
    assert "Curves by round of north: validation metric and training loss, from 1.000 to 0.500." in labels
    assert "Curves by round of south: training loss, from 1.000 to 0.500." in labels


def test_who_holds_what(tmp_path: Path) -> None:
    page = page_of(make_run(tmp_path / "run", rounds=0))
    assert page.row("north") == {"Hospital": "north", "scan": "not held", "note": "100 %", "labs": "50 %"}
    assert ["north", "20 (20)", "4 (4)", "20 (20)"] in page.rows
    assert ["north", "27 (61 %)", "17 (39 %)"] in page.rows


def test_what_left_each_hospital(tmp_path: Path) -> None:
    blocks = [
        {"block": block, "fate": fate, "parameters": 1500, "bytes": 6000}
        for block, fate in (
            ("encoders.scan", "shared"),
            ("encoders.note", "shared"),
            ("fusion", "shared"),
            ("heads.disease", "local"),
        )
    ]
    scanner = site_facts()
    scanner["modalities"]["scan"] = scanner["studies"]
    page = page_of(make_run(tmp_path / "run", {"north": scanner, "south": site_facts()}, blocks=blocks))
    assert (
        "8.0 kB went up from two hospitals to the coordinator and 15.0 kB came down: about 4.0 kB up for each"
        in page.text
    )
    assert page.row("train")["up a round"] == "4.0 kB"
    assert page.row("adapt")["up a round"] == "nothing"
    assert ["encoders.scan", "shared", "1,500", "6.0 kB", "north"] in page.rows
    assert ["heads.disease", "local", "1,500", "6.0 kB", "every hospital"] in page.rows
    assert ["north", "18.0 kB"] in page.rows
    assert ["south", "12.0 kB"] in page.rows


def test_warnings_come_before_the_rest(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    run.tell("an early warning", level="warning", site="south", round=1)
    run.tell("a late remark", site="north")
    text = page_of(run).text
    assert text.index("an early warning") < text.index("a late remark")
    assert "Warning · south · round 1" in text


def test_a_document_that_was_changed_afterwards_is_pointed_out(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    untouched = page_of(run)
    assert str(run.facts["federation"]) in untouched.text
    assert "no longer the document" not in untouched.text
    document = run.directory / "federation.yaml"
    document.write_text(document.read_text().replace("seed: 0", "seed: 1"))
    assert "no longer the document" in page_of(run).text


def test_twelve_sites_with_long_names_all_have_their_rows(tmp_path: Path) -> None:
    names = [f"university_hospital_of_the_northern_districts_{number}_cardiology_outpatients" for number in range(12)]
    run = make_run(tmp_path / "run", {name: site_facts() for name in names})
    compare(run, dict.fromkeys(names, INTERVALS["above"]))
    page = page_of(run)
    assert [page.row(name)["FedAvg"] for name in names] == ["0.800 [0.700, 0.900]"] * 12
    assert "and eight more" in page.text


def test_what_cannot_be_reported_is_said_in_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match=r"there is no run here \(run.json is missing\)"):
        write_report(tmp_path)
    run = make_run(tmp_path / "run")
    (run.directory / "comparison.json").write_text('{"tasks": [{}]}')
    with pytest.raises(MmfmError, match=r"comparison.json: is damaged"):
        write_report(run.directory)
    (run.directory / "comparison.json").unlink()
    run.metrics.write_text("{\n{}\n")
    with pytest.raises(MmfmError, match=r"metrics.jsonl: holds a line that is not JSON"):
        write_report(run.directory)


def test_importing_the_report_draws_in_neither_matplotlib_nor_torch() -> None:
    code = "import sys, server.report; sys.exit(', '.join({'matplotlib', 'torch'} & set(sys.modules)))"
    assert (
        subprocess.run([sys.executable, "-c", code], check=False, capture_output=True, text=True).stderr.strip() == ""
    )
