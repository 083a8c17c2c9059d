"""`mmfm compare`: what methods change in a document, and figures against brute force on tables we wrote ourselves."""

import json
import re
import subprocess
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from command_line import MMFM, PATIENCE, Documents, write_documents
from rich.console import Console
from sklearn.metrics import roc_auc_score
from tiny import prepare_run, tiny_federation, write_sites

from mmfm_core.artifacts import sha256_of
from mmfm_core.config.loading import dump
from mmfm_core.errors import MmfmError
from server import verdict
from server.compare import compare
from server.evidence import Cost, Evidence, Figure, evidence, of_leading
from server.methods import METHODS, REFERENCE, Method, apply

FEDERATION = tiny_federation()
HEAD = FEDERATION.model.heads["disease"]
SIZES = {"north": 60, "south": 90}

Tables = dict[str, dict[str, list[pd.DataFrame]]]


def predictions(rng: np.random.Generator, size: int, signal: float) -> pd.DataFrame:
    ill = rng.random(size) < 0.5
    score = 1 / (1 + np.exp(-(signal * (ill - 0.5) + rng.normal(0, 1, size))))
    patients = [f"p{i // 2}" for i in range(size)]
    columns = {"study": [f"s{i}" for i in range(size)], "patient": patients}
    return pd.DataFrame(columns | {"target": ill.astype(int), "p0": 1 - score, "p1": score})


def of_signals(signals: dict[str, float], seeds: int = 2) -> Tables:
    """The same patients for every method, whose scores tell more the larger their signal."""
    return {
        method: {
            site: [predictions(np.random.default_rng([seed, size]), size, signal) for seed in range(seeds)]
            for site, size in SIZES.items()
        }
        for method, signal in signals.items()
    }


def by_sklearn(tables: list[pd.DataFrame]) -> float:
    return float(np.mean([roc_auc_score(table["target"], table["p1"]) for table in tables]))


def test_figures_are_means_over_seeds_of_sklearns() -> None:
    tables = of_signals({REFERENCE: 2.0, "fedper": 1.0})
    found = evidence(HEAD, "disease", "auroc", tables)
    for method, by_site in tables.items():
        each = {site: by_sklearn(seeds) for site, seeds in by_site.items()}
        for site, value in each.items():
            assert found.site(method, site).value == pytest.approx(value)
        assert found.mean_of_sites(method)[0] == pytest.approx(np.mean(list(each.values())))
        by_patients = np.average(list(each.values()), weights=[30, 45])
        assert found.mean_of_patients(method)[0] == pytest.approx(by_patients)
        assert found.worst_site(method) == (min(each, key=lambda s: each[s]), pytest.approx(min(each.values())))


def test_what_is_better_worse_or_neither_is_said_so() -> None:
    signals = {REFERENCE: 1.5, "fedavg": 1.5, "fedper": 6.0, "local-only": 0.0, "local-fusion": 1.5}
    tables = of_signals(signals)
    for site, size in SIZES.items():  # as good, but by other luck
        tables["local-fusion"][site] = [predictions(np.random.default_rng(9), size, 1.5)] * 2
    told = " ".join(verdict.sentences(evidence(HEAD, "disease", "auroc", tables)))
    assert "better than FedAvg + adaptation beyond noise: FedPer (+" in told
    assert "worse than FedAvg + adaptation beyond noise: each site alone (-" in told
    assert "No difference beyond noise in the mean of sites: FedAvg, local fusion." in told
    assert "Choice: FedPer" in told
    assert "Against each site alone, FedAvg + adaptation is at no site below it beyond noise." in told


def test_a_site_below_training_alone_is_named() -> None:
    tables = of_signals({REFERENCE: 1.0, "local-only": 1.0})
    tables["local-only"]["south"] = of_signals({"x": 8.0})["x"]["south"]
    told = " ".join(verdict.sentences(evidence(HEAD, "disease", "auroc", tables)))
    assert "Against each site alone, FedAvg + adaptation is below it at south beyond noise." in told


def test_a_site_where_the_figure_is_undefined_is_named_and_left_out_of_means() -> None:
    tables = of_signals({REFERENCE: 1.5, "fedavg": 1.0})
    for by_site in tables.values():
        by_site["north"] = [table.assign(target=1) for table in by_site["north"]]
    found = evidence(HEAD, "disease", "auroc", tables)
    assert found.defined == ["south"]
    assert found.mean_of_sites(REFERENCE)[0] == found.site(REFERENCE, "south").value
    assert verdict.sentences(found)[0] == "auroc is undefined at north, which no mean counts."
    assert json.dumps(verdict.numbers(found, dict.fromkeys(tables, Cost(1.0, 2.0))), allow_nan=False)


