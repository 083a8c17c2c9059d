"""The site's gates: what may come in, what may go out. They fail closed."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmfm_core.config import Federation, load_federation
from mmfm_core.config.loading import dump, sha256
from mmfm_core.config.privacy import Privacy
from mmfm_core.config.site import Release
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Metric, SiteDescription
from mmfm_core.storage import Tensors, finite, write_text

LONGEST_REASON = 2000

_known: dict[tuple[bytes, str], Federation] = {}
"""What is in a file that was found to be the document of this hash: read for every message, and validated once."""


def approve(folder: Path, federation: Federation) -> str:
    """Write down that this site agrees to a document; returns the hash by which it will be asked for."""
    document = sha256(federation)
    write_text(folder / f"{document}.yaml", dump(federation))
    return document


def approved(folder: Path, document: str) -> Federation:
    """The document with this hash, from the site's own copy.

    Raises:
        MmfmError: the site approved no such document, or its copy was changed since.
    """
    path = folder / f"{document}.yaml"
    if not re.fullmatch("[0-9a-f]{64}", document) or not path.is_file():
        raise MmfmError("this federation's document is not approved at this site")
    try:
        text = path.read_bytes()
        if (text, document) not in _known:
            _known[text, document] = _validated(path, document)
        return _known[text, document]
    except (MmfmError, OSError) as error:
        raise MmfmError("this site's approved copy of the document was changed; approve it again") from error


def _validated(path: Path, document: str) -> Federation:
    federation = load_federation(path)
    if sha256(federation) != document:
        raise MmfmError("is another document", str(path))
    return federation


def tellable(reason: str) -> str:
    """A reason as it may leave: of bounded length, and naming no place on this machine."""
    if re.search(r"(^|[\s'\"(=])~?/\w", reason):
        return "the site's files cannot be used as they are; its own log says which, and how to mend it"
    return reason[:LONGEST_REASON]


def check_tensors(tensors: Mapping[str, np.ndarray], like: Mapping[str, np.ndarray]) -> None:
    """Check that tensors have exactly the names, shapes and types of `like`, and are finite.

    Raises:
        MmfmError: which one is not, and why.
    """
    for name, expected in like.items():
        if name not in tensors:
            raise MmfmError(f"the tensor '{name}' is missing")
        got = tensors[name]
        if got.shape != expected.shape or got.dtype != expected.dtype:
            raise MmfmError(
                f"the tensor '{name}' is {got.dtype}{list(got.shape)}, expected {expected.dtype}{list(expected.shape)}"
            )
        if not finite(got):
            raise MmfmError(f"the tensor '{name}' holds values that are not finite")
    if not tensors.keys() <= like.keys():
        raise MmfmError("a tensor that was not asked for came along")


def releasable(state: Tensors, names: Iterable[str]) -> Tensors:
    """The tensors `names` of a trained state, if they are fit to leave.

    Raises:
        MmfmError: one of them is not finite.
    """
    leaving = {name: state[name] for name in names}
    check_tensors(leaving, leaving)
    return leaving


def described(site: SiteDescription, release: Release) -> SiteDescription:
    """What a site holds, as its policy lets it be told."""

    def rounded(counts: Mapping[str, int]) -> dict[str, int]:
        return {key: release.count(count) for key, count in counts.items()}

    return replace(
        site,
        studies=rounded(site.studies),
        patients=rounded(site.patients),
        modalities={name: rounded(counts) for name, counts in site.modalities.items()},
        targets={head: {split: rounded(labels) for split, labels in of.items()} for head, of in site.targets.items()},
        tasks={name: rounded(counts) for name, counts in site.tasks.items()},
        notes=[replace(note, count=release.count(note.count), of=release.count(note.of)) for note in site.notes],
        min_count=release.min_count,
    )


def measured(metrics: Iterable[Metric], release: Release, privacy: Privacy | None = None) -> list[Metric]:
    """A site's figures, without those over too few studies to be told; where the document is private, as it says."""
    if privacy and not privacy.exact:
        metrics = [m for m in metrics if m.noised and privacy.figures == "noised"]
    return [
        replace(m, n=release.count(m.n), value=None, low=None, high=None)
        if m.n < release.min_count
        else replace(m, n=release.count(m.n))
        for m in metrics
    ]


def told(loss: float | None, privacy: Privacy | None) -> float | None:
    """The mean training loss, unless the document keeps it at the site."""
    return loss if privacy is None or privacy.exact else None


def weighed(weights: Mapping[str, float], release: Release) -> dict[str, float]:
    """The studies behind each block, as they are told."""
    return {block: float(release.count(weight)) for block, weight in weights.items()}
