"""Masked image modelling: most patches are hidden, and redrawn from the few that are left."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import torch
from pydantic import Field, PositiveInt
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from mmfm_core.config.modality import PixelModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import ObjectiveConfig
from mmfm_core.config.strict import Name
from mmfm_core.models.encoders.shared import SharedEncoder
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.tasks import Encoding, Objective
from mmfm_core.models.tokens import initialised, learned


class MaskedImage(ObjectiveConfig):
    """The masked autoencoder (He et al. 2022) around one encoder of images or volumes, contrasts stacked or not.

    Attributes:
        mask_ratio: share of the patches that are hidden.
        decoder_dim: width of the decoder, which is dropped after pre-training.
        decoder_depth: its layers.
        decoder_heads: attention heads of each.
    """

    type: Literal["masked_image"]
    encoders: tuple[Name]
    mask_ratio: float = Field(default=0.75, gt=0, lt=1)
    decoder_dim: PositiveInt = 96
    decoder_depth: PositiveInt = 1
    decoder_heads: PositiveInt = 3

    def check(self, model: Model) -> None:
        """Check that the encoder is a transformer over patches, and the decoder's width against its heads."""
        name = self.encoders[0]
        trunk = model.encoders[getattr(model.encoders[name], "share_with", name)]
        if not hasattr(trunk, "patch_size"):
            raise ValueError(f"encoders: '{name}' has no patches to hide; name a vision transformer")
        try:
            check_transformer(self.decoder_heads, self.decoder_dim)
        except ValueError as error:
            raise ValueError(f"decoder_heads: {self.decoder_heads} does not divide {self.decoder_dim}") from error

    def usable(self, model: Model, present: Mapping[str, Tensor]) -> Tensor:
        """Studies with the image."""
        return present[self.encoders[0]]

    def build(self, model: Model, name: str, artifacts: Path) -> "MaskedAutoencoder":
        """The decoder, with random weights."""
        return MaskedAutoencoder(model, self)


class MaskedAutoencoder(Objective):
    """A light transformer that redraws hidden patches.

    Where contrasts are stacked, those that a study lacks are no target; one that modality dropout took is.
    """

    def __init__(self, model: Model, config: MaskedImage) -> None:
        super().__init__()
        (self.encoder,) = config.encoders
        encoder = model.encoders[self.encoder]
        self.modalities = encoder.inputs(self.encoder)
        image = cast(PixelModality, model.modalities[self.modalities[0]])
        patch: int = model.encoders[getattr(encoder, "share_with", self.encoder)].patch_size  # type: ignore[attr-defined]
        self.patch = (patch,) * len(image.size)
        patches = math.prod(side // patch for side in image.size)
        self.kept = max(1, round(patches * (1 - config.mask_ratio)))
        values = len(self.modalities) * getattr(image, "channels", 1) * math.prod(self.patch)
        self.narrow = nn.Linear(model.dim, config.decoder_dim)
        self.hidden = initialised(nn.Embedding(1, config.decoder_dim))
        self.position = initialised(nn.Embedding(patches, config.decoder_dim))
        self.blocks = nn.Sequential(
            *(Block(config.decoder_dim, config.decoder_heads, qkv_bias=True) for _ in range(config.decoder_depth))
        )
        self.norm = nn.LayerNorm(config.decoder_dim)
        self.draw = nn.Linear(config.decoder_dim, values)

    def forward(self, encoding: Encoding) -> Tensor:
        """The loss of each study with a mask of its own, [B]."""
        return self.loss(encoding, self.visible(len(encoding.batch)))

    def visible(self, rows: int) -> Tensor:
        """The patches that each study keeps, drawn from torch's global generator: indices [rows, kept]."""
        return torch.rand(rows, self.position.num_embeddings).argsort(1)[:, : self.kept]

    def loss(self, encoding: Encoding, visible: Tensor) -> Tensor:
        """Squared error of the hidden patches, [B], each standardised by itself as in the paper's best variant."""
        visible = visible.to(self.draw.weight.device)
        drawn = self.redraw(encoding, visible)
        target, known = self.targets(encoding)
        hidden = torch.ones(drawn.shape[:2], device=drawn.device).scatter(1, visible, 0.0)
        weight = known[:, None] * hidden[..., None]
        errors = ((drawn.reshape(target.shape) - target) ** 2).mean(-1)
        return (errors * weight).sum((1, 2)) / weight.sum((1, 2)).clamp(min=1)

    def redraw(self, encoding: Encoding, visible: Tensor) -> Tensor:
        """All patches as the decoder draws them, [B, N, values], from those in `visible` [B, kept]."""
        trunk: Any = encoding.encoder(self.encoder)
        trunk = trunk.owner if isinstance(trunk, SharedEncoder) else trunk
        patches: Tensor = trunk.embed(encoding.input(self.encoder))
        seen = patches.gather(1, visible[..., None].expand(-1, -1, patches.shape[-1]))
        states = self.narrow(trunk.transform(seen)[:, 0])
        index = visible[..., None].expand_as(states)
        hidden = learned(self.hidden, len(patches)).expand(-1, patches.shape[1], -1)
        full = hidden.scatter(1, index, states.to(hidden.dtype))
        drawn: Tensor = self.draw(self.norm(self.blocks(full + learned(self.position, len(patches)))))
        return drawn

    def targets(self, encoding: Encoding) -> tuple[Tensor, Tensor]:
        """Each modality's patches, [B, N, modalities, values], and which of them a study has, [B, modalities]."""
        batch = encoding.batch
        like = next(batch.inputs[name] for name in self.modalities if name in batch.inputs)
        images = [batch.inputs.get(name, torch.zeros_like(like)) for name in self.modalities]
        absent = torch.zeros(len(batch), dtype=torch.bool, device=like.device)
        known = torch.stack([batch.present.get(name, absent) for name in self.modalities], 1)
        patches = torch.stack([patches_of(image, self.patch) for image in images], 2)
        spread = patches.var(-1, keepdim=True) + 1e-6
        return (patches - patches.mean(-1, keepdim=True)) / spread.sqrt(), known


def patches_of(image: Tensor, patch: tuple[int, ...]) -> Tensor:
    """[B, C, *size] -> [B, N, C * values of a patch], patches in the order in which encoders lay them out."""
    for dimension, side in enumerate(patch, start=2):
        image = image.unfold(dimension, side, side)
    spatial = len(patch)
    return image.flatten(2, 1 + spatial).movedim(1, 2).flatten(2)
