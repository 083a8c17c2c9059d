"""Classification: one class out of several."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Column
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Choices
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.binned import Ranking
from mmfm_core.metrics.multiclass import one_of_several
from mmfm_core.metrics.statistic import Statistic
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer

UNLABELLED = -1


class Classification(HeadConfig):
    """One class out of several. The site maps one of its columns to the head's name under `targets`."""

    METRICS = ("auroc", "auprc", "f1", "ece", "accuracy")
    LOWER_IS_BETTER = ("ece",)
    EXCLUSIVE = True

    type: Literal["classification"]
    classes: Choices

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[int | None]:
        """The index of each study's class."""
        if not isinstance(mapping, Column):
            raise MmfmError(f"site '{table.site.name}': {field}: one class out of several is mapped by 'column: NAME'")
        return table.choices(mapping, field, self.classes)

    def count(self, target: Any) -> Mapping[str, int]:
        """One of its class."""
        return {self.classes[target]: 1}

    def unlabelled(self, model: Model) -> Tensor:
        """A class index that is none."""
        return torch.tensor(UNLABELLED)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor:
        """The class index."""
        return torch.tensor(study.targets[name])

    def build(self, model: Model, name: str, artifacts: Path) -> "ClassificationHead":
        """The head, with random weights."""
        return ClassificationHead(name, model.dim, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic | None:
        """See `mmfm_core.metrics.multiclass`; nothing is defined on probabilities that are not finite."""
        patients = pd.factorize(table["patient"])[0]
        return one_of_several(metric, self._probabilities(table), table["target"].to_numpy(), patients)

    @property
    def ranked(self) -> tuple[str, ...]:
        """The classes, each against all others; of two the second."""
        return self.classes if len(self.classes) > 2 else self.classes[1:]

    def rankings(self, table: pd.DataFrame) -> list[Ranking]:
        """By the probability of each of them."""
        of = [self.classes.index(name) for name in self.ranked]
        targets = table["target"].to_numpy()
        return [Ranking(table[f"p{c}"].to_numpy(float), (targets == c).astype(float)) for c in of]

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """Studies of each class."""
        return {name: int((table["target"] == index).sum()) for index, name in enumerate(self.classes)}

    def _probabilities(self, table: pd.DataFrame) -> Any:
        return table[[f"p{index}" for index in range(len(self.classes))]].to_numpy(float)


class ClassificationHead(Head):
    """A normalised linear layer on the pooled state."""

    def __init__(self, name: str, dim: int, config: Classification) -> None:
        super().__init__()
        self.name, self.encoders = name, config.encoders
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, len(config.classes))

    def forward(self, encoding: Encoding) -> Tensor:
        """Logits [B, classes]."""
        logits: Tensor = self.linear(self.norm(encoding.fused(self.encoders).pooled))
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each study, [B]; zero where it is unlabelled."""
        return F.cross_entropy(outputs, batch.targets[self.name], ignore_index=UNLABELLED, reduction="none")

    def predict(self, encoding: Encoding) -> dict[str, list[float]]:
        """The class, and one probability per class."""
        columns = {"target": encoding.batch.targets[self.name].tolist()}
        return columns | {f"p{i}": p.tolist() for i, p in enumerate(self(encoding).softmax(-1).T)}
