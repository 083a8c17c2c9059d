"""`mmfm site approve`: what a document would do here, in words for the person who answers for the patients."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from client import gates
from client.agent import controls_of
from client.loading import arrays
from client.place import Place
from mmfm_core.artifacts import collect
from mmfm_core.compression import bytes_of
from mmfm_core.config import Federation, Site, load_federation
from mmfm_core.config.loading import sha256
from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.parameters import block_of, fates_of, held, matches
from mmfm_core.privacy.accounting import composed, costs_of
from mmfm_core.privacy.statement import statement
from mmfm_core.storage import Tensors

MB = 1e6


@dataclass(frozen=True)
class Proposal:
    """A document that a site is asked to approve.

    Attributes:
        state: of the model that this site would build, by what `site.yaml` maps.
        document: its hash, which is what is approved.
    """

    federation: Federation
    source: Path
    site: Site
    state: Tensors
    document: str


def propose(place: Place, source: Path) -> Proposal:
    """Read a document and build what this site would hold of its model; nothing is written.

    Raises:
        MmfmError: the document or the site's file is wrong, a pinned file is missing, or the site has nothing of it.
    """
    site, federation = place.site(), load_federation(source)
    modalities = [name for name in federation.model.modalities if name in site.modalities]
    if not modalities:
        known = ", ".join(federation.model.modalities)
        raise MmfmError(
            f"modalities: this site maps none of those that the federation has ({known}); map those it holds",
            str(place.directory / "site.yaml"),
        )
    with TemporaryDirectory() as folder:
        collect(federation.model, source.parent, Path(folder))
        targets = [name for name in federation.model.heads if name in site.targets]
        model = MultimodalModel(federation.model, modalities, targets, federation.seed, Path(folder))
    return Proposal(federation, source, site, arrays(model), sha256(federation))


def approve(place: Place, proposal: Proposal) -> None:
    """Agree: from now on the agent answers to the document's hash."""
    collect(proposal.federation.model, proposal.source.parent, place.directory / "artifacts")
    gates.approve(place.directory / "approved", proposal.federation)


def revoke(place: Place, document: str) -> str:
    """Withdraw an approval, by its hash or the beginning of it; the agent refuses it from the next message on.

    Raises:
        MmfmError: none or several begin so.
    """
    folder = place.directory / "approved"
    found = [path for path in sorted(folder.glob("*.yaml")) if document and path.stem.startswith(document)]
    if len(found) != 1:
        what = f"{len(found)} approved documents begin so" if found else "no approved document begins so"
        raise MmfmError(f"'{document}': {what}; `mmfm site status` lists them", str(folder))
    found[0].unlink()
    return found[0].stem


def sentences(proposal: Proposal) -> Iterator[str]:
    """What would run, be read, leave and stay, a paragraph each."""
    federation, site = proposal.federation, proposal.site
    model, least = federation.model, site.release.min_count
    yield f"'{federation.name}', document sha256 {proposal.document}"
    yield (
        f"RUNS: mmfm {version('mmfm')} as it is installed here, and no code of the coordinator's. The document names "
        "parts of closed lists; the agent has no network, and answers to this hash alone."
    )
    reads = ", ".join(name for name in model.modalities if name in site.modalities)
    labels = ", ".join(name for name in model.heads if name in site.targets) or "none"
    yield f"READS: of {site.manifest}, the modalities {reads}, and labels of {labels}."
    yield _leaving(proposal)
    yield _figures(federation, least)
    yield (
        "LEAVES, when the coordinator asks who is here: counts of studies, patients and labels by split, rounded up to "
        f"multiples of {least}, and likewise how many texts or targets were cut or repaired. And refusals, with a "
        "reason that names no patient, file or row."
    )
    stays = ["images", "texts", "rows", "identifiers", "predictions"]
    local = _by_block(held(fates_of(federation, proposal.state), "local"))
    stays += [f"the model's {block} ({count} tensors)" for block, count in local.items()]
    stays += ["what is adapted here"] * any(not stage.federated for stage in federation.stages)
    yield f"NEVER LEAVES: {', '.join(stays)}."
    yield from protection(federation, site)


