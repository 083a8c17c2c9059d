"""Made-up patients, and a model of one head that reads them as they are: what attacks train on."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.data.manifest import Study
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Head

MODALITY, HEAD = "row", "attacked"

MODEL: dict[str, Any] = {
    "dim": 2,
    "modalities": {
        MODALITY: {"kind": "tabular", "features": {"number": {"normalize": {"mean": 0, "std": 1}}}},
    },
    "encoders": {MODALITY: {"type": "feature_tokens"}},
    "fusion": {"type": "concat"},
    "heads": {HEAD: {"type": "classification", "classes": ["no", "yes"]}},
}
"""As a document has it. The head is put in the place of the one that this names, and asks no encoder."""


def dataset_of(rows: Tensor, owners: Sequence[str], targets: Tensor | None = None) -> Dataset:
    """A study for training of each of `rows`, [N, F], of the patients `owners`, [N]; `targets` are [N] int."""
    everybody = torch.ones(len(rows), dtype=torch.bool)
    labels = torch.zeros(len(rows), dtype=torch.long) if targets is None else targets
    batch = Batch({MODALITY: rows}, {MODALITY: everybody}, {HEAD: labels}, {HEAD: everybody})
    named = enumerate(zip(owners, labels.tolist(), strict=True))
    studies = [Study(i, str(i), owner, "train", {MODALITY: [0.0]}, {HEAD: label}) for i, (owner, label) in named]
    return Dataset(batch, studies)


def model_with(head: Head) -> MultimodalModel:
    """A model of `MODEL` with this head."""
    model = full_model(Model.model_validate(MODEL), 0)
    model.heads[HEAD] = head
    return model


def names_of(model: MultimodalModel) -> list[str]:
    """The parameters of the head."""
    return [name for name, _ in model.named_parameters() if name.startswith(f"heads.{HEAD}.")]
