"""The findings head: several labels per study, each of which may be missing."""

import csv
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from per_study import assert_gradients_separate
from sklearn.metrics import average_precision_score, f1_score, roc_auc_score
from test_models import STUDIES, random_batch, some_absent
from tiny import tiny_federation
from torch import Tensor

from mmfm_core.config import Federation, Site
from mmfm_core.data.dataset import Batch, Dataset, load_dataset
from mmfm_core.data.description import describe
from mmfm_core.errors import MmfmError
from mmfm_core.models.heads.findings import Findings
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.training.evaluation import measure, predict

FINDINGS = ("effusion", "nodule", "oedema")
NAN = math.nan
LABELS = torch.tensor([[1, 0, NAN], [NAN, NAN, NAN], [0, 0, 1], [NAN, 1, NAN], [1, 1, 1], [0, NAN, 0]])
CANARY = "CANARY-PHI-123"


def federation(findings: Any = FINDINGS) -> Federation:
    document = tiny_federation().model_dump(mode="json")
    document["model"]["heads"] = {"signs": {"type": "findings", "findings": list(findings)}}
    for stage in document["stages"]:
        stage["tasks"] = {"signs": {}}
    return Federation.model_validate(document)


def labelled(batch: Batch, labels: Tensor = LABELS) -> Batch:
    return Batch(batch.inputs, batch.present, {"signs": labels}, {"signs": labels.isfinite().any(1)})


def site(folder: Path, rows: list[dict[str, str]], mapping: Any) -> Site:
    manifest = folder / "manifest.csv"
    with manifest.open("w", newline="") as file:
        writer = csv.DictWriter(file, ["patient_id", "split", "note", *rows[0]])
        writer.writeheader()
        for index, row in enumerate(rows):
            writer.writerow({"patient_id": f"p{index}", "split": "train", "note": "fever", **row})
    return Site.model_validate(
        {"name": "north", "manifest": manifest, "modalities": {"note": "note"}, "targets": {"signs": mapping}}
    )


def loaded(folder: Path, rows: list[dict[str, str]], mapping: Any) -> Dataset:
    return load_dataset(site(folder, rows, mapping), federation().model)


def test_labels_are_read_per_column_and_what_a_site_lacks_is_unlabelled(tmp_path):
    rows = [
        {"label_effusion": "1.0", "nod": "no"},
        {"label_effusion": "-1", "nod": "yes"},
        {"label_effusion": "", "nod": ""},
        {"label_effusion": "0.0", "nod": "NA"},
    ]
    mapping = {
        "columns": {
            "nodule": {"column": "nod", "values": {"no": 0, "yes": 1}},
            "effusion": {"column": "label_effusion", "missing": [-1]},
        }
    }
    dataset = loaded(tmp_path, rows, mapping)
    expected = torch.tensor([[1, 0, NAN], [NAN, 1, NAN], [NAN, NAN, NAN], [0, NAN, NAN]])
    torch.testing.assert_close(dataset.everything.targets["signs"], expected, equal_nan=True)
    assert dataset.everything.usable["signs"].tolist() == [True, True, False, True]
    counted = describe("north", dataset.studies, federation().model)
    assert counted.targets["signs"]["train"] == {"effusion": 1, "nodule": 1, "oedema": 0}
    assert counted.tasks["signs"]["train"] == 3


@pytest.mark.parametrize(
    ("mapping", "sentence"),
    (
        ({"columns": {"effusion": "wrong"}}, r"row 3: column 'wrong' is neither 0 nor 1; rename .*'values'"),
        ({"columns": {"effusion": "two"}}, r"row 3: column 'two' is neither 0 nor 1"),
        ({"columns": {"efusion": "fine"}}, r"targets\.signs\.columns\.efusion: .*did you mean 'effusion'\?"),
        ({"columns": {"effusion": "fin"}}, r"no column 'fin' \(named by 'targets\.signs\.columns\.effusion'"),
        ("fine", r"targets\.signs: findings are mapped by 'columns: \{FINDING: COLUMN, \.\.\.\}'"),
    ),
)
def test_what_is_no_label_is_an_error_that_names_its_place_and_not_its_value(tmp_path, mapping, sentence):
    rows = [{"fine": "0", "wrong": "1", "two": "0"}, {"fine": "1", "wrong": CANARY, "two": "2"}]
    with pytest.raises(MmfmError, match=sentence) as raised:
        loaded(tmp_path, rows, mapping)
    assert CANARY not in str(raised.value)


@pytest.mark.parametrize(
    ("findings", "sentence"), (([], "at least 1"), (["nodule", "nodule"], "'nodule' is named twice"))
)
def test_findings_are_named_once_each(findings, sentence):
    with pytest.raises(ValueError, match=sentence):
        federation(findings)


