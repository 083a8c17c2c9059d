"""What every fusion does first: drop modalities in training, and say what is present."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from mmfm_core.models.tokens import Fused, Tokens


class Fusion(nn.Module, ABC):
    """Base of the fusions. `modalities` fixes the order, so that a site that lacks some has the same parameters."""

    def __init__(self, modalities: list[str], modality_dropout: float) -> None:
        super().__init__()
        self.modalities, self.modality_dropout = modalities, modality_dropout

    def forward(self, parts: dict[str, Tokens]) -> Fused:
        """Fuse the modalities of a batch; those not in `parts` are missing in every study.

        In training each modality of a study is dropped with probability `modality_dropout` (ModDrop, Neverova et al.
        2016), but never the last one left.
        """
        parts = {name: parts[name] for name in self.modalities if name in parts}
        present = torch.stack([part.mask.any(1) for part in parts.values()], 1)
        if self.training and self.modality_dropout:
            kept = present & (torch.rand(present.shape, device=present.device) >= self.modality_dropout)
            present = torch.where(kept.any(1, keepdim=True), kept, present)
            parts = {name: part.only(rows) for (name, part), rows in zip(parts.items(), present.T, strict=True)}
        return self.fuse(parts)

    @abstractmethod
    def fuse(self, parts: dict[str, Tokens]) -> Fused:
        """Fuse `parts`, in the order of `modalities`; a study that lacks one has no valid token in it."""

    def vectors(self, parts: dict[str, Tokens], missing: Tensor) -> tuple[Tensor, Tensor]:
        """One vector per modality, [B, M, D], with rows of `missing` [B, M, D] where absent; and presence, [B, M]."""
        absent = missing.new_zeros(len(missing), dtype=torch.bool)
        present = torch.stack([parts[m].mask.any(1) if m in parts else absent for m in self.modalities], 1)
        means = torch.stack(
            [parts[m].mean() if m in parts else missing[:, i] for i, m in enumerate(self.modalities)], 1
        )
        return torch.where(present[..., None], means, missing), present
