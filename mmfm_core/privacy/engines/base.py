"""What a clipping engine is asked, and what it answers: the same of all of them, to rounding.

The unit is the patient. A patient's loss is the mean over its studies in the batch, and its gradient one vector over
all trained parameters, shared and local together; that vector is scaled by min(1, C / norm), and the patients' are
summed: one of them, added or removed, moves the sum by at most C (Abadi et al. 2016, with the patient as the example).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch

Losses = Callable[[Batch], Tensor]
"""The loss of each study of a batch, [B], reduced within the study."""


@dataclass(frozen=True)
class Clipped:
    """The sum over the patients of a batch.

    Attributes:
        total: of their clipped gradients, by parameter; zeros where no patient reaches it.
        loss: of their losses, without the dropped ones.
        dropped: patients whose loss or gradient was not finite. They added zero, and changed nobody else's part.
    """

    total: dict[str, Tensor]
    loss: float
    dropped: int


class Engine(Protocol):
    """A way to compute `Clipped`."""

    def __call__(
        self,
        model: nn.Module,
        losses: Losses,
        batch: Batch,
        patients: Tensor,
        parameters: Mapping[str, nn.Parameter],
        max_norm: float,
    ) -> Clipped:
        """The clipped sum over a batch.

        Args:
            model: what `losses` calls.
            losses: of the studies of a batch, none of which depends on another.
            batch: all studies of every patient in it: a patient in two batches would be clipped twice. May be empty.
            patients: whose each study is, [B] int64; patients are numbered from 0.
            parameters: what is trained, by name; all require a gradient, and no other parameter of the model does.
            max_norm: C.

        Raises:
            MmfmError: the engine cannot see this model's gradients patient by patient.
        """
        ...


def scales(norms: Tensor, losses: Tensor, max_norm: float) -> Tensor:
    """What each patient's gradient is multiplied by, [P]: zero where its norm or loss (both [P]) is not finite."""
    finite = norms.isfinite() & losses.isfinite()
    return torch.where(finite, (max_norm / norms).clamp(max=1.0), 0.0)


def zeros(parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """A sum over nobody."""
    return {name: torch.zeros_like(parameter, requires_grad=False) for name, parameter in parameters.items()}
