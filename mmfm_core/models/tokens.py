"""Tokens: the only currency between encoders, fusion and heads."""

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Tokens:
    """One encoder's output as a sequence.

    Attributes:
        x: [B, N, D].
        mask: [B, N] bool, False for padding and for every token of a study that lacks the modality.
        grid: how the N tokens lie in an image or volume; empty where they do not.
        skips: outputs of earlier layers, each [B, N, D], for heads that draw maps.
    """

    x: Tensor
    mask: Tensor
    grid: tuple[int, ...] = ()
    skips: tuple[Tensor, ...] = ()

    def mean(self) -> Tensor:
        """Mean of the valid tokens, [B, D]; zero where there is none."""
        weight = self.mask[..., None].to(self.x.dtype)
        return (self.x * weight).sum(1) / weight.sum(1).clamp(min=1)

    def only(self, rows: Tensor) -> "Tokens":
        """The same tokens, valid only in the studies where `rows` ([B] bool) holds."""
        return replace(self, mask=self.mask & rows[:, None])


@dataclass(frozen=True)
class Fused:
    """What heads read.

    Attributes:
        tokens: what fusion gives as a sequence: all encoders' tokens, or fewer latents.
        pooled: [B, D].
        parts: each encoder's own tokens after fusion, or before it where fusion does not keep them apart.
    """

    tokens: Tokens
    pooled: Tensor
    parts: dict[str, Tokens] = field(default_factory=dict)


def join(parts: list[Tokens]) -> Tokens:
    """Several sequences as one."""
    return Tokens(torch.cat([part.x for part in parts], 1), torch.cat([part.mask for part in parts], 1))


def split(x: Tensor, parts: dict[str, Tokens]) -> dict[str, Tokens]:
    """The reverse of `join` after x ([B, sum of N, D]) went through a fusion."""
    pieces = x.split([part.x.shape[1] for part in parts.values()], 1)
    return {name: replace(part, x=piece) for (name, part), piece in zip(parts.items(), pieces, strict=True)}


def learned(embedding: nn.Embedding, rows: int) -> Tensor:
    """All vectors of an embedding for each row, [rows, n, D].

    Learned vectors live in `nn.Embedding` and are read through its forward with one row per study: a bare parameter
    beside children, or a vector broadcast over the batch, hides per-patient gradients from hooks.
    """
    index = torch.arange(embedding.num_embeddings, device=embedding.weight.device)
    return embedding(index.expand(rows, -1))


def initialised(embedding: nn.Embedding) -> nn.Embedding:
    """The embedding with the small initial values usual for position and type vectors (std 0.02)."""
    nn.init.trunc_normal_(embedding.weight, std=0.02)
    return embedding
