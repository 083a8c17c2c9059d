"""Latent fusion: pooled vectors weighed by a gate."""

from typing import Literal

from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, initialised, join, learned

ABSENT = -1e9  # as a gate's logit: no weight, and still finite where nothing at all is present


class Gated(FusionConfig):
    """A softmax gate over the modalities that are present (gated multimodal units, Arevalo et al. 2017)."""

    type: Literal["gated"]

    def build(self, model: Model) -> "GatedFusion":
        """The fusion, with random weights."""
        return GatedFusion(list(model.encoders), model.dim, self.modality_dropout)


class GatedFusion(Fusion):
    """Pooled vectors, each with a weight that depends on all of them."""

    def __init__(self, encoders: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(encoders, modality_dropout)
        self.missing = initialised(nn.Embedding(len(encoders), dim))
        self.gate = nn.Linear(dim * len(encoders), len(encoders))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool each modality, weigh, sum, mix."""
        tokens = join(list(parts.values()))
        vectors, present = self.vectors(parts, learned(self.missing, len(tokens.x)))
        weights = self.gate(vectors.flatten(1)).masked_fill(~present, ABSENT).softmax(-1)
        return Fused(tokens, self.mlp((vectors * weights[..., None]).sum(1)), parts)
