"""Latent fusion: one modality's tokens ask those of the others."""

from dataclasses import replace
from typing import Literal

import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import FusionConfig
from mmfm_core.config.strict import Name, did_you_mean
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.fusion.attention import CrossAttention
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.tokens import Fused, Tokens, join


class AnchoredAttention(FusionConfig):
    """The anchor's tokens attend to those of all other encoders (ALBEF, Li et al. 2021; BLIP, Li et al. 2022).

    Attributes:
        anchor: the encoder whose tokens ask. In a study that lacks it, the first of the document's encoders that the
            study has takes its place.
    """

    type: Literal["cross_attention"]
    anchor: Name
    depth: PositiveInt = 2
    heads: PositiveInt = 3

    def check(self, model: Model) -> None:
        """Check width against heads, and that the anchor is an encoder."""
        check_transformer(self.heads, model.dim)
        if self.anchor not in model.encoders:
            hint = did_you_mean(self.anchor, model.encoders)
            raise ValueError(f"anchor: there is no encoder '{self.anchor}'; {hint}")

    def build(self, model: Model) -> "AnchoredFusion":
        """The fusion, with random weights."""
        return AnchoredFusion(list(model.encoders), model.dim, self)


class AnchoredFusion(Fusion):
    """Layers of cross-attention; the encoders have attended within their own tokens, so these do not again."""

    def __init__(self, encoders: list[str], dim: int, config: AnchoredAttention) -> None:
        # The anchor first, so that 'the first that is present' is the whole rule.
        super().__init__(sorted(encoders, key=lambda name: name != config.anchor), config.modality_dropout)
        self.blocks = nn.ModuleList(CrossAttention(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)

    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Let each study's anchor attend to its other tokens, and pool it.

        `tokens` are the anchor's, as many as the longest of `parts` has, whichever anchors the studies have; in `parts`
        each study's anchor is as fused, and the others are as they came.
        """
        present = torch.stack([part.mask.any(1) for part in parts.values()], 1)
        chosen = present.int().argmax(1)
        anchors = torch.arange(len(parts), device=chosen.device) == chosen[:, None]
        context = join([part.only(~is_anchor) for part, is_anchor in zip(parts.values(), anchors.T, strict=True)])
        longest = max(part.x.shape[1] for part in parts.values())
        rows = torch.arange(len(chosen), device=chosen.device)
        x = torch.stack([_lengthened(part.x, longest) for part in parts.values()], 1)[rows, chosen]
        mask = torch.stack([_lengthened(part.mask[..., None], longest) for part in parts.values()], 1)[rows, chosen]
        for block in self.blocks:
            x = block(x, context)
        fused = Tokens(self.norm(x), mask[..., 0])
        return Fused(
            fused,
            fused.mean(),
            {
                name: replace(part, x=torch.where(is_anchor[:, None, None], fused.x[:, : part.x.shape[1]], part.x))
                for (name, part), is_anchor in zip(parts.items(), anchors.T, strict=True)
            },
        )


def _lengthened(tokens: Tensor, length: int) -> Tensor:
    return F.pad(tokens, (0, 0, 0, length - tokens.shape[1]))
