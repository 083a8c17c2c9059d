"""The findings a report states: sentences read by hand, and real reports against the codes their readers gave them."""

import os
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from sklearn.metrics import f1_score

from mmfm_core.text.findings import FINDINGS, label_findings

DATA = Path(os.environ.get("MMFM_DATA", Path(__file__).parents[2] / "shared/data")) / "iu_xray/manifest.csv"

SENTENCES = [
    # stated
    ("The heart is enlarged.", "cardiomegaly"),
    ("Borderline heart size.", "cardiomegaly"),
    ("Small left pleural effusion.", "effusion"),
    ("Patchy airspace disease in the right base.", "opacity"),
    ("Bibasilar atelectasis.", "atelectasis"),
    ("Calcified granuloma in the left upper lobe.", "nodule_mass"),
    ("Old healed rib fractures.", "fracture_bone"),
    ("The lungs are hyperexpanded.", "emphysema_copd"),
    ("Mild central vascular congestion.", "edema_congestion"),
    ("Degenerative changes of the thoracic spine.", "degenerative_spine"),
    ("Right PICC in the mid SVC.", "device"),
    ("Mild cardiomegaly and small bilateral effusions.", "cardiomegaly effusion"),
    # normal
    ("", ""),
    ("Heart size is normal. Lungs are clear.", ""),
    ("The heart is normal in size. The mediastinum is unremarkable.", ""),
    ("Heart size is within normal limits with prominent epicardial fat.", ""),
    ("Large pericardial effusion.", ""),
    # denied before, over a list and to the end of the sentence
    ("No effusion, pneumothorax or edema.", ""),
    ("Lungs are clear without focal consolidation, pleural effusion, or pneumothorax.", ""),
    ("Negative for pneumonia.", ""),
    ("The lungs are free of focal infiltrates.", ""),
    ("The lungs are clear of airspace disease.", ""),
    ("There is no evidence of acute fracture.", ""),
    ("No findings consistent with pneumonia.", ""),
    ("No definite pleural effusion seen.", ""),
    ("The heart is not enlarged.", ""),
    ("Interval resolution of the left effusion.", ""),
    ("Resolved edema.", ""),
    ("Interval removal of the right PICC.", ""),
    ("No 2.5 cm nodule.", ""),
    ("No effusion. Opacity in the left base.", "opacity"),
    ("1. No effusion. 2. Bibasilar atelectasis.", "atelectasis"),
    ("Cardiomegaly without edema.", "cardiomegaly"),
    # denied after, over a list and no further than its own statement
    ("Pleural effusion is not seen.", ""),
    ("Effusion and edema are absent.", ""),
    ("The right lower lobe opacity has resolved.", ""),
    ("Previously noted PICC line has been removed.", ""),
    ("Nodules or masses are not identified.", ""),
    ("The heart is enlarged and pleural effusion is not seen.", "cardiomegaly"),
    ("The heart is enlarged and the mediastinum is unremarkable.", "cardiomegaly"),
    ("The effusion has resolved, bibasilar atelectasis persists.", "atelectasis"),
    # the end of a denial
    ("No effusion but small opacity in the left base.", "opacity"),
    ("No edema, however the heart is enlarged.", "cardiomegaly"),
    ("No effusion, although atelectasis persists.", "atelectasis"),
    ("No acute disease except for an old rib fracture.", "fracture_bone"),
    ("No edema, there is a small nodule.", "nodule_mass"),
    # possible is stated
    ("Opacity which may represent atelectasis.", "atelectasis opacity"),
    ("Possible small effusion.", "effusion"),
    ("Cannot exclude pneumonia.", "opacity"),
    ("A subtle infiltrate cannot be excluded.", "opacity"),
    ("Blunting may represent effusion versus scarring.", "effusion"),
    # what sounds like a denial and what only supposes
    ("No change in the right effusion.", "effusion"),
    ("No significant interval change in cardiomegaly.", "cardiomegaly"),
    ("The effusion is not significantly changed, with atelectasis.", "atelectasis effusion"),
    ("If there is concern for fracture, consider dedicated views.", ""),
    ("Follow up to exclude an underlying mass.", ""),
]
ALONE = [sentence for sentence, findings in SENTENCES[:11]]


def stated(report: str) -> str:
    labels = label_findings(report)
    assert labels.pop("normal") != any(labels.values())
    assert list(labels) == list(FINDINGS)
    return " ".join(sorted(finding for finding, found in labels.items() if found))


@pytest.mark.parametrize(("sentence", "findings"), SENTENCES)
def test_what_a_sentence_states(sentence, findings):
    assert stated(sentence) == findings


@pytest.mark.parametrize("sentence", ALONE)
def test_a_denial_put_before_a_finding_flips_it(sentence):
    assert stated(sentence) != ""
    assert stated(f"No evidence of {sentence}") == ""
    assert stated(f"No evidence of {sentence} {sentence}") == stated(sentence)


@given(
    st.lists(st.sampled_from([sentence for sentence, _ in SENTENCES]), max_size=4),
    st.sampled_from(["\n", " \t ", "  "]),
)
def test_neither_case_nor_white_space_nor_the_order_of_sentences_matters(sentences, space):
    report = " ".join(sentences)
    expected = stated(report)
    assert expected == stated(report.upper()) == stated(report.replace(" ", space) + space)
    of_each = {finding for sentence in sentences for finding in stated(sentence).split()}
    assert expected.split() == sorted(of_each)


@given(st.text(max_size=200))
def test_any_text_has_labels(text):
    stated(text)


# F1 on the test patients was .97 .95 .94 .86 .94 .92 .98 .70 .78, and .97 for the spine once the codes of the thoracic
# vertebrae, which the column overlooks, count too. Rules were written on the training patients only.
FLOORS = {
    "cardiomegaly": 0.93,
    "effusion": 0.90,
    "opacity": 0.90,
    "atelectasis": 0.81,
    "nodule_mass": 0.89,
    "fracture_bone": 0.86,
    "emphysema_copd": 0.93,
    "edema_congestion": 0.62,
    "degenerative_spine": 0.92,
    "device": 0.72,
}


@pytest.mark.skipif(not DATA.is_file(), reason="the iu_xray reports are not here: set MMFM_DATA to the data folder")
def test_real_reports_state_what_their_codes_say():
    reports = pd.read_csv(DATA, keep_default_na=False).query("split == 'test'")
    found = pd.DataFrame([label_findings(report) for report in reports["report"]], index=reports.index)
    coded = pd.DataFrame({finding: reports[f"label_{finding}"].astype(int) == 1 for finding in FINDINGS})
    columns = pd.Series({finding: f1_score(coded[finding], found[finding]) for finding in FINDINGS})
    assert columns.mean() > 0.85
    coded["degenerative_spine"] |= reports["mesh"].str.contains("Vertebrae[^;]*/degenerative")
    scores = pd.Series({finding: f1_score(coded[finding], found[finding]) for finding in FINDINGS})
    assert (scores > pd.Series(FLOORS)).all(), scores
    assert f1_score(~coded.any(axis=1), found["normal"]) > 0.9
