"""What is booked of a layer, and what it is asked.

A layer that was used several times in one pass adds the sum over its uses, before the norm.
Shapes, here and in the layers: R rows (studies), P patients.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Use:
    """One call of a layer: what went in, [R, ...], and the gradient of the loss by what came out, [R, ...]."""

    x: Tensor
    gradient: Tensor


class Layer(ABC):
    """A layer's trained parameters."""

    @abstractmethod
    def squares(self) -> Tensor:
        """The squared norm of each patient's gradient, [P]."""

    @abstractmethod
    def weighted(self, scale: Tensor) -> Mapping[str, Tensor]:
        """The patients' gradients times their `scale` ([P]), summed, by the layer's own names.

        A patient of scale zero adds zero, whatever was booked of it.
        """


def scaled(scale: Tensor, x: Tensor) -> Tensor:
    """Rows of x ([N, ...]) times `scale` ([N], number or bool), and zero where it is zero, even what is not finite."""
    shape = (-1, *[1] * (x.ndim - 1))
    if scale.dtype == torch.bool:
        return x if scale.all() else torch.where(scale.reshape(shape), x, 0.0)
    return scaled(scale > 0, x) * scale.reshape(shape)


def contracted(scale: Tensor, x: Tensor) -> Tensor:
    """The sum of the rows of x ([N, ...]) times `scale` ([N]), zero where that is zero."""
    return torch.tensordot(scale, scaled(scale > 0, x), dims=([0], [0]))
