"""A site's studies as tensors, decoded once, with a presence mask per modality.

Where a modality is absent its row holds a neutral filler that no result may depend on: the mask removes it. (Leaving
the row out would give each encoder its own batch size, and per-patient gradients would lose their patient.)
"""

from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mmfm_core.config.modality import (
    CategoricalFeature,
    Modality,
    Normalization,
    TableModality,
    TextModality,
)
from mmfm_core.config.model import Model
from mmfm_core.config.part import Repaired
from mmfm_core.config.site import SPLITS, Site, Split
from mmfm_core.data.images import decoded, foresee
from mmfm_core.data.manifest import Study, read_manifest
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Note
from mmfm_core.text import Tokenizer, open_tokenizer

NO_ARTIFACTS = Path("artifacts")
NOT = torch.tensor(False)


class OnDemand(Mapping[str, Tensor]):
    """What is made of each of some tensors, when it is asked for: images that features stand for never are."""

    def __init__(self, tensors: Mapping[str, Tensor], make: Callable[[Tensor], Tensor]) -> None:
        self._tensors, self._make = tensors, make
        self._made: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._made:
            self._made[name] = self._make(self._tensors[name])
        return self._made[name]

    def __contains__(self, name: object) -> bool:
        return name in self._tensors  # Mapping's own would make it

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


@dataclass(frozen=True)
class Batch:
    """What a model sees.

    Attributes:
        inputs: modality -> image [B, C, H, W] or volume [B, 1, X, Y, Z] float, token ids [B, L] int, or features [B, F]
            float (NaN = missing).
        present: modality -> [B] bool.
        targets: head -> [B, ...], of the shape and type that `HeadConfig.unlabelled` has.
        usable: head or objective -> [B] bool, the studies that can serve it.
        features: encoder -> what its frozen trunk made of the inputs, where that was kept.
    """

    inputs: Mapping[str, Tensor]
    present: dict[str, Tensor]
    targets: dict[str, Tensor]
    usable: dict[str, Tensor]
    features: dict[str, Tensor] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(next(iter(self.present.values())))

    def rows(self, rows: Sequence[int], next_rows: Sequence[int] = ()) -> "Batch":
        """The studies `rows`, in that order.

        Args:
            next_rows: those that will be asked for next; the system begins to read what of them lies in a file.
        """
        index = torch.as_tensor(rows, dtype=torch.long)

        def gathered(tensor: Tensor) -> Tensor:
            these = tensor[index]
            foresee(tensor, next_rows)
            return these

        return self._of_each(gathered)

    def to(self, device: torch.device) -> "Batch":
        """The same studies on a device."""
        if next(iter(self.present.values())).device == device:
            return self
        return self._of_each(lambda tensor: tensor.to(device))

    def _of_each(self, make: Callable[[Tensor], Tensor]) -> "Batch":
        names = (part.name for part in fields(self) if part.name != "inputs")
        parts = {name: {key: make(tensor) for key, tensor in getattr(self, name).items()} for name in names}
        return Batch(OnDemand(self.inputs, make), **parts)

    def only(self, modalities: Collection[str]) -> "Batch":
        """The same studies with no other modality than these."""
        present = {name: here & (name in modalities) for name, here in self.present.items()}
        return replace(self, present=present)


@dataclass(frozen=True)
class Dataset:
    """All studies of a site, decoded, large images on the disk; rows of `everything` and of `studies` correspond.

    Attributes:
        everything: the whole site as one batch.
        notes: repairs made while reading.
    """

    everything: Batch
    studies: list[Study]
    notes: list[Note] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.studies)

    def batch(self, rows: Sequence[int], next_rows: Sequence[int] = ()) -> Batch:
        """The studies `rows`, in that order; see `Batch.rows`."""
        return self.everything.rows(rows, next_rows)

    def rows(self, split: Split, tasks: Sequence[str]) -> list[int]:
        """The studies of a split that can serve at least one of `tasks`."""
        usable = torch.zeros(len(self), dtype=torch.bool)
        for task in tasks:
            if task in self.everything.usable:
                usable |= self.everything.usable[task]
        rows: list[int] = (usable & self._splits[split]).nonzero().flatten().tolist()
        return rows

    @cached_property
    def _splits(self) -> dict[Split, Tensor]:
        return {split: torch.tensor([study.split == split for study in self.studies]) for split in SPLITS}


