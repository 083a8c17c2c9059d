"""From tokens back to a map over the whole image or volume: what segmentation and registration have in common."""

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from mmfm_core.config.modality import AXES, Axis, PixelModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import TaskConfig
from mmfm_core.data.manifest import Study
from mmfm_core.data.readers.geometry import resample_labels, steps
from mmfm_core.data.readers.sources import read_labels, read_pixels, read_voxels
from mmfm_core.errors import MmfmError
from mmfm_core.models import _torchvision_ops  # noqa: F401  (monai imports torchvision)
from mmfm_core.models.augmentation import moves_of
from mmfm_core.models.motion import moved
from mmfm_core.models.tasks import Encoding
from mmfm_core.models.tokens import Tokens

from monai.networks.blocks import UnetOutBlock, UnetrBasicBlock, UnetrUpBlock  # isort: skip

WIDTH = 16
"""Channels at full resolution; each halving of the resolution doubles them."""


def drawing(model: Model, config: TaskConfig) -> tuple[str, ...]:
    """The encoders of a task whose tokens lie in a grid over an image or volume."""
    return tuple(name for name in config.sees(model) if _patch(model, name) is not None)


def pixels_of(model: Model, encoder: str) -> PixelModality:
    """The modality that fixes an encoder's size."""
    return cast(PixelModality, model.modalities[model.encoders[encoder].inputs(encoder)[0]])


def check_dense(model: Model, config: TaskConfig) -> None:
    """Check that a map can be drawn: at least one grid, and all of one size, whose patches are a power of two."""
    names = drawing(model, config)
    if not names:
        raise ValueError("encoders: none of them keeps its tokens in a grid; name a vision transformer of images")
    for name in names[1:]:
        if (pixels_of(model, name).size, _patch(model, name)) != (
            pixels_of(model, names[0]).size,
            _patch(model, names[0]),
        ):
            raise ValueError(
                f"encoders: '{names[0]}' and '{name}' must have one size and one patch_size to draw one map"
            )
    moves_of(model, names)
    patch = cast(int, _patch(model, names[0]))
    if patch < 2 or patch & (patch - 1):
        raise ValueError(
            f"encoders: patch_size {patch} of '{names[0]}' must be a power of two, to be doubled up to a map"
        )


def mirrored(maps: Tensor, model: Model, config: TaskConfig, axis: Axis) -> Tensor:
    """Maps [..., *size] of studies whose images were mirrored along an axis: mirrored too, if it was theirs."""
    names = drawing(model, config)
    dimensions = len(pixels_of(model, names[0]).size)
    return maps.flip(AXES[dimensions][axis]) if axis in moves_of(model, names).mirror else maps


def moved_map(maps: Tensor, model: Model, config: TaskConfig, drawn: Tensor) -> Tensor:
    """Maps of label ids [B, ..., *size] of studies whose images were moved by `drawn`."""
    return moved(maps, drawn, pixels_of(model, drawing(model, config)[0]), labels=True)


def read_map(path: Path, study: Study, model: Model, modalities: Sequence[str]) -> Tensor:
    """The label ids of a file, int64 of the modalities' size, at the very pixels of their images.

    Raises:
        MmfmError: the file cannot be read as labels, or differs in size from an image of the study.
    """
    form = cast(PixelModality, model.modalities[modalities[0]])
    oriented = getattr(form, "assume_oriented", False)
    labels, spacing = read_labels(path, len(form.size), oriented)
    for name in modalities:
        if name in study.inputs:
            image = cast(Path, study.inputs[name])
            shape = (
                read_pixels(image)[0].shape[:2] if len(form.size) == 2 else read_voxels(image, oriented).voxels.shape
            )
            if shape != labels.shape:
                raise MmfmError(f"differs in size from the image of '{name}'; save both on one grid of pixels")
    step = steps(labels.shape, form.size, spacing, getattr(form, "spacing", None))
    return torch.from_numpy(resample_labels(labels, form.size, step))


