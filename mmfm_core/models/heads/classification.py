"""Classification: one class out of several."""

from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.models.tokens import Fused


class ClassificationHead(nn.Module):
    """A normalised linear layer on the pooled state."""

    def __init__(self, dim: int, classes: int) -> None:
        super().__init__()
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, classes)

    def forward(self, fused: Fused) -> Tensor:
        """Logits [B, classes]."""
        return self.linear(self.norm(fused.pooled))

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of each study, [B]; zero where `target` is -1 (unlabelled)."""
        return F.cross_entropy(logits, target, ignore_index=-1, reduction="none")
