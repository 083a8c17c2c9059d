"""2D images: a timm vision transformer from random weights."""

from pathlib import Path
from typing import Literal, cast

import timm
import torch
from pydantic import PositiveInt
from torch import Tensor, nn

from mmfm_core.config.modality import ImageModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.config.strict import Name
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.tokens import Tokens, initialised, learned


class VisionTransformer(EncoderConfig):
    """A timm vision transformer (Dosovitskiy et al. 2021), without a class token.

    Attributes:
        channels: image modalities of one size, stacked as input channels; the encoder's own modality where none.
    """

    READS = ("image2d",)

    type: Literal["vit"]
    channels: tuple[Name, ...] = ()
    patch_size: PositiveInt = 8
    depth: PositiveInt = 4
    heads: PositiveInt = 3

    def inputs(self, name: str) -> tuple[str, ...]:
        """The modalities that are stacked, or the encoder's own."""
        return self.channels or (name,)

    def check(self, model: Model, name: str) -> None:
        """Check sides against patches, width against heads, and that stacked images are alike."""
        check_transformer(self.heads, model.dim)
        check_patches(self, model, name)

    def build(self, model: Model, name: str, artifacts: Path) -> "ImageEncoder":
        """The encoder, with random weights."""
        return ImageEncoder(model, self, self.inputs(name))


def check_transformer(heads: int, dim: int) -> None:
    """Check that attention heads divide a width."""
    if dim % heads:
        raise ValueError(f"heads: {heads} does not divide dim {dim}")


def check_patches(config: EncoderConfig, model: Model, name: str) -> None:
    """Check that patches tile the images, and that stacked images have one size and as many channels."""
    patch: int = config.patch_size  # type: ignore[attr-defined]
    forms = set()
    for modality in config.inputs(name):
        image = cast(ImageModality, model.modalities[modality])
        for side in image.size:
            if side % patch:
                raise ValueError(f"patch_size: side {side} of modality '{modality}' is not a multiple of {patch}")
        forms.add((image.size, getattr(image, "channels", 1)))
    if len(forms) > 1:
        raise ValueError("channels: modalities that are stacked must have one size and the same number of channels")


class ImageEncoder(Encoder):
    """Patches of an image as tokens."""

    reads_input = False

    def __init__(self, model: Model, config: VisionTransformer, inputs: tuple[str, ...]) -> None:
        image = cast(ImageModality, model.modalities[inputs[0]])
        super().__init__(model.dim, inputs, image.channels)
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=image.size,
            patch_size=config.patch_size,
            in_chans=image.channels * len(inputs),
            embed_dim=model.dim,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
            class_token=False,
            global_pool="",
            pos_embed="none",  # timm's is a bare parameter beside children; ours is an embedding (see `learned`)
        )
        self.position = initialised(nn.Embedding(self.vit.patch_embed.num_patches, model.dim))
        self.grid: tuple[int, ...] = tuple(self.vit.patch_embed.grid_size)
        self.patch_size = config.patch_size

    def embed(self, image: Tensor) -> Tensor:
        """[B, C, H, W] -> patches with their positions, [B, N, D]."""
        return self.vit.patch_embed(image) + learned(self.position, len(image))

    def transform(self, x: Tensor) -> Tensor:
        """[B, any of the patches, D] -> [B, 2, same, D]: the last layer, normalised, and the middle one."""
        middle = x
        for index, block in enumerate(self.vit.blocks):
            x = block(x)
            if index == (len(self.vit.blocks) - 1) // 2:
                middle = x
        return torch.stack([self.vit.norm(x), middle], 1)

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 2, N, D]."""
        return self.transform(self.embed(x))

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens with the patches' grid and one skip."""
        last, middle = features.unbind(1)
        return Tokens(last, last.new_ones(last.shape[:2], dtype=torch.bool), self.grid, (middle,))
