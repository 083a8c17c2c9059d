"""Latent fusion: pooled vectors side by side."""

from typing import Literal

from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, initialised, join, learned


class Concat(FusionConfig):
    """The modalities' embeddings side by side through an MLP."""

    type: Literal["concat"]

    def build(self, model: Model) -> "ConcatFusion":
        """The fusion, with random weights."""
        return ConcatFusion(list(model.encoders), model.dim, self.modality_dropout)


class ConcatFusion(Fusion):
    """Pooled vectors through an MLP; a learned vector stands for a missing one (late fusion)."""

    def __init__(self, encoders: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(encoders, modality_dropout)
        self.missing = initialised(nn.Embedding(len(encoders), dim))
        self.mlp = nn.Sequential(nn.Linear(dim * len(encoders), dim), nn.GELU(), nn.Linear(dim, dim))

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool each modality, concatenate, mix."""
        tokens = join(list(parts.values()))
        vectors, _ = self.vectors(parts, learned(self.missing, len(tokens.x)))
        return Fused(tokens, self.mlp(vectors.flatten(1)), parts)