def test_where_no_site_has_patients_enough_the_next_figure_is_compared_and_it_is_said() -> None:
    tables = of_signals({REFERENCE: 1.5, "fedavg": 1.0})
    assert of_leading(HEAD, "disease", ["auroc", "accuracy"], tables).metric == "auroc"
    for by_site in tables.values():
        for site, each in by_site.items():
            by_site[site] = [table.assign(target=1) for table in each]
    found = of_leading(HEAD, "disease", ["auroc", "ece", "auprc", "accuracy"], tables)
    assert (found.metric, found.defined) == ("accuracy", ["north", "south"])
    assert verdict.sentences(found)[0] == "auroc is undefined at every site, so accuracy is compared."
    assert of_leading(HEAD, "disease", ["auroc", "auprc"], tables).metric == "auroc"


def of_one_patient(tables: Tables, *sites: str) -> Tables:
    for by_site in tables.values():
        by_site |= {site: [table.assign(patient="only") for table in by_site[site]] for site in sites}
    return tables


def test_a_site_with_one_test_patient_has_no_interval_and_the_mean_says_so() -> None:
    tables = of_one_patient(of_signals({REFERENCE: 1.0, "local-only": 8.0}), "south")
    found = evidence(HEAD, "disease", "accuracy", tables)
    assert np.isnan([found.site(REFERENCE, "south").low, found.site(REFERENCE, "south", "local-only").high]).all()
    assert verdict.difference(found, "local-only").low > 0
    told = verdict.sentences(found)
    assert told[0] == "One test patient varies in no draw: with south intervals of the mean are too narrow."
    assert "Against each site alone, FedAvg + adaptation is below it at north beyond noise." in told


def test_where_no_site_has_two_test_patients_nothing_is_said_about_noise() -> None:
    signals = {REFERENCE: 0.0, "fedper": 3.0}
    found = evidence(HEAD, "disease", "f1", of_one_patient(of_signals(signals), "north", "south"))
    assert verdict.sentences(found) == ["f1 has no interval here, so nothing is said about what differs beyond noise."]
    assert "nan" not in verdict.markdown_table(found, dict.fromkeys(signals, Cost(1.0, 2.0)))


def test_an_interval_covers_what_patients_drawn_again_would_show() -> None:
    """The share of intervals that hold the true difference of 0, of two methods that are noise, is 95 %."""
    covered = []
    for seed in range(120):
        rng = np.random.default_rng(seed)
        tables = {m: {"north": [predictions(np.random.default_rng([seed, 1]), 80, 1.0)]} for m in (REFERENCE, "fedper")}
        tables["fedper"]["north"][0]["p1"] = rng.permutation(tables[REFERENCE]["north"][0]["p1"])
        tables[REFERENCE]["north"][0]["p1"] = rng.permutation(tables[REFERENCE]["north"][0]["p1"])
        difference = verdict.difference(evidence(HEAD, "disease", "auroc", tables), "fedper")
        covered.append(difference.low <= 0 <= difference.high)
    assert 0.88 < np.mean(covered) <= 1.0


@pytest.mark.parametrize("name", [name for name in METHODS if name not in ("fedbn", "dual-lora")])
def test_a_method_changes_what_it_says_and_nothing_else(name: str) -> None:
    content = FEDERATION.model_dump(mode="json")
    content["parameters"]["local"], content["stages"][0]["proximal"] = ["fusion.*"], 0.5
    changed = apply(name, type(FEDERATION).model_validate(content), sites=2)
    assert changed.model == FEDERATION.model or name == "dual-lora"
    assert changed.seed == FEDERATION.seed
    lines = METHODS[name].lines
    assert changed.parameters.local == tuple(lines.get("parameters", {}).get("local", ()))
    assert changed.stages[0].proximal == lines.get("stages", {}).get("proximal", 0)
    assert any(not stage.federated for stage in changed.stages) == (name in (REFERENCE, "local-only"))
    if name not in ("local-only", "pooled"):
        assert changed.stages[0].rounds == FEDERATION.stages[0].rounds


def test_the_plot_and_both_tables_show_every_method() -> None:
    found = evidence(HEAD, "disease", "auroc", of_signals({REFERENCE: 2.0, "fedper": 1.0, "ditto": 2.0}))
    costs = dict.fromkeys(found.draws, Cost(1.5, 20.0))
    svg, page = verdict.plot([found]), verdict.markdown_table(found, costs)
    for method in ("fedper", "ditto"):
        assert METHODS[method].title in svg
        assert METHODS[method].title in page
    assert "| 1.5 | 20.0 |" in page


