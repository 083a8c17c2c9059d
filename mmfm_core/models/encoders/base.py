"""What every encoder is made of: an input, a trunk, and the modality's type embedding."""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Self

import torch
from torch import Tensor, nn

from mmfm_core.models.tokens import Tokens, initialised, learned


class Encoder(nn.Module, ABC):
    """A trunk from one modality, or from several images stacked as channels, to tokens.

    Everything that a modality owns beside a trunk it may share is here: the fill for contrasts that a study lacks, and
    the type embedding.
    """

    BESIDE = ("fill", "modality_embedding", "project")
    """The children that `features` does not use; all others are the trunk."""

    reads_input = True
    """Whether `tokens` looks at the input itself, as for where a text is padded, and not only at its features."""

    def __init__(self, dim: int, channels: Sequence[str] = (), channels_each: int = 1) -> None:
        super().__init__()
        self.channels = tuple(channels)
        if len(self.channels) > 1:
            self.fill = initialised(nn.Embedding(len(self.channels), channels_each))
        self.modality_embedding = initialised(nn.Embedding(1, dim))

    def train(self, mode: bool = True) -> Self:
        """Set the mode, but leave a frozen trunk as it is: without dropout, so that its features can be kept."""
        super().train(mode)
        for name, part in self.named_children():
            if name not in self.BESIDE and not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def stack(self, inputs: Mapping[str, Tensor], present: Mapping[str, Tensor]) -> Tensor:
        """The images of `channels` as one [B, sum of C, *size], a learned constant standing for a missing one.

        Hetero-modal segmentation fills with zeros (HeMIS, Havaei et al. 2016); a learned value costs one number and
        lets the trunk tell 'missing' from 'average'.
        """
        like = next(inputs[name] for name in self.channels if name in inputs)
        fill = learned(self.fill, len(like))
        absent = torch.zeros(len(like), dtype=torch.bool, device=like.device)
        stacked = []
        for index, name in enumerate(self.channels):
            filled = fill[:, index].reshape(*fill.shape[::2], *[1] * (like.ndim - 2)).expand_as(like)
            here = present.get(name, absent).reshape(-1, *[1] * (like.ndim - 1))
            stacked.append(torch.where(here, inputs.get(name, filled), filled))
        return torch.cat(stacked, 1)

    @abstractmethod
    def features(self, x: Tensor) -> Tensor:
        """What the trunk makes of an input: [B, S, N, W], the last layer's tokens first, then those of skips.

        It depends on the trunk alone, so that a frozen trunk's features can be kept (`mmfm_core.data.features`).
        """

    @abstractmethod
    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens of the model's width from the features of the input `x`, without the type embedding."""

    def forward(self, x: Tensor, features: Tensor | None = None) -> Tokens:
        """Tokens of an input as the dataset (or `stack`) gives it.

        Args:
            features: the trunk's, where they were kept. Then only the number of rows of `x` matters, unless the encoder
                `reads_input`.
        """
        weight = self.modality_embedding.weight
        tokens = self.tokens(self.features(x) if features is None else features.to(weight.dtype), x)
        return replace(tokens, x=tokens.x + learned(self.modality_embedding, len(x)))


class FeatureDropout(nn.Dropout1d):
    """Drops a feature in all tokens of a study at once: from a mean over tokens, draws of each token would vanish."""

    def forward(self, x: Tensor) -> Tensor:
        """[..., N, W] -> [..., N, W]."""
        return super().forward(x.transpose(-1, -2)).transpose(-1, -2)
