"""What the sites hold together decides whether a federation can train at all."""

import pytest
from tiny import tiny_federation

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import SiteDescription
from server.sites import check_sites, one_class_sites

COUNTS = {"train": 9, "val": 3, "test": 3}


def site(name: str, healthy: int, ill: int, modalities: tuple[str, ...] = ("scan", "note", "labs")) -> SiteDescription:
    labels = {split: {"healthy": healthy, "ill": ill} for split in COUNTS}
    able = dict.fromkeys(COUNTS, healthy + ill)
    return SiteDescription(
        name, COUNTS, COUNTS, dict.fromkeys(modalities, COUNTS), {"disease": labels}, {"disease": able}, []
    )


def test_labels_of_one_class_at_every_site_are_an_error_that_names_the_field():
    with pytest.raises(MmfmError, match=r"stages\.0\.tasks\.disease: every training label of every site is 'ill'"):
        check_sites(tiny_federation(), [site("north", 0, 9), site("south", 0, 4)])


def test_labels_of_one_class_at_one_site_are_a_warning_about_that_site():
    sites = [site("north", 0, 9), site("south", 5, 4)]
    check_sites(tiny_federation(), sites)
    warned = dict(one_class_sites(tiny_federation(), sites))
    assert warned.keys() == {"north"}
    assert "'disease'" in warned["north"]


def test_a_modality_that_no_site_holds_and_a_head_without_labels_are_errors():
    with pytest.raises(MmfmError, match=r"model\.modalities\.scan: no site holds it"):
        check_sites(tiny_federation(), [site("north", 3, 9, ("note", "labs"))])
    with pytest.raises(MmfmError, match=r"stages\.0\.tasks\.disease: no site has a training label"):
        check_sites(tiny_federation(), [site("north", 0, 0)])
