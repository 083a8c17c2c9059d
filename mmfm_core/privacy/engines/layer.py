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


@dataclass(frozen=True)
class Scale:
    """What the gradient of each patient, or row, is multiplied by.

    Attributes:
        factors: [N]. Where one is zero the product is zero, even of what is not finite.
        kept: which of them are not zero, [N] bool; None where all are.
    """

    factors: Tensor
    kept: Tensor | None

    @classmethod
    def of(cls, factors: Tensor) -> "Scale":
        """With what follows from the factors."""
        kept = factors > 0
        return cls(factors, None if kept.all() else kept)

    def at(self, places: Tensor) -> "Scale":
        """The scale of rows that belong to these places of this one."""
        return Scale(self.factors[places], None if self.kept is None else self.kept[places])

    def split(self, sizes: list[int]) -> list["Scale"]:
        """Parts of so many each."""
        kept = [None] * len(sizes) if self.kept is None else self.kept.split(sizes)
        return [Scale(*part) for part in zip(self.factors.split(sizes), kept, strict=True)]

    def finite(self, x: Tensor) -> Tensor:
        """Rows of x ([N, ...]) as they are, but zero where the factor is."""
        return x if self.kept is None else torch.where(self.kept.reshape(-1, *[1] * (x.ndim - 1)), x, 0.0)

    def times(self, x: Tensor) -> Tensor:
        """Rows of x ([N, ...]) times their factors."""
        return self.finite(x) * self.factors.reshape(-1, *[1] * (x.ndim - 1))

    def contracted(self, x: Tensor) -> Tensor:
        """The sum over the rows of x ([N, ...]) times their factors."""
        return torch.tensordot(self.factors, self.finite(x), dims=([0], [0]))


class Layer(ABC):
    """A layer's trained parameters."""

    @abstractmethod
    def squares(self) -> Tensor:
        """The squared norm of each patient's gradient, [P]."""

    @abstractmethod
    def weighted(self, scale: Scale) -> Mapping[str, Tensor]:
        """The patients' gradients times their `scale` ([P]), summed, by the layer's own names."""
