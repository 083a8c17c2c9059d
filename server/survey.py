"""`mmfm survey`: what sites hold and where they differ, asked before a round is spent."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table
from scipy.stats import chi2_contingency

from client.gates import described
from mmfm_core.config import Federation, Site
from mmfm_core.config.site import SPLITS
from mmfm_core.data.description import describe
from mmfm_core.data.manifest import read_manifest
from mmfm_core.protocol import SiteDescription
from mmfm_core.storage import write_json
from server.simulation import load_documents
from server.sites import how_counts_are_told, one_class_sites

FEWEST_TO_ADAPT = 2
"""Validation patients below which a site stays at the shared state, as `client.adaptation` says."""


@dataclass(frozen=True)
class Difference:
    """How unlike sites are in one thing, and whether chance explains it.

    Attributes:
        what: 'modality scan', or 'disease' and 'findings: edema' for labels.
        shares: site -> the share of its studies (where labels are exclusive: of the one whose share varies most).
        of: the label that the shares are of; empty for a modality.
        effect: Cramér's V of sites against outcomes, 0 (alike) to 1 (each site another).
        chance: p of a chi-squared test of independence.
    """

    what: str
    of: str
    shares: dict[str, float]
    effect: float
    chance: float

    @property
    def text(self) -> str:
        """One sentence, from the lowest site to the highest."""
        low, high = (pick(self.shares, key=lambda site: self.shares[site]) for pick in (min, max))
        name = f"{self.what} '{self.of}'" if self.of else self.what
        return (
            f"{name}: {self.shares[low]:.0%} of studies at {low}, {self.shares[high]:.0%} at {high} "
            f"(Cramér's V {self.effect:.2f})"
        )


def ask(federation: Federation, sites: Mapping[str, Site]) -> list[SiteDescription]:
    """What each site would tell a coordinator. Reads manifests, and no image or feature.

    Raises:
        MmfmError: see `read_manifest`.
    """
    model = federation.model
    return [described(describe(n, read_manifest(site, model), model), site.release) for n, site in sites.items()]


def differences(federation: Federation, sites: Sequence[SiteDescription]) -> list[Difference]:
    """Where sites may differ: how often each modality is there where it is held at all, and every head's labels."""
    found = []
    for name in federation.model.modalities:
        holders = {s.site: (_total(s.modalities[name]), _total(s.studies)) for s in sites if name in s.modalities}
        found += _of_shares(f"modality {name}", "", holders)
    for name, head in federation.model.heads.items():
        counts = {s.site: {label: _total_of(s, name, label) for label in head.labels} for s in sites}
        if head.EXCLUSIVE:
            found += _of_classes(name, {site: labels for site, labels in counts.items() if any(labels.values())})
        elif head.PER_STUDY:
            studies = {s.site: _total(s.tasks[name]) for s in sites if name in s.tasks}
            for label in head.labels:
                found += _of_shares(name, label, {site: (counts[site][label], of) for site, of in studies.items()})
    return sorted(found, key=lambda difference: -difference.effect)


def findings(federation: Federation, sites: Sequence[SiteDescription]) -> list[str]:
    """What a consortium should know before it chooses a policy, as sentences."""
    told = []
    for name in federation.model.modalities:
        holders = [site.site for site in sites if name in site.modalities]
        if not holders:
            told.append(f"modality {name}: no site holds it.")
        elif len(holders) == 1 and len(sites) > 1:
            told.append(f"modality {name}: only {holders[0]} holds it; no other site helps to train its encoder.")
    pairs = [set(a.modalities) & set(b.modalities) for i, a in enumerate(sites) for b in sites[:i]]
    if pairs and not any(pairs):
        told.append("No two sites hold the same modality: what they share is the fusion and the heads alone.")
    found = differences(federation, sites)
    beyond = [each for each in found if each.chance < 0.05 / len(found)]
    told += [f"{each.text}; more than chance explains." for each in beyond]
    alike = [f"{each.what} '{each.of}'" if each.of else each.what for each in found if each not in beyond]
    if alike:
        told.append(f"No difference beyond chance: {', '.join(alike)}.")
    few = [s.site for s in sites if s.patients["val"] < FEWEST_TO_ADAPT]
    if few and any(not stage.federated for stage in federation.stages):
        told.append(
            f"{', '.join(few)}: fewer than {FEWEST_TO_ADAPT} validation patients, so that an adapt stage stays as near "
            "to the shared state as the document's 'interpolate' allows."
        )
    return told + [f"{site}: {sentence}" for site, sentence in one_class_sites(federation, sites)]


