"""What a federation is compared with: each site alone, all data in one place, and the paired intervals between them."""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from sklearn.metrics import roc_auc_score
from tiny import MODALITIES, tiny_federation, write_sites

from client.predictions import path_of
from mmfm_core.config import Federation, Site
from mmfm_core.data.dataset import load_dataset
from mmfm_core.metrics.ranking import patient_resamples
from mmfm_core.metrics.statistic import draws
from mmfm_core.models.model import full_model
from mmfm_core.storage import read_tensors
from mmfm_core.training.evaluation import predict
from server import baselines, comparison
from server.comparison import compare
from server.engines import in_process, pooled
from server.record import Run, read_lines
from server.simulation import prepare

HELD = {"north": MODALITIES, "south": ("note", "labs")}


def declared_federation(**changes: Any) -> Federation:
    """The tiny federation, normalised the same everywhere."""
    model = tiny_federation().model.model_dump(mode="json")
    model["modalities"]["scan"]["normalize"] = {"mean": 0.5, "std": 0.2}
    model["modalities"]["labs"]["features"] = {
        "crp": {"normalize": {"mean": 7.0, "std": 4.0}},
        "age": {"normalize": {"mean": 55.0, "std": 20.0}},
    }
    stages = [
        {
            "name": "warm",
            "rounds": 2,
            "local_steps": 3,
            "batch_size": 8,
            "tasks": {"disease": {}},
            "train": ["fusion.*"],
        },
        {"name": "train", "rounds": 2, "local_steps": 4, "batch_size": 8, "tasks": {"disease": {}}},
        {"name": "adapt", "federated": False, "local_steps": 4, "tasks": {"disease": {}}, "train": ["heads.*"]},
    ]
    return tiny_federation(model=model, stages=stages, parameters={"local": ["fusion.*"]}, **changes)


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"), HELD)


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def predicted(run: Run, site: str, state: str) -> pd.DataFrame:
    return pd.read_csv(path_of(run.directory / "sites" / site, run.facts["federation"], "disease", state))


def test_a_site_alone_sends_nothing_and_starts_from_the_same_model(sites: dict[str, Site], tmp_path: Path) -> None:
    federation = declared_federation()
    run = prepare(tmp_path / "run", baselines.local_only(federation), sites)
    in_process.simulate(run.directory)

    lines = list(read_lines(run.metrics))
    assert {line["value"] for line in lines if line["metric"] == "bytes_up"} == {0}
    initial = full_model(federation.model, federation.seed).eval()
    for path in run.directory.glob("checkpoints/*/shared.safetensors"):
        for name, tensor in read_tensors(path).items():
            np.testing.assert_array_equal(tensor, initial.state_dict()[name].numpy())
    for name, site in sites.items():
        (untrained,) = predict(initial, load_dataset(site, federation.model), "test")
        written = predicted(run, name, "shared")
        np.testing.assert_allclose(written[["p0", "p1"]], untrained.table[["p0", "p1"]], atol=1e-6)
        trained = predicted(run, name, "adapted")
        assert np.abs(written["p1"] - trained["p1"]).max() > 1e-3
        states = [read_tensors(path) for path in run.directory.glob(f"sites/{name}/state/*/round-00002.safetensors")]
        assert {parameter.split(".")[0] for parameter in states[0]} == {"encoders", "fusion", "heads"}


def test_baselines_take_as_many_steps_as_the_federation() -> None:
    federation = declared_federation(aggregation={"min_sites": 3})
    alone, together = baselines.local_only(federation), baselines.pooled(federation, sites=5)
    assert [(s.name, s.federated, s.rounds, s.local_steps, s.train) for s in alone.stages] == [
        ("warm", False, 1, 6, ("fusion.*",)),
        ("train", False, 1, 8, ("*",)),
    ]
    assert [(s.name, s.federated, s.rounds, s.local_steps, s.train) for s in together.stages] == [
        ("warm", True, 2, 15, ("fusion.*",)),
        ("train", True, 2, 20, ("*",)),
    ]
    assert together.aggregation.min_sites == 1
    assert (together.parameters.shared, together.parameters.local) == (("*",), ())
    for document in (alone, together):
        assert document.model == federation.model
        assert document.seed == federation.seed
        Federation.model_validate(document.model_dump())  # documents that a person could have written


