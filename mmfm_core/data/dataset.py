"""A site's studies as tensors, decoded once, with a presence mask per modality.

Where a modality is absent its row holds a neutral filler that no result may depend on: the mask removes it. (Leaving
the row out would give each encoder its own batch size, and per-patient gradients would lose their patient.)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

from mmfm_core.config.model import (
    CategoricalFeature,
    ImageModality,
    Modality,
    Model,
    Normalization,
    TableModality,
    TextModality,
)
from mmfm_core.config.site import Site, Split
from mmfm_core.data.manifest import Study, read_manifest
from mmfm_core.data.readers import read_image
from mmfm_core.data.tokenizer import tokenize
from mmfm_core.errors import MmfmError

UNLABELLED = -1


@dataclass(frozen=True)
class Batch:
    """What a model sees.

    Attributes:
        inputs: modality -> image [B, C, H, W] float, token ids [B, L] int, or features [B, F] float (NaN = missing).
        present: modality -> [B] bool.
        targets: head -> [B] int class, -1 where unlabelled.
    """

    inputs: dict[str, Tensor]
    present: dict[str, Tensor]
    targets: dict[str, Tensor]

    def __len__(self) -> int:
        return len(next(iter(self.inputs.values())))


@dataclass(frozen=True)
class Dataset:
    """All studies of a site, decoded; rows of `everything` and of `studies` correspond.

    Attributes:
        everything: the whole site as one batch.
        notes: repairs made while reading, as sentences with counts.
    """

    everything: Batch
    studies: list[Study]
    notes: list[str] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.studies)

    def batch(self, rows: Sequence[int]) -> Batch:
        """The studies `rows`, in that order."""
        index = torch.as_tensor(rows, dtype=torch.long)
        return Batch(
            *(
                {k: v[index] for k, v in part.items()}
                for part in (self.everything.inputs, self.everything.present, self.everything.targets)
            )
        )

    def rows(self, split: Split, heads: Sequence[str]) -> list[int]:
        """The studies of a split that have a label for at least one of `heads`."""
        labelled = torch.zeros(len(self), dtype=torch.bool)
        for head in heads:
            if head in self.everything.targets:
                labelled |= self.everything.targets[head] != UNLABELLED
        return [row for row, study in enumerate(self.studies) if study.split == split and labelled[row]]


def load_dataset(site: Site, model: Model) -> Dataset:
    """Read a site's manifest and files.

    Raises:
        MmfmError: see `read_manifest` and `read_image`.
    """
    studies = read_manifest(site, model)
    training = torch.tensor([study.split == "train" for study in studies])
    inputs, present, notes = {}, {}, []
    for name, modality in model.modalities.items():
        if name not in site.modalities:
            continue
        here = torch.tensor([name in study.inputs for study in studies])
        if not here.any():
            continue
        fit = here & training if (here & training).any() else here
        if isinstance(modality, ImageModality):
            inputs[name] = _images(site, studies, name, modality, fit)
        elif isinstance(modality, TextModality):
            inputs[name], cut = _texts(studies, name, modality)
            if cut:
                notes.append(
                    f"{cut} of {int(here.sum())} texts of '{name}' are longer than {modality.max_length} tokens "
                    "and were cut"
                )
        else:
            inputs[name] = _features(studies, name, modality, fit)
        present[name] = here
    targets = {
        head: torch.tensor([study.targets.get(head, UNLABELLED) for study in studies])
        for head in model.heads
        if any(head in study.targets for study in studies)
    }
    return Dataset(Batch(inputs, present, targets), studies, notes)


def concatenate(datasets: Sequence[Dataset], model: Model) -> Dataset:
    """The studies of several sites as one, each normalised as its own site does: the pooled bound in a simulation."""

    def join(part: str, fillers: Mapping[str, Tensor | int]) -> dict[str, Tensor]:
        columns = {}
        for name, filler in fillers.items():
            parts = [getattr(d.everything, part).get(name) for d in datasets]
            like = next((p for p in parts if p is not None), None)
            if like is not None:
                row = torch.as_tensor(filler, dtype=like.dtype).expand(like.shape[1:])
                columns[name] = torch.cat(
                    [
                        p if p is not None else row.expand(len(d), *row.shape)
                        for p, d in zip(parts, datasets, strict=True)
                    ]
                )
        return columns

    absent = {name: _absent(modality) for name, modality in model.modalities.items()}
    everything = Batch(
        join("inputs", absent),
        join("present", dict.fromkeys(absent, 0)),
        join("targets", dict.fromkeys(model.heads, UNLABELLED)),
    )
    # Two hospitals may use the same number for different people.
    studies = [replace(s, patient=f"{index}/{s.patient}") for index, d in enumerate(datasets) for s in d.studies]
    return Dataset(everything, studies, [note for d in datasets for note in d.notes])


def _images(site: Site, studies: list[Study], name: str, modality: ImageModality, fit: Tensor) -> Tensor:
    images = torch.zeros(len(studies), modality.channels, *modality.size)
    for row, study in enumerate(studies):
        if name in study.inputs:
            try:
                images[row] = torch.from_numpy(read_image(study.inputs[name], modality))  # type: ignore[arg-type]
            except MmfmError as error:
                raise MmfmError(f"{site.manifest}, row {study.row}: the image of '{name}' {error}") from error
    if modality.normalize == "site":
        mean, std = images[fit].mean(), images[fit].std()
    else:
        mean, std = torch.tensor(modality.normalize.mean), torch.tensor(modality.normalize.std)
    return (images - mean) / std.clamp(min=1e-6)


def _absent(modality: Modality) -> Tensor | int:
    return tokenize([""], modality.max_length)[0][0] if isinstance(modality, TextModality) else 0


def _texts(studies: list[Study], name: str, modality: TextModality) -> tuple[Tensor, int]:
    texts = [str(study.inputs.get(name, "")) for study in studies]
    return tokenize(texts, modality.max_length)


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