def survey(federation_file: Path, sites_file: Path, out: Path | None, console: Console) -> None:
    """Print what sites hold and where they differ; into `out` as JSON too.

    Raises:
        MmfmError: a document is wrong, or a manifest cannot be read.
    """
    federation, files = load_documents(federation_file, sites_file)
    with console.status("Reading manifests"):
        sites = ask(federation, files)
    console.print(availability_table(federation, sites))
    for head in federation.model.heads:
        console.print(_label_table(federation, head, sites))
    rounding = how_counts_are_told({site.site: site.min_count for site in sites})
    sentences = findings(federation, sites)
    for sentence in [*([rounding] if rounding else []), *sentences]:
        console.print(sentence, markup=False, highlight=False)
    if out:
        found = [asdict(each) for each in differences(federation, sites)]
        write_json(out, {"sites": [asdict(s) for s in sites], "differences": found, "findings": sentences})
        console.print(f"Written: {escape(str(out))}", highlight=False, soft_wrap=True)


def availability_table(federation: Federation, sites: Sequence[SiteDescription]) -> Table:
    """Patients, studies by split, and the share of studies with each modality, a row per site."""
    table = Table(title="Sites, and studies that have each modality", title_justify="left")
    table.add_column("site", overflow="fold")
    for column in ("patients", *SPLITS, *federation.model.modalities):
        table.add_column(column, justify="right", overflow="fold")
    for site in sites:
        total = max(_total(site.studies), 1)
        shares = [f"{min(_total(site.modalities.get(m, {})) / total, 1):.0%}" for m in federation.model.modalities]
        table.add_row(site.site, str(_total(site.patients)), *(str(site.studies[split]) for split in SPLITS), *shares)
    return table


def _label_table(federation: Federation, head: str, sites: Sequence[SiteDescription]) -> Table:
    # Labels may be many and have long names: they are rows.
    table = Table(title=f"Labels of {head}, all splits, and their share of labelled studies", title_justify="left")
    table.add_column("label", overflow="fold")
    for site in sites:
        table.add_column(site.site, justify="right", overflow="fold")
    for label in federation.model.heads[head].labels:
        cells = []
        for site in sites:
            count, of = _total_of(site, head, label), _labelled(federation, site, head)
            share = f" ({min(count / of, 1):.0%})" if of and federation.model.heads[head].PER_STUDY else ""
            cells.append(f"{count}{share}" if head in site.targets else "–")
        table.add_row(label, *cells)
    return table


def _total(counts: Mapping[str, int]) -> int:
    return sum(counts.values())


def _total_of(site: SiteDescription, head: str, label: str) -> int:
    return sum(labels[label] for labels in site.targets.get(head, {}).values())


def _labelled(federation: Federation, site: SiteDescription, head: str) -> int:
    spec = federation.model.heads[head]
    if spec.EXCLUSIVE:  # of rounded counts the classes' own sum is nearer than a total
        return sum(_total_of(site, head, label) for label in spec.labels)
    return _total(site.tasks.get(head, {}))


def _of_shares(what: str, label: str, counts: Mapping[str, tuple[int, int]]) -> list[Difference]:
    table = {site: (min(have, of), max(of - have, 0)) for site, (have, of) in counts.items() if of}
    tested = _independence(list(table.values()))
    return [Difference(what, label, {s: a / (a + b) for s, (a, b) in table.items()}, *tested)] if tested else []


def _of_classes(head: str, counts: Mapping[str, Mapping[str, int]]) -> list[Difference]:
    tested = _independence([list(labels.values()) for labels in counts.values()])
    if not tested:
        return []
    shares = {site: {label: n / sum(labels.values()) for label, n in labels.items()} for site, labels in counts.items()}
    by_label = {label: {site: of[label] for site, of in shares.items()} for label in next(iter(shares.values()))}
    widest = max(by_label, key=lambda label: max(by_label[label].values()) - min(by_label[label].values()))
    return [Difference(head, widest, by_label[widest], *tested)]


def _independence(rows: Sequence[Sequence[int]]) -> tuple[float, float] | None:
    """Cramér's V and p of a table of sites by outcomes; None where there is nothing to compare."""
    table = np.array(rows)
    if len(table) < 2:
        return None
    table = table[:, table.any(0)]
    if table.shape[1] < 2:
        return None
    test = chi2_contingency(table, correction=False)
    return float(np.sqrt(test.statistic / table.sum() / (min(table.shape) - 1))), float(test.pvalue)