def test_pooled_is_one_site_that_holds_everything(sites: dict[str, Site], tmp_path: Path) -> None:
    document = baselines.pooled(declared_federation(), len(sites))
    run = prepare(tmp_path / "pooled", document, sites)
    pooled.simulate(run.directory)
    assert run.facts["status"] == "completed"

    union = prepare(tmp_path / "union", document, {"pooled": union_of(sites)})
    in_process.simulate(union.directory)
    (some, others) = (
        read_tensors(max(made.directory.glob("checkpoints/*/shared.safetensors"))) for made in (run, union)
    )
    assert some.keys() == others.keys()
    for name, tensor in some.items():
        np.testing.assert_array_equal(tensor, others[name], err_msg=name)

    everyone = predicted(union, "pooled", "shared").set_index("study")
    measured = [predicted(run, site, "shared") for site in sites]
    by_site = pd.concat(measured).set_index("study")
    assert sorted(by_site.index) == sorted(everyone.index)
    difference = by_site[["target", "p0", "p1"]] - everyone.loc[by_site.index, ["target", "p0", "p1"]]
    assert difference.abs().max(axis=None) < 1e-6


def union_of(sites: dict[str, Site]) -> Site:
    """One site with all rows, in which a site's rows are empty where it maps nothing."""
    frames = []
    for name, site in sites.items():
        frame = pd.read_csv(site.manifest, dtype=str, keep_default_na=False)
        frame["scan"] = [f"{name}/{cell}" if cell and "scan" in HELD[name] else "" for cell in frame["scan"]]
        frames.append(frame)
    manifest = sites["north"].manifest.parents[1] / "union.csv"
    pd.concat(frames).to_csv(manifest, index=False)
    return sites["north"].model_copy(update={"name": "pooled", "manifest": manifest})


METHODS = {
    "local-only": ("baselines/local-only", "adapted"),
    "fedavg": (".", "shared"),
    "adapted": (".", "adapted"),
    "pooled": ("baselines/pooled", "shared"),
}


def write_results(
    folder: Path, classes: tuple[str, ...], sites: dict[str, list[int]], methods: tuple[str, ...] = tuple(METHODS)
) -> dict[str, dict[str, pd.DataFrame]]:
    """A finished run's predictions by chance, some patients with two studies; site -> method -> table."""
    model = tiny_federation().model.model_dump(mode="json")
    model["heads"]["disease"]["classes"] = list(classes)
    runs = {
        place: Run.create(folder / place, tiny_federation(model=model))
        for place in sorted({place for place, _ in METHODS.values()})
    }
    rng = np.random.default_rng(0)
    tables: dict[str, dict[str, pd.DataFrame]] = {}
    for site, targets in sites.items():
        scores = np.eye(len(classes))[targets]
        for skill, method in enumerate(methods):
            raw = np.exp(0.5 * (skill + 1) * scores + rng.normal(0, 1, scores.shape))
            probabilities = (raw / raw.sum(1, keepdims=True)).round(2)  # ties too
            table = pd.DataFrame(
                {
                    "study": [f"s{row}" for row in range(len(targets))],
                    "patient": [f"0{row * 2 // 3}" for row in range(len(targets))],
                    "target": targets,
                }
                | {f"p{label}": column for label, column in enumerate(probabilities.T)}
            )
            place, state = METHODS[method]
            path = path_of(folder / place / "sites" / site, runs[place].facts["federation"], "disease", state)
            path.parent.mkdir(parents=True, exist_ok=True)
            table.to_csv(path, index=False)
            tables.setdefault(site, {})[method] = table
    return tables


def sklearn_aurocs(table: pd.DataFrame, weights: np.ndarray) -> np.ndarray:
    """scikit-learn's AUROC under each weighting of the studies."""
    columns = [column for column in table if column.startswith("p") and column != "patient"]
    scores = table[columns].to_numpy()
    labels = range(len(columns)) if len(columns) > 2 else [1]
    found = []
    for weight in weights:
        drawn = weight > 0
        target, chosen = table["target"].to_numpy()[drawn], scores[drawn]
        per_class = [
            roc_auc_score(target == label, chosen[:, label], sample_weight=weight[drawn])
            if len(set(target == label)) == 2
            else np.nan
            for label in labels
        ]
        found.append(np.mean(per_class))
    return np.array(found)


