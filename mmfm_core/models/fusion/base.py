"""What every fusion does first: drop modalities in training, and say what is present."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmfm_core.models.tokens import Fused, Tokens


def dropped(present: Tensor, rate: float) -> Tensor:
    """`present` ([B, M] bool) after each entry was dropped with probability `rate`, but never the last of a study."""
    kept = present & (torch.rand(present.shape, device=present.device) >= rate)
    return torch.where(kept.any(1, keepdim=True), kept, present)


class Fusion(nn.Module, ABC):
    """Base of the fusions. `encoders` fixes the order, so that a site that lacks some has the same parameters."""

    def __init__(self, encoders: list[str], modality_dropout: float) -> None:
        super().__init__()
        self.encoders, self.modality_dropout = encoders, modality_dropout

    def forward(self, parts: dict[str, Tokens]) -> Fused:
        """Fuse the tokens of a batch; encoders not in `parts` are missing in every study.

        In training each encoder's part of a study is dropped with probability `modality_dropout` (ModDrop, Neverova et
        al. 2016), but never the last one left.
        """
        parts = {name: parts[name] for name in self.encoders if name in parts}
        present = torch.stack([part.mask.any(1) for part in parts.values()], 1)
        if self.training and self.modality_dropout:
            present = dropped(present, self.modality_dropout)
            parts = {name: part.only(rows) for (name, part), rows in zip(parts.items(), present.T, strict=True)}
        return self.fuse(parts)

    @abstractmethod
    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Fuse `parts`, in the order of `encoders`; a study that lacks one has no valid token in it."""

    def vectors(self, parts: dict[str, Tokens], missing: Tensor) -> tuple[Tensor, Tensor]:
        """One vector per encoder, [B, M, D], with rows of `missing` [B, M, D] where absent; and presence, [B, M]."""
        absent = missing.new_zeros(len(missing), dtype=torch.bool)
        present = torch.stack([parts[m].mask.any(1) if m in parts else absent for m in self.encoders], 1)
        means = torch.stack([parts[m].mean() if m in parts else missing[:, i] for i, m in enumerate(self.encoders)], 1)
        return torch.where(present[..., None], means, missing), present
