"""Sites that a simulation cuts from one manifest must not share patients between training and testing."""

from collections.abc import Mapping
from itertools import combinations

from mmfm_core.config import Site
from mmfm_core.data.manifest import split_of_patients
from mmfm_core.errors import MmfmError


def check_apart(sites: Mapping[str, Site], where: str) -> None:
    """Check that no patient trains the model at one site and judges it at another.

    Only within one manifest and one column of patients: elsewhere the same identifier may be another person.

    Args:
        where: the sites' file, for the error.

    Raises:
        MmfmError: some patient does; or a manifest cannot be read, see `read_manifest`.
    """
    cut: dict[object, dict[str, Site]] = {}
    for name, site in sites.items():
        cut.setdefault((site.manifest, site.patient), {})[name] = site
    for together in cut.values():
        if len(together) < 2:
            continue
        splits = {name: split_of_patients(site) for name, site in together.items()}
        for (one, here), (other, there) in combinations(splits.items(), 2):
            both = sum((here[p] == "train") != (there[p] == "train") for p in here.keys() & there.keys())
            if both:
                raise MmfmError(
                    f"sites.{one}, sites.{other}: {both} of their patients train at one and are measured at the "
                    "other, so that the model would be tested on patients it has seen; give the sites shares that do "
                    "not overlap ('share', 'where' or 'site'), or the same 'split'",
                    where,
                )
