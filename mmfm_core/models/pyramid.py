"""A map of features of a 2D image at a fixed stride: what detection looks at."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.modality import ImageModality
from mmfm_core.config.model import Model
from mmfm_core.models.tasks import Encoding

STRIDE = 8
"""Pixels of the model's image per cell of the map, in each direction."""

GROUPS = 8


class FeatureMap(nn.Module):
    """Tokens and raw pixels to a map [B, width, H / 8, W / 8].

    Convolutions bring the image down to a sixteenth, where the encoder's tokens join them, and one step back up a finer
    level joins in: a feature pyramid (Lin et al. 2017) with a vision transformer at its top. What is smaller than a
    patch is seen in the pixels. The pooled state is added last, to all cells alike: a normalisation after it would take
    most of it out again.
    """

    def __init__(self, model: Model, encoder: str, encoders: tuple[str, ...], width: int) -> None:
        super().__init__()
        self.encoder, self.encoders = encoder, encoders
        images = [cast(ImageModality, model.modalities[m]) for m in model.encoders[encoder].inputs(encoder)]
        self.channels, self.size = sum(image.channels for image in images), images[0].size
        self.fine = nn.Sequential(  # three halvings are STRIDE
            convolution(self.channels, width // 4, 2),
            convolution(width // 4, width // 2, 2),
            convolution(width // 2, width, 2),
        )
        self.coarse = convolution(width, width, 2)
        self.tokens = nn.Linear(model.dim, width)
        self.norm, self.pooled = nn.LayerNorm(model.dim), nn.Linear(model.dim, width)
        self.top, self.out = convolution(width, width), convolution(width, width)

    @property
    def grid(self) -> tuple[int, int]:
        """Height and width of the map."""
        return -(-self.size[0] // STRIDE), -(-self.size[1] // STRIDE)

    def forward(self, encoding: Encoding) -> Tensor:
        """[B, width, *grid]."""
        fused = encoding.fused(self.encoders)
        fine = self.fine(self._pixels(encoding, fused.pooled))
        coarse = self.coarse(fine)
        if self.encoder in fused.parts:
            part = fused.parts[self.encoder]
            tokens = torch.where(part.mask[..., None], self.tokens(part.x), 0.0)
            tokens = tokens.transpose(1, 2).reshape(len(tokens), -1, *part.grid)
            # Opacus reads the strides of a convolution's input wrongly unless they are contiguous.
            coarse = coarse + F.interpolate(tokens.contiguous(), coarse.shape[2:], mode="bilinear")
        finer = F.interpolate(self.top(coarse), fine.shape[2:]) + fine
        pooled: Tensor = self.pooled(self.norm(fused.pooled))
        return self.out(finer.contiguous()) + pooled[:, :, None, None]

    def _pixels(self, encoding: Encoding, like: Tensor) -> Tensor:
        # Modality dropout takes the image's tokens only: without its pixels there would be nothing to find.
        if self.encoder not in encoding.parts:
            return like.new_zeros(len(like), self.channels, *self.size)
        here = encoding.present(self.encoder)[:, None, None, None]
        return torch.where(here, encoding.input(self.encoder), 0.0)


def convolution(before: int, after: int, stride: int = 1) -> nn.Sequential:
    """3 × 3, normalised in groups, rectified."""
    layer = nn.Conv2d(before, after, 3, stride, padding=1, bias=False)
    return nn.Sequential(layer, nn.GroupNorm(GROUPS, after), nn.ReLU())


def branch(width: int, out: int, bias: float) -> nn.Sequential:
    """`out` numbers for each cell, which start near `bias`."""
    last = nn.Conv2d(width, out, 1)
    nn.init.normal_(last.weight, std=0.01)
    nn.init.constant_(cast(Tensor, last.bias), bias)
    return nn.Sequential(nn.Conv2d(width, width, 3, padding=1), nn.ReLU(), last)
