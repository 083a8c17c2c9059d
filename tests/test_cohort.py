"""Which rows of a manifest a site uses: `where`, `share` and `labelled`."""

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from tiny import tiny_federation

from mmfm_core.config import Site
from mmfm_core.data.manifest import Study, read_manifest
from mmfm_core.errors import MmfmError

PATIENTS = 400


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("cohort") / "m.csv"
    rows = [
        f"p{patient},{visit},{'train' if patient % 4 else 'test'},{'MR' if patient % 3 else 'CT'},a note,ill"
        for patient in range(PATIENTS)
        for visit in range(2)
    ]
    path.write_text("patient_id,visit,split,scanner,note,disease\n" + "\n".join(rows) + "\n")
    return path


def studies(manifest: Path, **keys: Any) -> list[Study]:
    site = {"name": "north", "manifest": manifest, "modalities": {"note": "note"}, "targets": {"disease": "disease"}}
    return read_manifest(Site.model_validate(site | keys), tiny_federation().model)


def patients(found: list[Study]) -> set[str]:
    return {study.patient for study in found}


def test_only_rows_with_the_wanted_values_are_used(manifest: Path) -> None:
    assert patients(studies(manifest, where={"scanner": ["CT"]})) == {f"p{n}" for n in range(0, PATIENTS, 3)}
    assert len(studies(manifest, where={"scanner": ["CT", "MR"], "visit": [1]})) == PATIENTS


def test_shares_cut_a_manifest_into_sites_without_a_patient_in_two_of_them(manifest: Path) -> None:
    ends = (0, 0.1, 0.4, 1)
    parts = [studies(manifest, share=pair) for pair in pairwise(ends)]
    assert sum(len(part) for part in parts) == 2 * PATIENTS
    assert set.union(*map(patients, parts)) == patients(studies(manifest))
    sizes = [len(patients(part)) for part in parts]
    assert sum(sizes) == PATIENTS  # no patient in two of them
    assert [size / PATIENTS for size in sizes] == pytest.approx([0.1, 0.3, 0.6], abs=0.07)


def test_a_share_says_nothing_about_the_split(manifest: Path) -> None:
    """Both are hashes of the patient; were they the same one, a site would have only patients of one split."""
    found = studies(manifest, share=(0, 0.5), split={"train": 0.5, "val": 0.0, "test": 0.5})
    tested = len({study.patient for study in found if study.split == "test"}) / len(patients(found))
    assert tested == pytest.approx(0.5, abs=0.12)


def test_scarce_labels_are_withheld_from_training_patients_alone(manifest: Path) -> None:
    few = studies(manifest, labelled=0.1)
    assert len(few) == 2 * PATIENTS  # the studies stay, for objectives that need no label
    labelled = {study.patient for study in few if study.split == "train" and study.targets}
    assert len(labelled) / (PATIENTS * 3 / 4) == pytest.approx(0.1, abs=0.06)
    assert all(study.targets for study in few if study.split == "test")
    more = {study.patient for study in studies(manifest, labelled=0.5) if study.split == "train" and study.targets}
    assert labelled < more  # a larger share holds the smaller one


@pytest.mark.parametrize(
    ("keys", "said"),
    [
        ({"where": {"scaner": ["CT"]}}, r"no column 'scaner' \(named by 'where.scaner'.*did you mean 'scanner'"),
        ({"where": {"scanner": ["PET"]}}, "site 'north' is empty: .*none that 'where' and 'share' leave"),
    ],
)
def test_what_leaves_no_row_is_said(manifest: Path, keys: dict[str, Any], said: str) -> None:
    with pytest.raises(MmfmError, match=said):
        studies(manifest, **keys)


@pytest.mark.parametrize("share", [(0.5, 0.5), (0.6, 0.2), (-0.1, 0.5), (0, 1.1)])
def test_a_share_is_two_points_in_order(manifest: Path, share: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="two points"):
        studies(manifest, share=share)
