"""Input-level fusion: all tokens through one transformer."""

from timm.models.vision_transformer import Block
from torch import nn

from mmfm_core.config.model import JointFusion as Config
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, join


class JointFusion(Fusion):
    """The tokens of all modalities attend to each other (ViLT, Kim et al. 2021; FLAVA, Singh et al. 2022)."""

    def __init__(self, modalities: list[str], dim: int, config: Config) -> None:
        super().__init__(modalities, config.modality_dropout)
        self.blocks = nn.ModuleList(Block(dim, config.heads, qkv_bias=True) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Concatenate, attend among the valid tokens, and pool them."""
        tokens = join(list(parts.values()))
        x = tokens.x
        for block in self.blocks:
            x = block(x, attn_mask=tokens.mask[:, None, None, :])
        fused = Tokens(self.norm(x), tokens.mask)
        return Fused(fused, fused.mean())
