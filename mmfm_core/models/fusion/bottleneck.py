"""Latent fusion: a few learned latents gather from all tokens."""

from typing import Literal

import torch
from pydantic import PositiveInt
from timm.models.vision_transformer import Block
from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.fusion.attention import CrossAttention
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, initialised, join, learned


class Bottleneck(FusionConfig):
    """Learned latents attend to the tokens of all modalities, and to each other.

    Its cost grows with the number of tokens, not with its square (Perceiver, Jaegle et al. 2021; the resampler of
    Flamingo, Alayrac et al. 2022; the Q-Former of BLIP-2, Li et al. 2023).

    Attributes:
        latents: how many vectors a head sees instead of the modalities' tokens.
    """

    type: Literal["bottleneck"]
    latents: PositiveInt = 16
    depth: PositiveInt = 2
    heads: PositiveInt = 3

    def check(self, model: Model) -> None:
        """Check width against heads."""
        check_transformer(self.heads, model.dim)

    def build(self, model: Model) -> "BottleneckFusion":
        """The fusion, with random weights."""
        return BottleneckFusion(list(model.encoders), model.dim, self)


class BottleneckFusion(Fusion):
    """Layers of cross-attention to the tokens, then self-attention among the latents."""

    def __init__(self, encoders: list[str], dim: int, config: Bottleneck) -> None:
        super().__init__(encoders, config.modality_dropout)
        self.latents = initialised(nn.Embedding(config.latents, dim))
        self.gather = nn.ModuleList(CrossAttention(dim, config.heads) for _ in range(config.depth))
        self.blocks = nn.ModuleList(Block(dim, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Gather, mix, and pool the latents; `parts` are as they came."""
        context = join(list(parts.values()))
        x = learned(self.latents, len(context.x))
        for gather, block in zip(self.gather, self.blocks, strict=True):
            x = block(gather(x, context))
        latents = Tokens(self.norm(x), x.new_ones(x.shape[:2], dtype=torch.bool))
        return Fused(latents, latents.mean(), parts)
