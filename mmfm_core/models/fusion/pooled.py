"""Latent fusion of pooled vectors: side by side, or weighed by a gate."""

from torch import nn

from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, initialised, join, learned

ABSENT = -1e9  # as a gate's logit: no weight, and still finite where nothing at all is present


class ConcatFusion(Fusion):
    """Pooled vectors side by side through an MLP; a learned vector stands for a missing one (late fusion)."""

    def __init__(self, modalities: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(modalities, modality_dropout)
        self.missing = initialised(nn.Embedding(len(modalities), dim))
        self.mlp = nn.Sequential(nn.Linear(dim * len(modalities), dim), nn.GELU(), nn.Linear(dim, dim))

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool each modality, concatenate, mix."""
        tokens = join(list(parts.values()))
        vectors, _ = self.vectors(parts, learned(self.missing, len(tokens.x)))
        return Fused(tokens, self.mlp(vectors.flatten(1)))


class GatedFusion(Fusion):
    """A softmax gate over the modalities that are present (gated multimodal units, Arevalo et al. 2017)."""

    def __init__(self, modalities: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(modalities, modality_dropout)
        self.missing = initialised(nn.Embedding(len(modalities), dim))
        self.gate = nn.Linear(dim * len(modalities), len(modalities))
        self.mlp = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, dim), nn.GELU(), nn.Linear(dim, dim))

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool each modality, weigh, sum, mix."""
        tokens = join(list(parts.values()))
        vectors, present = self.vectors(parts, learned(self.missing, len(tokens.x)))
        weights = self.gate(vectors.flatten(1)).masked_fill(~present, ABSENT).softmax(-1)
        return Fused(tokens, self.mlp((vectors * weights[..., None]).sum(1)))
