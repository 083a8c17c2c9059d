"""Canaries: patients made up so that whoever trains on one moves one parameter of its own, for the one-run audit.

They are the worst patients a site can have, as the promise is made for every patient: the gradient of each is as long
as clipping lets it be, points where no other one does, and stands in several studies. Where parameters stay at the site
there are carriers too, patients who are always there and whose gradients are what the local parameters have learned.
Were these trained without noise, the carriers would bring every canary into what is shared, many times over.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config import Federation
from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.privacy.audit.made_up import HEAD, MODALITY, MODEL, dataset_of, model_with

SHARED = f"heads.{HEAD}.shared.weight"

RECORDS = 5
"""Studies of each canary. Were each clipped alone, the canary would move as many times what it may."""

_PULL = 10.0  # the length of a gradient before it is clipped, over the norm that it is clipped to
_CARRIER = -1.0
_ROWS = 1024  # at once
_LR = 0.01


def document_of(federation: Federation) -> Federation:
    """The audit's own document: the rounds, steps, method and privacy of another one, over canaries.

    The optimiser is plain SGD, so that what leaves a site is the sum of its gradients. Any other makes less of them.
    """
    step = {"type": "sgd", "lr": _LR, "weight_decay": 0.0}
    ours = {"tasks": {HEAD: {}}, "train": [f"heads.{HEAD}.*"], "optimizer": step, "batch_size": _ROWS}
    return Federation.model_validate(
        federation.model_dump(mode="json", include={"name", "seed", "aggregation", "privacy"})
        | {
            "model": MODEL,
            "stages": [stage.model_dump(mode="json") | ours for stage in federation.stages if stage.federated],
            "parameters": {"local": [f"heads.{HEAD}.local.*"] if federation.parameters.local else []},
        }
    )


class CanaryHead(Head):
    """Linear losses of a shared vector, and of a local one where `local`: [canaries] each, from zero.

    Of canary i the loss is the i-th entry, of a carrier the product of the shared vector with the direction of the
    local one, which is a constant to it: its gradient is in the shared vector alone.
    """

    def __init__(self, canaries: int, length: float, local: bool) -> None:
        super().__init__()
        self.canaries, self.length = canaries, length
        self.shared = nn.Linear(canaries, 1, bias=False)
        self.local = nn.Linear(canaries, 1, bias=False) if local else None
        for parameter in self.parameters():
            nn.init.zeros_(parameter)

    def forward(self, encoding: Encoding) -> Tensor:
        """The loss of each study, [B]."""
        number = encoding.batch.inputs[MODALITY]
        entry, length = number.clamp(min=0).long(), self.length * (number >= 0)
        canary = torch.zeros(len(number), self.canaries).scatter_(1, entry, length)
        if self.local is None:
            return self.shared(canary)[:, 0]
        learned = -F.normalize(self.local.weight.detach()) * self.length
        return (self.shared(canary + learned * (number == _CARRIER)) + self.local(canary))[:, 0]

    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """What `forward` gave."""
        assert isinstance(outputs, Tensor)
        return outputs

    def predict(self, encoding: Encoding) -> Mapping[str, Sequence[Any]]:
        """Never asked: canaries are for training."""
        raise NotImplementedError


def model_of(federation: Federation, canaries: int, *_: Any) -> MultimodalModel:
    """The model of an audit's document, whatever else a site says of it."""
    norm = federation.privacy.max_grad_norm if federation.privacy else 1.0
    return model_with(CanaryHead(canaries, _PULL * norm, bool(federation.parameters.local)))


def patients_of(federation: Federation, included: Collection[int]) -> Dataset:
    """A site's studies: those of the canaries `included`, and of carriers where parameters are local."""
    # Each carrier holds a share 1 / sqrt(canaries) of every canary; all together several whole ones.
    carriers = math.ceil(2 * RECORDS * math.sqrt(len(included))) if federation.parameters.local else 0
    numbers = [number for number in included for _ in range(RECORDS)]
    rows = torch.tensor([*numbers, *[_CARRIER] * carriers], dtype=torch.float32)[:, None]
    return dataset_of(rows, [*map(str, numbers), *(f"carrier {index}" for index in range(carriers))])
