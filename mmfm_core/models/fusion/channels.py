"""Input-level fusion by stacking: one encoder reads all images as channels, and nothing is left to fuse but a layer."""

from typing import Literal

from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, join


class Channels(FusionConfig):
    """For a document whose one encoder stacks its modalities as `channels` (early fusion), or has only one."""

    type: Literal["channels"]

    def check(self, model: Model) -> None:
        """Check that there is one encoder."""
        if len(model.encoders) > 1:
            raise ValueError(
                f"type: 'channels' needs one encoder that stacks all modalities, and there are {len(model.encoders)}; "
                "list them under 'channels' of one encoder, or choose another fusion"
            )

    def build(self, model: Model) -> "ChannelsFusion":
        """The fusion, with random weights."""
        return ChannelsFusion(list(model.encoders), model.dim, self.modality_dropout)


class ChannelsFusion(Fusion):
    """The mean token through a residual layer, which is what a site can adapt."""

    def __init__(self, encoders: list[str], dim: int, modality_dropout: float) -> None:
        super().__init__(encoders, modality_dropout)
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, dim)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Pool the tokens."""
        tokens = join(list(parts.values()))
        pooled = tokens.mean()
        return Fused(tokens, pooled + self.linear(self.norm(pooled)), parts)
