"""Image-text matching: does this text belong to this image?"""

from collections.abc import Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import ObjectiveConfig
from mmfm_core.config.strict import Name
from mmfm_core.models.tasks import Encoding, Objective
from mmfm_core.models.tokens import Tokens


class Matching(ObjectiveConfig):
    """Image-text matching through the fusion (ALBEF, Li et al. 2021), between any two encoders."""

    # Its wrong pairs are made of two studies.
    PER_SAMPLE = False

    type: Literal["matching"]
    encoders: tuple[Name, Name]

    def check(self, model: Model) -> None:
        """Check that there are two encoders."""
        if self.encoders[0] == self.encoders[1]:
            raise ValueError("encoders: name two different ones")

    def usable(self, model: Model, present: Mapping[str, Tensor]) -> Tensor:
        """Studies with both."""
        first, second = (present[name] for name in self.encoders)
        return first & second

    def build(self, model: Model, name: str, artifacts: Path) -> "MatchingObjective":
        """The output layer, with random weights."""
        return MatchingObjective(name, model.dim, self.encoders)


class MatchingObjective(Objective):
    """A linear layer on the fused state of right pairs, and of wrong ones: the batch's texts moved on by one study."""

    def __init__(self, name: str, dim: int, encoders: Collection[str]) -> None:
        super().__init__()
        self.name, self.encoders = name, tuple(encoders)
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, 2)

    def forward(self, encoding: Encoding) -> Tensor:
        """Mean cross-entropy of a study's right pair and its wrong one, [B].

        A wrong pair that is none, because both studies hold the same text, does not count.
        """
        if not set(self.encoders) <= set(encoding.parts):  # a site that holds one of the two
            return torch.zeros(len(encoding.batch), device=encoding.model.device)
        rows = encoding.batch.usable[self.name].nonzero()[:, 0]
        other = torch.arange(len(encoding.batch), device=rows.device).index_put((rows,), rows.roll(1))
        first, second = (encoding.parts[name] for name in self.encoders)
        swapped = replace(second, x=second.x[other], mask=second.mask[other])
        ids = encoding.input(self.encoders[1])
        wrong = (ids != ids[other]).flatten(1).any(1)
        right_loss, wrong_loss = (
            F.cross_entropy(self._logits(encoding, first, text), ids.new_full((len(ids),), right), reduction="none")
            for text, right in ((second, 1), (swapped, 0))
        )
        return (right_loss + wrong_loss * wrong) / (1 + wrong.int())

    def _logits(self, encoding: Encoding, first: Tokens, second: Tokens) -> Tensor:
        # Not the fusion's forward, whose modality dropout would take one of the two that are to be compared.
        fusion = encoding.model.fusion
        parts = dict(zip(self.encoders, (first, second), strict=True))
        logits: Tensor = self.linear(
            self.norm(fusion.fuse({n: parts[n] for n in fusion.encoders if n in parts}).pooled)
        )
        return logits