class DenseDecoder(nn.Module):
    """Tokens and raw images to a map [B, out, *size], in 2D or 3D.

    The tokens of a study's encoders are averaged over those present, joined with an earlier layer's, and doubled in
    resolution step by step. At each step the raw images join in through convolutions, as in UNETR (Hatamizadeh et al.
    2022) and TransUNet (Chen et al. 2021), since what is thinner than a patch is drawn from them. An absent or dropped
    image is zero. The pooled state moves the features of all pixels alike, last: each step normalises over the image,
    which would take it out again.

    Without `tokens` neither they nor the pooled state have a part: what is left is a U-Net (Ronneberger et al. 2015).
    """

    def __init__(self, model: Model, config: TaskConfig, out: int, width: int = WIDTH, tokens: bool = True) -> None:
        super().__init__()
        self.encoders, self.names, self.tokens = config.encoders, drawing(model, config), tokens
        self.channels = {n: _channels(model, n) for n in self.names}
        size, patch = pixels_of(model, self.names[0]).size, cast(int, _patch(model, self.names[0]))
        dimensions, levels = len(size), patch.bit_length() - 1
        widths = [width * 2**level for level in range(levels)]
        inputs = [sum(self.channels.values()), *widths]
        if tokens:
            self.merge = nn.Linear(2 * model.dim, model.dim)
            self.norm, self.pooled = nn.LayerNorm(model.dim), nn.Linear(model.dim, width)
        else:
            self.bottom = UnetrBasicBlock(dimensions, widths[-1], widths[-1], 3, 1, "instance", res_block=True)
        self.down = nn.ModuleList(
            UnetrBasicBlock(dimensions, before, after, 3, 1 if level == 0 else 2, "instance", res_block=True)
            for level, (before, after) in enumerate(zip(inputs, widths, strict=False))
        )
        self.up = nn.ModuleList(
            UnetrUpBlock(dimensions, before, after, 3, 2, "instance", res_block=True)
            for before, after in pairwise([model.dim, *widths[::-1]] if tokens else widths[::-1])
        )
        self.out = UnetOutBlock(dimensions, width, out)

    def starts_at(self, value: Tensor) -> None:
        """Let every place of an untrained map be `value` ([out]) on average."""
        with torch.no_grad():
            self.out.conv.conv.bias.copy_(value)

    def forward(self, encoding: Encoding) -> Tensor:
        """[B, out, *size]."""
        fused = encoding.fused(self.encoders)
        parts = {name: fused.parts[name] for name in self.names if name in fused.parts}
        # Presence after the fusion, not before: what modality dropout took away must not come back through the images.
        present = {name: part.mask.any(1) for name, part in parts.items()}
        image = self._image(encoding, present)
        skips = [image]
        for block in self.down:
            skips.append(block(skips[-1]))
        x = self._grid(parts, present) if self.tokens else self.bottom(skips.pop())
        for block, skip in zip(self.up, skips[:0:-1], strict=True):
            x = block(x, skip)
        if self.tokens:
            pooled = self.pooled(self.norm(fused.pooled))
            x = x + pooled.reshape(*pooled.shape, *[1] * (image.ndim - 2))
        drawn: Tensor = self.out(torch.relu(x))
        return drawn

    def _grid(self, parts: dict[str, Tokens], present: dict[str, Tensor]) -> Tensor:
        """The mean of the tokens of those that are present, [B, dim, *grid]."""
        tokens = sum(
            _where(present[name], torch.cat([part.x, part.skips[-1] if part.skips else part.x], -1))
            for name, part in parts.items()
        )
        count = torch.stack(list(present.values())).sum(0).clamp(min=1)[:, None, None]
        x: Tensor = self.merge(tokens / count)
        grid = next(iter(parts.values())).grid
        # Opacus reads the strides of a convolution's input wrongly unless they are contiguous.
        return x.transpose(1, 2).reshape(len(x), x.shape[2], *grid).contiguous()

    def _image(self, encoding: Encoding, present: dict[str, Tensor]) -> Tensor:
        like = encoding.input(next(iter(present)))
        return torch.cat(
            [
                _where(present[name], encoding.input(name))
                if name in present
                else like.new_zeros(len(like), channels, *like.shape[2:])
                for name, channels in self.channels.items()
            ],
            1,
        )


def _where(rows: Tensor, x: Tensor) -> Tensor:
    return torch.where(rows.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)


def _channels(model: Model, encoder: str) -> int:
    return sum(getattr(model.modalities[m], "channels", 1) for m in model.encoders[encoder].inputs(encoder))


def _patch(model: Model, encoder: str) -> int | None:
    """The side of the patches that an encoder cuts an image into; None where it keeps no grid."""
    config = model.encoders[encoder]
    lender = getattr(config, "share_with", None)
    patch: int | None = getattr(model.encoders[lender] if lender else config, "patch_size", None)
    return patch
