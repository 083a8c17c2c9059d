"""What a site says of its data: counts, by split."""

from collections import Counter
from collections.abc import Sequence

from mmfm_core.config.model import Model
from mmfm_core.config.site import SPLITS
from mmfm_core.data.manifest import Study
from mmfm_core.protocol import SiteDescription


def describe(site: str, studies: Sequence[Study], model: Model, notes: Sequence[str] = ()) -> SiteDescription:
    """Count what the site holds of what `model` asks for; modalities and heads of which it has none are left out."""
    modalities = Counter((name, study.split) for study in studies for name in study.inputs)
    labels = Counter((head, study.split, label) for study in studies for head, label in study.targets.items())
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
            name: {split: {c: labels[name, split, i] for i, c in enumerate(head.classes)} for split in SPLITS}
            for name, head in model.heads.items()
            if any(name in study.targets for study in studies)
        },
        notes=list(notes),
    )
