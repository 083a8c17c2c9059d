"""The generated hospitals: always the same, different from each other, and with a label that needs two modalities."""

from pathlib import Path

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

from mmfm_core.config import Site, load_federation, load_sites
from mmfm_core.data.dataset import load_dataset
from mmfm_core.data.demo import cases, generate
from mmfm_core.data.demo_hospitals import HOSPITALS

FEDERATIONS = Path(__file__).parent.parent / "deploy" / "federations"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    generate(folder)
    return folder


@pytest.fixture
def sites(folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Site]:
    monkeypatch.setenv("MMFM_DEMO", str(folder))
    return load_sites(FEDERATIONS / "demo.sites.yaml")


def test_the_same_seed_gives_the_same_bytes_and_another_seed_others(folder: Path, tmp_path: Path) -> None:
    generate(tmp_path / "again")
    first = {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
    again = tmp_path / "again"
    assert first == {path.relative_to(again): path.read_bytes() for path in sorted(again.rglob("*")) if path.is_file()}
    generate(tmp_path / "other", seed=1)
    name = HOSPITALS[0].name
    assert (tmp_path / "other" / name / "manifest.csv").read_bytes() != first[Path(name) / "manifest.csv"]


def test_every_hospital_loads_as_the_documents_say(sites: dict[str, Site]) -> None:
    model = load_federation(FEDERATIONS / "demo.yaml").model
    held = {name: load_dataset(site, model).everything.present for name, site in sites.items()}
    assert set(held) == {hospital.name for hospital in HOSPITALS}
    assert [name for name, present in held.items() if "note" not in present] == ["university"]
    assert [name for name, present in held.items() if "labs" not in present] == ["outpatient"]
    for present in held.values():
        assert 0.8 < present["film"].float().mean() < 1  # some cells are empty everywhere


def test_no_patient_is_in_two_splits_and_some_have_several_studies() -> None:
    for hospital in HOSPITALS:
        splits: dict[str, set[str]] = {}
        drawn = cases(hospital)
        for case in drawn:
            splits.setdefault(case.patient, set()).add(case.split)
        assert all(len(found) == 1 for found in splits.values())
        assert len(splits) < len(drawn)


def test_the_label_needs_both_what_the_film_shows_and_what_the_other_modalities_tell() -> None:
    """With the very factors known, one of them is clearly worse than both: no single modality can replace fusion."""
    gains = []
    for hospital in HOSPITALS:
        drawn = cases(hospital)
        label = [case.pneumonia for case in drawn]
        both = [hospital.pneumonia[case.opacity][case.infection] for case in drawn]
        alone = [[case.opacity for case in drawn], [case.infection for case in drawn]]
        gains.append(roc_auc_score(label, both) - max(roc_auc_score(label, factor) for factor in alone))
    assert min(gains) > 0.03  # the least where nearly everyone is inflamed, and the film decides most
    assert np.mean(gains) > 0.06


def test_the_same_findings_mean_different_things_at_different_hospitals() -> None:
    opacity_alone = [hospital.pneumonia[True][False] for hospital in HOSPITALS]
    infection_alone = [hospital.pneumonia[False][True] for hospital in HOSPITALS]
    assert max(opacity_alone) - min(opacity_alone) > 0.3
    assert max(infection_alone) - min(infection_alone) > 0.3