def test_the_interval_of_no_draws_is_undefined() -> None:
    figure = Figure.of(np.array([0.5, np.nan, np.nan]))
    assert figure.value == 0.5
    assert np.isnan([figure.low, figure.high]).all()
    nothing = Evidence("disease", "auroc", {"north": 3}, {REFERENCE: {"north": np.array([np.nan, np.nan])}}, {})
    assert verdict.sentences(nothing) == ["auroc is undefined at north, which no mean counts."]


@pytest.fixture
def documents(tmp_path: Path) -> Documents:
    """A federation that ends with its rounds, and its sites."""
    content = tiny_federation(stages=[FEDERATION.stages[0].model_dump(mode="json")]).model_dump(mode="json")
    sites = {name: yaml.safe_load(dump(site)) for name, site in write_sites(tmp_path / "data").items()}
    for site in sites.values():
        del site["name"]
    return write_documents(tmp_path / "documents", content, {"sites": sites})


@pytest.mark.slow
def test_the_command_runs_what_is_missing_and_keeps_what_is_there(documents: Documents, tmp_path: Path) -> None:
    place = tmp_path / "out"
    methods = ["fedavg", "ditto", "scaffold", "local-only"]
    command = [str(MMFM), "compare", str(documents.federation), "--methods", ",".join(methods), "--seeds", "1"]
    command += ["--run", str(place)]
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    (told,) = json.loads((place / "compare.json").read_text())
    assert list(told["methods"]) == [REFERENCE, *methods]
    scaffold, fedavg = (told["methods"][method]["megabytes"] for method in ("scaffold", "fedavg"))
    assert 1.3 * fedavg < scaffold < 2 * fedavg  # control variates double a round that trains, and no other
    assert told["methods"]["local-only"]["megabytes"] == 0
    written = {"compare.md", "compare.json", "compare.svg"}
    assert {path.name for path in place.iterdir() if path.name[0] != "."} == {REFERENCE, *methods[1:], *written}
    times = {path: path.stat().st_mtime_ns for path in place.rglob("metrics.jsonl")}
    subprocess.run(command, check=True, capture_output=True, timeout=PATIENCE)
    assert {path: path.stat().st_mtime_ns for path in place.rglob("metrics.jsonl")} == times
    assert json.loads((place / "compare.json").read_text()) == [told]


@pytest.mark.parametrize(
    ("method", "said"),
    [
        ("fedpro", "there is no 'fedpro'; did you mean 'fedprox'"),
        (
            "fedbn",
            "'fedbn' does not fit this document: parameters.local: the pattern 'batchnorm.*' matches no parameter",
        ),
        ("fedrep", "'fedrep' does not fit this document"),
    ],
)
def test_a_method_that_cannot_be_is_refused_before_anything_runs(
    documents: Documents, monkeypatch: pytest.MonkeyPatch, method: str, said: str
) -> None:
    monkeypatch.setitem(METHODS, "fedbn", Method("FedBN", {"parameters": {"local": ["batchnorm.*"]}}))
    monkeypatch.setitem(METHODS, "fedrep", Method("FedRep", {"stages": {"local_first": 2}}))
    place = documents.federation.parent / "out"
    with pytest.raises(MmfmError, match=re.escape(said)):
        compare(documents.federation, documents.sites, [method], 1, place, Console(quiet=True))
    assert not place.exists()


def test_runs_of_another_document_are_not_mixed_in(documents: Documents, tmp_path: Path) -> None:
    place = tmp_path / "out"
    prepare_run(place / REFERENCE / "seed-0", FEDERATION, write_sites(tmp_path / "others"))
    with pytest.raises(MmfmError, match="made with another document"):
        compare(documents.federation, documents.sites, ["fedavg"], 1, place, Console(quiet=True))


@pytest.mark.slow
def test_files_that_a_document_pins_reach_the_runs_of_every_method_and_of_both_bounds(documents: Documents) -> None:
    words = documents.federation.with_name("words.txt")
    words.write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "ill", "well"]))
    content = yaml.safe_load(documents.federation.read_text())
    content["model"]["tokenizer"] = {
        "type": "wordpiece",
        "vocabulary": {"path": words.name, "sha256": sha256_of(words)},
    }
    documents.federation.write_text(yaml.safe_dump(content))
    place = documents.federation.parent / "out"
    command = [str(MMFM), "compare", str(documents.federation), "--methods", "local-only,pooled", "--seeds", "1"]
    subprocess.run([*command, "--run", str(place)], check=True, capture_output=True, timeout=PATIENCE)
    (told,) = json.loads((place / "compare.json").read_text())
    assert list(told["methods"]) == [REFERENCE, "local-only", "pooled"]
