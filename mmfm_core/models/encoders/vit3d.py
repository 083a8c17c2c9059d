"""3D volumes: MONAI's vision transformer, from random weights or from a checkpoint."""

from pathlib import Path
from typing import Literal, cast

import torch
from monai.networks.blocks.pos_embed_utils import build_sincos_position_embedding
from monai.networks.nets import ViT
from pydantic import PositiveInt
from torch import Tensor, nn

from mmfm_core.config.modality import VolumeModality
from mmfm_core.config.model import Artifact, Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.config.strict import Name
from mmfm_core.models.encoders import pretrained
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.encoders.vit import check_patches, check_transformer
from mmfm_core.models.tokens import Tokens, learned

ANGLES = 6  # sine and cosine along each of three axes


class VolumeTransformer(EncoderConfig):
    """MONAI's ViT over cubes of a volume (UNETR's encoder, Hatamizadeh et al. 2022).

    Attributes:
        channels: volume modalities of one size, stacked as input channels; the encoder's own modality where none.
        pretrained: the safetensors state dict of a `monai.networks.nets.ViT` of the same shape.
    """

    READS = ("volume3d",)

    type: Literal["vit3d"]
    channels: tuple[Name, ...] = ()
    patch_size: PositiveInt = 8
    depth: PositiveInt = 4
    heads: PositiveInt = 3
    pretrained: Artifact | None = None

    def inputs(self, name: str) -> tuple[str, ...]:
        """The modalities that are stacked, or the encoder's own."""
        return self.channels or (name,)

    def check(self, model: Model, name: str) -> None:
        """Check sides against patches, width against heads and positions, and that stacked volumes are alike."""
        check_transformer(self.heads, model.dim)
        if model.dim % ANGLES:
            raise ValueError(f"type: positions in a volume need a dim that is a multiple of {ANGLES}, not {model.dim}")
        check_patches(self, model, name)

    def build(self, model: Model, name: str, artifacts: Path) -> "VolumeEncoder":
        """The encoder, with random weights or those of its checkpoint."""
        encoder = VolumeEncoder(model, self, self.inputs(name))
        if self.pretrained:
            field = f"model.encoders.{name}.pretrained"
            pretrained.into_monai_vit(
                encoder.vit, encoder.position, pretrained.tensors(artifacts, self.pretrained, field), field
            )
        return encoder


class VolumeEncoder(Encoder):
    """Cubes of a volume as tokens."""

    reads_input = False

    def __init__(self, model: Model, config: VolumeTransformer, inputs: tuple[str, ...]) -> None:
        super().__init__(model.dim, inputs)
        size = cast(VolumeModality, model.modalities[inputs[0]]).size
        self.patch_size = config.patch_size
        self.grid: tuple[int, ...] = tuple(side // config.patch_size for side in size)
        self.vit = ViT(
            in_channels=len(inputs),
            img_size=size,
            patch_size=config.patch_size,
            hidden_size=model.dim,
            mlp_dim=4 * model.dim,
            num_layers=config.depth,
            num_heads=config.heads,
        )
        # MONAI's positions are a bare parameter beside children; ours are an embedding (see `learned`).
        del self.vit.patch_embedding.position_embeddings
        sincos = build_sincos_position_embedding(list(self.grid), model.dim).detach()[0]
        self.position = nn.Embedding.from_pretrained(sincos, freeze=False)
        for block in self.vit.blocks:
            block.norm_cross_attn = nn.Identity()  # a parameter that forward never uses has no gradient

    def embed(self, volume: Tensor) -> Tensor:
        """[B, C, X, Y, Z] -> cubes with their positions, [B, N, D]."""
        cubes: Tensor = self.vit.patch_embedding.patch_embeddings(volume)
        return cubes.flatten(2).transpose(1, 2) + learned(self.position, len(volume))

    def transform(self, x: Tensor) -> Tensor:
        """[B, any of the cubes, D] -> [B, 2, same, D]: the last layer, normalised, and the middle one."""
        middle = x
        for index, block in enumerate(self.vit.blocks):
            x = block(x)
            if index == (len(self.vit.blocks) - 1) // 2:
                middle = x
        return torch.stack([self.vit.norm(x), middle], 1)

    def features(self, x: Tensor) -> Tensor:
        """[B, C, X, Y, Z] -> [B, 2, N, D]."""
        return self.transform(self.embed(x))

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens with the cubes' grid and one skip."""
        last, middle = features.unbind(1)
        return Tokens(last, last.new_ones(last.shape[:2], dtype=torch.bool), self.grid, (middle,))
