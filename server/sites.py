"""What sites say they hold: checked one by one when they say it, and together before anything trains."""

import math
import re
from collections.abc import Iterable, Iterator, Mapping

from mmfm_core.config import Federation
from mmfm_core.config.site import SPLITS
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import RoundReply, SiteDescription

FEDERATION = "federation"
"""Stands where a site's name does, for figures of all sites together."""


def check_description(site: SiteDescription, federation: Federation) -> None:
    """Check one site's description alone, so that the rest of the coordinator may rely on it.

    Raises:
        MmfmError: its name is none, it names what the document does not, or its counts are not whole.
    """
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9_-]*", site.site) or site.site == FEDERATION:
        raise MmfmError("its site has no usable name; give 'name' in the site's file letters, digits, '_' and '-'")
    model = federation.model
    if not (site.modalities.keys() <= model.modalities.keys() and site.targets.keys() <= model.heads.keys()) or (
        not site.tasks.keys() <= model.tasks.keys()
    ):
        raise MmfmError("it describes modalities or targets that the document does not have")
    by_split = [site.studies, site.patients, *site.modalities.values(), *site.tasks.values()]
    whole = all(counts.keys() == set(SPLITS) and min(counts.values()) >= 0 for counts in by_split)
    for head, splits in site.targets.items():
        labels = set(model.heads[head].labels)
        whole &= splits.keys() == set(SPLITS)
        whole &= all(counts.keys() == labels and min(counts.values()) >= 0 for counts in splits.values())
    if not whole:
        raise MmfmError("its description does not count the studies of every split and class")


def check_figures(reply: RoundReply, federation: Federation) -> None:
    """Check a reply's figures, which records and reports will show.

    Raises:
        MmfmError: they are of a head that the document does not have, or not finite.
    """
    if not {figure.task for figure in reply.metrics} <= federation.model.heads.keys():
        raise MmfmError("it measured a head that the document does not have")
    values = [reply.seconds, reply.loss, reply.epsilon, *(v for f in reply.metrics for v in (f.value, f.low, f.high))]
    if not all(value is None or math.isfinite(value) for value in values):
        raise MmfmError("its figures hold values that are not finite")


def check_sites(federation: Federation, sites: Iterable[SiteDescription]) -> None:
    """Check that the sites together can do what the document says.

    Raises:
        MmfmError: a modality that no site holds, a stage that fewer than `min_sites` can train, or a trained head for
            which the sites have no training label, or labels of one class only.
    """
    sites = list(sites)
    for name in federation.model.modalities:
        if not any(name in site.modalities for site in sites):
            raise MmfmError(f"model.modalities.{name}: no site holds it; map it in a site's file, or take it out")
    for index, stage in enumerate(federation.stages):
        idle = [s.site for s in sites if not any(s.tasks.get(task, {}).get("train") for task in stage.tasks)]
        needed = federation.aggregation.min_sites if stage.federated else 0
        if 0 < len(sites) - len(idle) < needed:
            raise MmfmError(
                f"stages.{index}: no training study for it at {', '.join(idle)}, which leaves fewer sites than "
                f"aggregation.min_sites, {needed}; map their targets and splits, or lower that"
            )
        for head in stage.tasks:
            if not any(site.tasks.get(head, {}).get("train") for site in sites):
                raise MmfmError(
                    f"stages.{index}.tasks.{head}: no site has a training label for it; map a column under "
                    "'targets' (or its modalities) in a site's file"
                )
            trained = {label for site in sites for label in _trained_classes(federation, site, head)}
            if len(trained) == 1:
                raise MmfmError(
                    f"stages.{index}.tasks.{head}: every training label of every site is '{trained.pop()}', which "
                    "leaves nothing to tell apart; check 'values' under 'targets' in the sites' files"
                )


def one_class_sites(federation: Federation, sites: Iterable[SiteDescription]) -> Iterator[tuple[str, str]]:
    """Each site whose training labels of a head are all of one class, and a sentence about it."""
    for site in sites:
        for head in federation.model.heads:
            trained = _trained_classes(federation, site, head)
            if len(trained) == 1:
                sentence = (
                    f"all its training labels of '{head}' are '{trained[0]}': alone it learns nothing from them, and "
                    "its adapted head may forget the other classes; if that is wrong, check 'values' under 'targets'"
                )
                yield site.site, sentence


def how_counts_are_told(counts: Mapping[str, int]) -> str | None:
    """A sentence on the sites (name -> their `min_count`) whose counts are not exact; None where all are."""
    sizes: dict[int, list[str]] = {}
    for site, size in counts.items():
        sizes.setdefault(size, []).append(site)
    coarse = [f"rounded up to multiples of {size} by {', '.join(sizes[size])}" for size in sorted(sizes) if size > 1]
    return f"Counts are {'; '.join(coarse)}." if coarse else None


def _trained_classes(federation: Federation, site: SiteDescription, head: str) -> list[str]:
    if head not in federation.model.heads or not federation.model.heads[head].EXCLUSIVE:
        return []
    return [label for label, count in site.targets.get(head, {}).get("train", {}).items() if count]
