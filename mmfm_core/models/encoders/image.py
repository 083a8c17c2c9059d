"""2D images: a timm vision transformer."""

import timm
from torch import Tensor, nn

from mmfm_core.config.model import ImageModality, VisionTransformer
from mmfm_core.models.tokens import Tokens, initialised, learned


class ImageEncoder(nn.Module):
    """Patches of an image as tokens (Dosovitskiy et al. 2021), without a class token."""

    def __init__(self, dim: int, modality: ImageModality, config: VisionTransformer) -> None:
        super().__init__()
        self.vit = timm.create_model(
            "vit_tiny_patch16_224",
            pretrained=False,
            img_size=modality.size,
            patch_size=config.patch_size,
            in_chans=modality.channels,
            embed_dim=dim,
            depth=config.depth,
            num_heads=config.heads,
            num_classes=0,
            class_token=False,
            global_pool="",
            pos_embed="none",  # timm's is a bare parameter beside children; ours is an embedding (see `learned`)
        )
        self.position = initialised(nn.Embedding(self.vit.patch_embed.num_patches, dim))
        self.modality_embedding = initialised(nn.Embedding(1, dim))

    def forward(self, image: Tensor) -> Tokens:
        """[B, C, H, W] -> Tokens of [B, patches, D]."""
        x = self.vit.patch_embed(image) + learned(self.position, len(image))
        x = self.vit.norm(self.vit.blocks(x)) + learned(self.modality_embedding, len(image))
        return Tokens(x, x.new_ones(x.shape[:2], dtype=bool))
