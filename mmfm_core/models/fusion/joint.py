"""Input-level fusion: all tokens through one transformer."""

from typing import Literal

from pydantic import PositiveInt
from timm.models.vision_transformer import Block
from torch import nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, join, split


class Joint(FusionConfig):
    """The tokens of all modalities attend to each other (ViLT, Kim et al. 2021; FLAVA, Singh et al. 2022)."""

    type: Literal["joint"]
    depth: PositiveInt = 2
    heads: PositiveInt = 3

    def check(self, model: Model) -> None:
        """Check width against heads."""
        check_transformer(self.heads, model.dim)

    def build(self, model: Model) -> "JointFusion":
        """The fusion, with random weights."""
        return JointFusion(list(model.encoders), model.dim, self)


class JointFusion(Fusion):
    """A transformer over the concatenated sequences."""

    def __init__(self, encoders: list[str], dim: int, config: Joint) -> None:
        super().__init__(encoders, config.modality_dropout)
        self.blocks = nn.ModuleList(Block(dim, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Concatenate, attend among the valid tokens, and pool them."""
        tokens = join(list(parts.values()))
        x = tokens.x
        for block in self.blocks:
            x = block(x, attn_mask=tokens.mask[:, None, None, :])
        fused = Tokens(self.norm(x), tokens.mask)
        return Fused(fused, fused.mean(), split(fused.x, parts))
