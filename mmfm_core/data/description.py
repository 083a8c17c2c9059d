"""What a site knows of its data: counts, by split; `client.gates` decides how they are told."""

from collections import Counter
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.config.site import SPLITS
from mmfm_core.data.dataset import usable
from mmfm_core.data.manifest import Study
from mmfm_core.protocol import Note, SiteDescription


def describe(site: str, studies: Sequence[Study], model: Model, notes: Sequence[Note] = ()) -> SiteDescription:
    """Count what the site holds of what `model` asks for; modalities and heads of which it has none are left out."""
    modalities = Counter((name, study.split) for study in studies for name in study.inputs)
    labels: Counter[tuple[str, str, str]] = Counter()
    for study in studies:
        for head, target in study.targets.items():
            labels.update({(head, study.split, label): n for label, n in model.heads[head].count(target).items()})
    tasks = _usable(studies, model)
    patients = {(study.split, study.patient) for study in studies}
    return SiteDescription(
        site=site,
        studies={split: sum(study.split == split for study in studies) for split in SPLITS},
        patients={split: sum(inside == split for inside, _ in patients) for split in SPLITS},
        modalities={
            name: {split: modalities[name, split] for split in SPLITS}
            for name in model.modalities
            if any(modalities[name, split] for split in SPLITS)
        },
        targets={
            name: {split: {label: labels[name, split, label] for label in head.labels} for split in SPLITS}
            for name, head in model.heads.items()
            if any(name in study.targets for study in studies)
        },
        tasks={
            name: {
                split: sum(able and study.split == split for able, study in zip(rows, studies, strict=True))
                for split in SPLITS
            }
            for name, rows in tasks.items()
        },
        notes=list(notes),
    )


def _usable(studies: Sequence[Study], model: Model) -> dict[str, list[bool]]:
    def having(names: Iterable[str], part: str) -> dict[str, Tensor]:
        rows = {name: torch.tensor([name in getattr(study, part) for study in studies]) for name in names}
        return {name: here for name, here in rows.items() if here.any()}

    present, labelled = having(model.modalities, "inputs"), having(model.heads, "targets")
    return {name: rows.tolist() for name, rows in usable(model, present, labelled).items()}