@pytest.mark.parametrize("classes", [("no", "yes"), ("none", "left", "right")])
def test_differences_are_paired_over_the_same_resamples_of_patients(
    classes: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    resamples = partial(patient_resamples, resamples=100)  # scikit-learn takes one at a time
    monkeypatch.setattr(comparison, "draws", partial(draws, resamples=100))
    rng = np.random.default_rng(1)
    targets = [*range(len(classes))] * 6 + rng.integers(0, len(classes), 18).tolist()
    tables = write_results(tmp_path, classes, {"north": targets})["north"]
    ((site,),) = [task["sites"] for task in compare(tmp_path)["tasks"]]

    weights = np.vstack([np.ones(len(targets)), resamples(tables["fedavg"]["patient"].tolist())])
    aurocs = {method: sklearn_aurocs(table, weights) for method, table in tables.items()}

    def interval(values: np.ndarray) -> dict[str, float]:
        low, high = np.nanquantile(values[1:], [0.025, 0.975])
        return {"value": pytest.approx(values[0]), "low": pytest.approx(low), "high": pytest.approx(high)}

    assert site["results"] == {method: interval(values) for method, values in aurocs.items()}
    assert site["differences"] == {
        f"adapted - {other}": interval(aurocs["adapted"] - aurocs[other]) for other in ("fedavg", "local-only")
    }
    assert site["studies"] == len(targets)
    assert site["patients"] == tables["fedavg"]["patient"].nunique()
    assert site["classes"] == {name: targets.count(label) for label, name in enumerate(classes)}


def test_without_adaptation_the_shared_model_is_compared_with_training_alone(tmp_path: Path) -> None:
    write_results(tmp_path, ("no", "yes"), {"north": [0, 1] * 12}, ("local-only", "fedavg"))
    ((site,),) = [task["sites"] for task in compare(tmp_path)["tasks"]]
    (pair,) = site["differences"]
    assert pair == "fedavg - local-only"
    found = site["differences"][pair]
    values = {method: result["value"] for method, result in site["results"].items()}
    assert found["value"] == pytest.approx(values["fedavg"] - values["local-only"])
    assert found["low"] < found["value"] < found["high"]


def test_resamples_draw_whole_patients_as_often_as_chance_does() -> None:
    patients = ["a", "b", "b", "c", "c", "c", "d"]
    weights = patient_resamples(patients, resamples=4000)
    table = pd.DataFrame(weights.T, index=patients)
    assert (table.groupby(level=0).nunique() == 1).all(axis=None)
    drawn = table.groupby(level=0).first()
    assert set(drawn.sum()) == {4.0}
    assert drawn.mean(axis=1).to_numpy() == pytest.approx(1, abs=0.05)
    assert drawn.var(axis=1).to_numpy() == pytest.approx(0.75, abs=0.06)  # binomial: 4 draws at 1/4


def test_averages_leave_out_where_it_is_undefined_and_namesakes_are_two_patients(tmp_path: Path) -> None:
    few = [0] * 16 + [1] * 4
    tables = write_results(tmp_path, ("no", "yes"), {"east": [0, 1] * 12, "few": few, "west": [1, 0, 0] * 7})
    (task,) = compare(tmp_path)["tasks"]
    sites = {site["site"]: site for site in task["sites"]}
    undefined = {"value": None, "low": None, "high": None}
    assert sites["few"]["results"] == dict.fromkeys(METHODS, undefined)
    assert set(map(str, sites["few"]["differences"].values())) == {str(undefined)}
    assert sites["few"]["classes"] == {"no": 16, "yes": 4}
    for method in METHODS:
        values = [roc_auc_score(tables[s][method]["target"], tables[s][method]["p1"]) for s in ("east", "west")]
        assert task["mean_of_sites"][method] == pytest.approx(np.mean(values))
        assert task["worst_site"][method] == pytest.approx(min(values))
        everyone = pd.concat([tables[site][method].assign(site=site) for site in tables])
        together = roc_auc_score(everyone["target"], everyone["p1"])
        assert task["all_patients"][method]["value"] == pytest.approx(together)
        identity = (everyone["site"] + everyone["patient"]).tolist()
        low, high = np.nanquantile(sklearn_aurocs(everyone, patient_resamples(identity)[:200]), [0.025, 0.975])
        assert task["all_patients"][method]["low"] == pytest.approx(low, abs=0.02)
        assert task["all_patients"][method]["high"] == pytest.approx(high, abs=0.02)


def test_only_what_was_run_is_compared(tmp_path: Path) -> None:
    write_results(tmp_path, ("no", "yes"), {"east": [0, 1] * 12}, methods=("fedavg",))
    result = compare(tmp_path)
    assert result["methods"] == ["fedavg"]
    assert result["tasks"][0]["sites"][0]["differences"] == {}


def test_where_no_site_has_test_patients_there_is_nothing_to_compare(tmp_path: Path) -> None:
    write_results(tmp_path, ("no", "yes"), {})
    (tmp_path / "sites" / "north").mkdir(parents=True)
    assert compare(tmp_path) == {"methods": [], "tasks": []}