def load_dataset(site: Site, model: Model, artifacts: Path = NO_ARTIFACTS, cache: Path | None = None) -> Dataset:
    """Read a site's manifest and files.

    Args:
        artifacts: the folder of pinned files, by their hash.
        cache: the site's folder for images that are too many for its memory; see `decoded`.

    Raises:
        MmfmError: see `read_manifest`, `decoded`, and the heads' `decode`.
    """
    studies = read_manifest(site, model)
    tokenizer = open_tokenizer(model.tokenizer, artifacts)
    training = torch.tensor([study.split == "train" for study in studies])
    inputs, present, notes = {}, {}, []
    for name, modality in model.modalities.items():
        if name not in site.modalities:
            continue
        here = torch.tensor([name in study.inputs for study in studies])
        if not here.any():
            continue
        fit = here & training if (here & training).any() else here
        if isinstance(modality, TextModality):
            inputs[name], cut = tokenizer.ids([str(s.inputs.get(name, "")) for s in studies], modality.max_length)
            if cut:
                text = f"texts of '{name}' are longer than {modality.max_length} tokens and were cut"
                notes.append(Note(cut, int(here.sum()), text))
        elif isinstance(modality, TableModality):
            inputs[name] = _features(studies, name, modality, fit)
        else:
            inputs[name] = decoded(site, studies, name, modality, fit, cache)
        present[name] = here
    targets, labelled = {}, {}
    for name in model.heads:
        if any(name in study.targets for study in studies):
            targets[name], repairs = _targets(site, studies, name, model, tokenizer)
            notes += repairs
            labelled[name] = torch.tensor([name in study.targets for study in studies])
    return Dataset(Batch(inputs, present, targets, usable(model, present, labelled)), studies, notes)


def usable(model: Model, present: Mapping[str, Tensor], labelled: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The studies ([N] bool) that can serve each head and objective that a site has."""
    nobody = torch.zeros(len(next(iter(present.values()))), dtype=torch.bool)
    read = {
        name: torch.stack([present.get(modality, nobody) for modality in encoder.inputs(name)]).any(0)
        for name, encoder in model.encoders.items()
    }
    held = model.held(present, labelled)
    heads = {name: model.heads[name].usable(model, read, labelled.get(name, nobody)) for name in held.heads}
    return heads | {name: model.objectives[name].usable(model, read) for name in held.objectives}


def concatenate(datasets: Sequence[Dataset], model: Model, artifacts: Path = NO_ARTIFACTS) -> Dataset:
    """The studies of several sites as one, each normalised as its own site does: the pooled bound in a simulation."""
    tokenizer = open_tokenizer(model.tokenizer, artifacts)

    def join(part: str, fillers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        columns = {}
        for name, filler in fillers.items():
            parts = [getattr(d.everything, part).get(name) for d in datasets]
            like = next((p for p in parts if p is not None), None)
            if like is not None:
                row = filler.to(like.dtype).expand(like.shape[1:])
                filled = [
                    row.expand(len(d), *row.shape) if p is None else p for p, d in zip(parts, datasets, strict=True)
                ]
                columns[name] = torch.cat(filled)
        return columns

    absent = {name: _absent(modality, tokenizer) for name, modality in model.modalities.items()}
    everything = Batch(
        join("inputs", absent),
        join("present", dict.fromkeys(absent, NOT)),
        join("targets", {name: head.unlabelled(model) for name, head in model.heads.items()}),
        join("usable", dict.fromkeys(model.tasks, NOT)),
    )
    # Two hospitals may use the same number for different people.
    studies = [replace(s, patient=f"{index}/{s.patient}") for index, d in enumerate(datasets) for s in d.studies]
    return Dataset(everything, studies, [note for d in datasets for note in d.notes])


def _targets(
    site: Site, studies: list[Study], name: str, model: Model, tokenizer: Tokenizer
) -> tuple[Tensor, list[Note]]:
    head, repairs = model.heads[name], Counter[str]()
    targets = head.unlabelled(model).repeat(len(studies), *[1] * head.unlabelled(model).ndim)
    for row, study in enumerate(studies):
        if name in study.targets:
            try:
                decoded = head.decode(name, study, model, tokenizer)
            except MmfmError as error:
                where = f"{site.manifest}, row {study.row}"
                raise MmfmError(f"the target of '{name}' {error}", where) from error
            if isinstance(decoded, Repaired):
                repairs[decoded.repair] += 1
                decoded = decoded.target
            targets[row] = decoded
    held = sum(name in study.targets for study in studies)
    return targets, [Note(count, held, f"targets of '{name}': {repair}") for repair, count in repairs.items()]


def _absent(modality: Modality, tokenizer: Tokenizer) -> Tensor:
    return tokenizer.ids([""], modality.max_length)[0][0] if isinstance(modality, TextModality) else torch.tensor(0)


def _features(studies: list[Study], name: str, modality: TableModality, fit: Tensor) -> Tensor:
    width = len(modality.features)
    rows = torch.tensor(np.array([study.inputs.get(name, [np.nan] * width) for study in studies], dtype=np.float64))
    for column, spec in enumerate(modality.features.values()):
        if isinstance(spec, CategoricalFeature):
            continue
        if isinstance(spec.normalize, Normalization):
            mean, std = spec.normalize.mean, spec.normalize.std
        else:
            known = rows[fit, column]
            known = known[~known.isnan()]
            mean = float(known.mean()) if len(known) else 0.0
            # What never varies in training has no scale; its rounding errors, and later values, must not be blown up.
            std = float(known.std()) if len(known.unique()) > 1 else 1.0
        rows[:, column] = (rows[:, column] - mean) / std
    return rows.float()
