"""One patient at a time by plain autograd: the reference. For every model, with the memory of one patient."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch
from mmfm_core.privacy.engines.base import Clipped, Losses, zeros


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    batch: Batch,
    patients: Tensor,
    parameters: Mapping[str, nn.Parameter],
    max_norm: float,
) -> Clipped:
    """See `Engine`. No layer is asked anything, so there is none that it could not see."""
    total, summed, dropped = zeros(parameters), 0.0, 0
    for patient in patients.unique().tolist():
        loss = losses(batch.rows((patients == patient).nonzero()[:, 0].tolist())).mean()
        gradients = _gradients(loss, parameters)
        norm = torch.stack([torch.linalg.vector_norm(gradient) for gradient in gradients.values()] or [loss * 0]).norm()
        if not (loss.isfinite() and norm.isfinite()):
            dropped += 1
            continue
        summed += float(loss.detach())
        scale = min(1.0, max_norm / float(norm)) if norm > 0 else 1.0
        for name, gradient in gradients.items():
            total[name].add_(gradient, alpha=scale)
    return Clipped(total, summed, dropped)


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of the parameters that the loss reaches."""
    if not loss.requires_grad:
        return {}
    gradients = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    return {name: each for name, each in zip(parameters, gradients, strict=True) if each is not None}
