"""Linear layers, and convolutions that cut patches: most of a transformer.

Shapes: T tokens of a patient's studies and of all uses together, d features in, p out.
"""

import math
from collections.abc import Collection, Mapping, Sequence
from functools import reduce

import torch
from torch import Tensor, nn

from mmfm_core.privacy.engines.layer import Layer, Use, contracted, scaled
from mmfm_core.privacy.engines.rows import Rows

CANCELLED = 1e-3
"""Of the bound that Cauchy and Schwarz give: below it, a squared norm by Gram matrices is too much of rounding."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class Linear(Layer):
    """A patient's gradient is g^T x over its tokens; its norm needs that matrix, or two T × T Gram matrices.

    Whichever is smaller, as in Bu et al. 2022 (2210.00038, mixed ghost norm). Where it is the matrix, it is smaller
    than the tokens too, and is kept in their place for the weighted sum.
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
        self.rows, self.transposed = rows, transposed
        self.shape: torch.Size = dict(module.named_parameters())["weight"].shape
        self.weights = [_Product(*group) for group in zip(x, gradient, strict=True)] if "weight" in trained else []
        self.bias = torch.cat([group.sum(1) for group in gradient]) if "bias" in trained else None

    def squares(self) -> Tensor:
        squares = [torch.cat([weight.squares() for weight in self.weights])] if self.weights else []
        if self.bias is not None:
            squares.append(self.bias.square().sum(1))
        return reduce(torch.add, squares)

    def weighted(self, scale: Tensor) -> Mapping[str, Tensor]:
        total = {}
        if self.weights:
            scales = scale.split([patients for patients, _ in self.rows.groups])
            weight = reduce(torch.add, [w.weighted(s) for w, s in zip(self.weights, scales, strict=True)])
            total["weight"] = (weight.T if self.transposed else weight).reshape(self.shape)
        if self.bias is not None:
            total["bias"] = contracted(scale, self.bias)
        return total


class _Product:
    """The gradients g^T x of n patients, [n, p, d], of x [n, T, d] and g [n, T, p]; made where they are the smaller."""

    def __init__(self, x: Tensor, gradient: Tensor) -> None:
        self.matrix: Tensor | None = None
        (_, tokens, d), p = x.shape, gradient.shape[2]
        if tokens * (d + p) < d * p:
            self.x, self.gradient = x, gradient
        else:
            self.matrix = gradient.transpose(1, 2) @ x

    def squares(self) -> Tensor:
        if self.matrix is None:
            x, gradient = self.x, self.gradient
            inputs, outputs = x @ x.transpose(1, 2), gradient @ gradient.transpose(1, 2)
            squares = torch.linalg.vecdot(inputs.flatten(1), outputs.flatten(1))
            traces = (gram.diagonal(dim1=1, dim2=2).sum(1) for gram in (inputs, outputs))
            if not (squares < CANCELLED * math.prod(traces)).any():
                return squares
            self.matrix = gradient.transpose(1, 2) @ x
        return self.matrix.square().sum((1, 2))

    def weighted(self, scale: Tensor) -> Tensor:
        if self.matrix is not None:
            return contracted(scale, self.matrix)
        some, (x, gradient) = scale > 0, (self.x, self.gradient)
        narrow = x.shape[2] < gradient.shape[2]
        x, gradient = (scaled(scale if of else some, each) for each, of in ((x, narrow), (gradient, not narrow)))
        return gradient.flatten(0, 1).T @ x.flatten(0, 1)


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