def protection(federation: Federation, site: Site) -> Iterator[str]:
    """How patients are protected in what leaves."""
    if not federation.privacy:
        yield (
            "PRIVACY: without differential privacy: what leaves is trained on patients and can carry traces of single "
            "ones, which a determined coordinator could look for. Approve it where you trust the coordinator with that."
        )
        return
    for term, sentence in statement(federation):
        yield f"PRIVACY, {term[0].lower()}{term[1:]}: {sentence}"
    cost = composed(costs_of(federation), site.budget.delta)
    yield (
        f"BUDGET: this document would cost ε {cost:.3f} of this site's ε {site.budget.epsilon:g} at δ "
        f"{site.budget.delta:g}; `mmfm site ledger show` says what is spent. Beyond the budget a round is refused."
    )


def _leaving(proposal: Proposal) -> str:
    federation, state = proposal.federation, proposal.state
    shared = {name: state[name] for name in held(fates_of(federation, state), "shared")}
    rounds: list[Tensors] = []
    for this in rounds_of(federation):
        if this.stage and this.returns_tensors:
            leaving = {name: tensor for name, tensor in shared.items() if matches(name, this.stage.train)}
            rounds.append(leaving | controls_of(federation, this, leaving))
    if not rounds:
        return "LEAVES: no tensor; every stage trains at this site alone."
    size = partial(bytes_of, form=federation.aggregation.wire.update)
    most, total = max(rounds, key=size), sum(size(leaving) for leaving in rounds)
    each = [
        f"{block} ({count} tensors, {size({n: t for n, t in most.items() if block_of(n) == block}) / MB:.3f} MB)"
        for block, count in _by_block(most).items()
    ]
    loss = ", and the mean training loss" if not federation.privacy or federation.privacy.exact else ""
    drawn = ", or fewer, as each draws some of the sites" if federation.aggregation.sites_per_round else ""
    return (
        f"LEAVES, in each of {len(rounds)} rounds{drawn}: the trained parameters of {', '.join(each)}; "
        f"{size(most) / MB:.3f} MB a round at most, {total / MB:.3f} MB in all, unless a round is repeated. With "
        "them, how many training studies stand behind each of these blocks, rounded up to multiples of "
        f"{proposal.site.release.min_count}{loss}. And how many seconds the round took."
    )


def _figures(federation: Federation, least: int) -> str:
    if federation.privacy and federation.privacy.figures == "withheld":
        return "LEAVES: no metric and no loss."
    if federation.privacy and federation.privacy.figures == "noised":
        return (
            f"LEAVES, once at the end, with noise: the AUROC of {', '.join(federation.noised_heads)} with the shared "
            f"model on this site's own test patients, unless they have fewer than {least} studies. No other metric, "
            "and no loss."
        )
    heads = [f"{', '.join(federation.metrics_of(name))} of '{name}'" for name in federation.model.heads]
    chosen = any(not stage.federated and len(stage.interpolate) > 1 for stage in federation.stages)
    adapted = "; and how far this site's validation patients let adaptation go" if chosen else ""
    subsets = any(evaluation.subsets for evaluation in federation.evaluation.values())
    return (
        f"LEAVES, in each of {len(rounds_of(federation))} rounds: figures measured on this site's own validation "
        f"patients (and at the end its test patients{', with every subset of modalities' if subsets else ''}): "
        f"{'; '.join(heads) or 'none'}{adapted}. They are exact, so that how many studies stand behind one can follow "
        f"from it though that is told rounded; none is told over fewer than {least} studies."
    )


def _by_block(names: Iterable[str]) -> Counter[str]:
    return Counter(block_of(name) for name in names)