def test_a_prior_is_what_the_untrained_head_gives_every_study_and_finding():
    document = federation().model_dump(mode="json")
    document["model"]["heads"]["signs"]["prior"] = 0.1
    model = full_model(Federation.model_validate(document).model, seed=0).eval()
    assert model(some_absent(), ["signs"])["signs"].sigmoid().detach().numpy() == pytest.approx(0.1)


def test_the_loss_is_the_mean_over_a_studys_own_labels():
    model = full_model(federation().model, seed=0).eval()
    batch = labelled(random_batch())
    logits = model(batch, ["signs"])["signs"]
    losses = model.losses(batch, ["signs"])["signs"]
    for row in range(STUDIES):
        terms = []
        for logit, label in zip(logits[row].tolist(), LABELS[row].tolist(), strict=True):
            if not math.isnan(label):
                probability = 1 / (1 + math.exp(-logit))
                terms.append(-math.log(probability if label == 1 else 1 - probability))
        assert losses[row].item() == pytest.approx(sum(terms) / len(terms) if terms else 0.0, abs=1e-6)


def test_an_unlabelled_finding_teaches_nothing():
    model = full_model(federation().model, seed=0).eval()
    never_oedema = LABELS.clone()
    never_oedema[:, 2] = NAN
    model.losses(labelled(random_batch(), never_oedema), ["signs"])["signs"].sum().backward()
    gradient = model.heads["signs"].linear.weight.grad
    assert gradient.isfinite().all()
    assert gradient.any(1).tolist() == [True, True, False]


def test_hooks_see_the_gradient_of_every_study():
    model = full_model(federation().model, seed=0)
    model.fusion.modality_dropout = 0.0
    batch = labelled(some_absent())
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["signs"])["signs"], STUDIES)


def test_predictions_are_a_label_and_a_probability_of_each_finding():
    model = full_model(federation().model, seed=0).eval()
    batch = labelled(random_batch())
    columns = pd.DataFrame(model.heads["signs"].predict(Encoding(model, batch)))
    logits = model(batch, ["signs"])["signs"].detach().numpy()
    assert set(columns) == {f"{c}_{finding}" for c in "yp" for finding in FINDINGS}
    for index, finding in enumerate(FINDINGS):
        np.testing.assert_array_equal(columns[f"y_{finding}"], LABELS[:, index].numpy())
        np.testing.assert_allclose(columns[f"p_{finding}"], 1 / (1 + np.exp(-logits[:, index])), rtol=1e-5)


def test_metrics_are_scikit_learns_mean_over_findings_with_enough_labels():
    head = Findings(type="findings", findings=FINDINGS)
    rng = np.random.default_rng(0)
    table = pd.DataFrame({"patient": [str(n) for n in range(60)]})
    for finding in FINDINGS:
        table[f"y_{finding}"] = rng.integers(0, 2, 60).astype(float)
        table[f"p_{finding}"] = (0.3 * table[f"y_{finding}"] + rng.random(60)) / 1.3
    table.loc[::3, "y_nodule"] = NAN
    table["y_oedema"] = [1.0] * 2 + [0.0] * 58
    pairs = [
        (table.loc[known, f"y_{f}"], table.loc[known, f"p_{f}"])
        for f in FINDINGS[:2]  # two positives are too few
        for known in [table[f"y_{f}"].notna()]
    ]
    expected = {
        "auroc": np.mean([roc_auc_score(y, p) for y, p in pairs]),
        "auprc": np.mean([average_precision_score(y, p) for y, p in pairs]),
        "f1": np.mean([f1_score(y, p > 0.5) for y, p in pairs]),
    }
    for metric, value in expected.items():
        assert measure(head, [metric], table)[metric][0] == pytest.approx(value), metric
    found = measure(head, head.METRICS, table)
    assert all(low < value < high for value, low, high in found.values())
    assert 0 < found["ece"][0] < 1
    assert head.counts(table) == {f: int(np.nansum(table[f"y_{f}"])) for f in FINDINGS}
    assert measure(head, ["auroc"], table.head(4)) == {"auroc": (None, None, None)}


def test_a_site_is_judged_on_its_labelled_studies(tmp_path):
    rows = [{"fluid": "" if n % 4 == 0 else str(n % 2)} for n in range(8)]
    dataset = loaded(tmp_path, rows, {"columns": {"effusion": "fluid"}})
    model = MultimodalModel(federation().model, ["note"], ["signs"], seed=0)
    (predictions,) = predict(model, dataset, "train")
    assert predictions.table["y_effusion"].tolist() == [1, 0, 1, 1, 0, 1]
    assert predictions.table["y_nodule"].isna().all()
