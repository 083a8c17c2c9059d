"""Linear layers, and convolutions that cut patches: most of a transformer.

Shapes: T tokens of a patient's studies and of all uses together, d features in, p out.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce
from typing import cast

import torch
from torch import Tensor, nn

from mmfm_core.privacy.engines.layer import Layer, Scale, Use
from mmfm_core.privacy.engines.rows import Rows

CANCELLED = 1e-3
"""Of the bound that Cauchy and Schwarz give: below it, a squared norm by Gram matrices is too much of rounding."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Linear(Layer):
    """A patient's gradient is g^T x over its tokens, and for the bias g^T 1; their norm needs these, or Gram matrices.

    Whichever is smaller, as in Bu et al. 2022 (2210.00038, mixed ghost norm): p × d, or twice T × T. Where it is the
    former, it is smaller than the tokens too, and is kept in their place for the weighted sum.
    """

    def __init__(
        self,
        module: nn.Module,
        trained: Collection[str],
        uses: Sequence[Use],
        rows: Rows,
        transposed: bool = False,
    ) -> None:
        x, gradient = (_tokens(each, rows) for each in zip(*((use.x, use.gradient) for use in uses), strict=True))
        self.sizes, self.transposed = [patients for patients, _ in rows.groups], transposed
        self.shape: torch.Size = cast(Tensor, module.weight).shape
        product = _Product if "weight" in trained else _Sum
        self.groups = [product(*group, "bias" in trained) for group in zip(x, gradient, strict=True)]

    def squares(self) -> Tensor:
        squares = [group.squares() for group in self.groups]
        return squares[0] if len(squares) == 1 else torch.cat(squares)

    def weighted(self, scale: Scale) -> Mapping[str, Tensor]:
        parts = [group.weighted(part) for group, part in zip(self.groups, scale.split(self.sizes), strict=True)]
        total = {name: reduce(torch.add, [part[name] for part in parts]) for name in parts[0]}
        if "weight" in total:
            total["weight"] = (total["weight"].T if self.transposed else total["weight"]).reshape(self.shape)
        return total


class _Sum:
    """The gradients g^T 1 of n patients' biases, [n, p], of g [n, T, p]."""

    def __init__(self, x: Tensor, gradient: Tensor, bias: bool) -> None:
        self.bias = gradient.sum(1)

    def squares(self) -> Tensor:
        return self.bias.square().sum(1)

    def weighted(self, scale: Scale) -> dict[str, Tensor]:
        return {"bias": scale.contracted(self.bias)}


class _Product:
    """The gradients g^T x of n patients, [n, p, d], of x [n, T, d] and g [n, T, p]; made where they are the smaller.

    With a bias x has one more column, of ones.
    """

    def __init__(self, x: Tensor, gradient: Tensor, bias: bool) -> None:
        self.x, self.gradient, self.bias = x, gradient, bias
        self.made: dict[str, Tensor] = {}
        (_, tokens, d), p = x.shape, gradient.shape[2]
        if tokens * (d + p) >= d * p:
            self._make()

    def squares(self) -> Tensor:
        if not self.made:
            inputs, outputs = self.x @ self.x.transpose(1, 2), self.gradient @ self.gradient.transpose(1, 2)
            if self.bias:
                inputs += 1
            squares = torch.linalg.vecdot(inputs.flatten(1), outputs.flatten(1))
            bounds = inputs.diagonal(dim1=1, dim2=2).sum(1) * outputs.diagonal(dim1=1, dim2=2).sum(1)
            if not (squares < CANCELLED * bounds).any():
                return squares
            self._make()
        return reduce(torch.add, [each.flatten(1).square().sum(1) for each in self.made.values()])

    def weighted(self, scale: Scale) -> dict[str, Tensor]:
        if self.made:
            return {name: scale.contracted(each) for name, each in self.made.items()}
        x, gradient = scale.finite(self.x), scale.times(self.gradient)
        flat = gradient.flatten(0, 1)
        total = {"weight": flat.T @ x.flatten(0, 1)}
        return total | {"bias": flat.sum(0)} if self.bias else total

    def _make(self) -> None:
        self.made = {"weight": self.gradient.transpose(1, 2) @ self.x}
        if self.bias:
            self.made["bias"] = self.gradient.sum(1)
        del self.x, self.gradient


def _tokens(each: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """[R, ..., d] of each use -> [patients, T, d] of each group."""
    flat = [x.reshape(len(x), -1, x.shape[-1]) for x in each]
    together = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    return [group.flatten(1, 2) for group in rows.folded(together)]


def cuts_patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, uses: Sequence[Use]) -> bool:
    """Whether a convolution's kernels tile its input: then it is a linear layer on patches."""
    return (
        type(module) in CONVOLUTIONS  # a subclass may read its weight in its own way
        and module.kernel_size == module.stride
        and module.groups == 1
        and not any(module.padding)
        and set(module.dilation) == {1}
        and all(side % k == 0 for use in uses for side, k in zip(use.x.shape[2:], module.kernel_size, strict=True))
    )


def of_patches(use: Use, kernel: Sequence[int]) -> Use:
    """[R, C, *size] -> [R, patches, C * kernel], and the gradient [R, p, *patches] -> [R, patches, p]."""
    x = use.x
    for axis, side in enumerate(kernel):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    places, inside = range(2, x.ndim, 2), range(3, x.ndim, 2)
    x = x.permute(0, *places, 1, *inside)
    return Use(x.reshape(len(x), math.prod(x.shape[1 : 1 + len(kernel)]), -1), use.gradient.flatten(2).transpose(1, 2))
