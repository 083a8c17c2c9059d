"""Latent fusion: pooled vectors added, each less a centre."""

from typing import Literal

import torch
from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, join, learned


class Sum(FusionConfig):
    """The modalities' vectors, each less a learned centre, added up; what a study lacks adds nothing.

    For private training. Behind frozen encoders, whose layer to the model's width is random, the sum is a random
    projection of all features together, and the head's layer is the only one that has to be learned. What all studies
    have in common would take most of every clipped gradient: let a stage of its own learn the centres first, with the
    objective `centre`. They start at zero.
    """

    type: Literal["sum"]

    def build(self, model: Model) -> "SumFusion":
        """The fusion, with its centres at zero."""
        return SumFusion(list(model.encoders), model.dim, self.modality_dropout)


class SumFusion(Fusion):
    """Pooled vectors less their centres, added up (late fusion)."""

    def __init__(self, encoders: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(encoders, modality_dropout)
        self.centre = nn.Embedding(len(encoders), dim)
        nn.init.zeros_(self.centre.weight)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool each modality, centre, add."""
        tokens = join(list(parts.values()))
        centres = learned(self.centre, len(tokens.x))
        vectors, _ = self.vectors(parts, centres)
        return Fused(tokens, torch.sum(vectors - centres, 1), parts)
