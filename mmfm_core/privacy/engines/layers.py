"""What one layer adds to each patient's squared norm, and its part of the weighted sum, from what was booked of it.

A layer that was used several times in one pass adds the sum over its uses, before the norm.
Shapes: R rows (studies), P patients, T tokens of a patient's studies and of all uses together, d features in, p out.
"""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn

from mmfm_core.privacy.engines.rows import Rows

CANCELLED = 1e-3
"""Of the bound that Cauchy and Schwarz give: below it, a squared norm by Gram matrices is too much of rounding."""


CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


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


def layer_of(module: nn.Module, trained: Collection[str], uses: Sequence[Use], rows: Rows) -> Layer:
    """How to compute the gradients of the parameters `trained` of a layer."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Embedding:
        return _Embedding(module, uses, rows)
    if type(module) in (nn.Linear, Conv1D):
        return _Linear(module, trained, uses, rows, transposed=type(module) is Conv1D)
    if isinstance(module, CONVOLUTIONS) and _cuts_patches(module, uses):
        return _Linear(module, trained, [_of_patches(use, module.kernel_size) for use in uses], rows)
    return _Sampled(module, trained, uses, rows)


class _Linear(Layer):
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


class _Embedding(Layer):
    """A patient's gradient lies in the rows of the tokens it has, which are summed without making the table."""

    def __init__(self, module: nn.Embedding, uses: Sequence[Use], rows: Rows) -> None:
        self.shape, device = module.weight.shape, module.weight.device
        patient = rows.spread(torch.arange(rows.patients, device=device))
        keys = [(patient[:, None] * self.shape[0] + use.x.reshape(len(use.x), -1)).flatten() for use in uses]
        gradients = [use.gradient.reshape(-1, self.shape[1]) for use in uses]
        found, place = torch.cat(keys).unique(return_inverse=True)
        self.patient, self.token = found // self.shape[0], found % self.shape[0]
        self.sums = module.weight.new_zeros(len(found), self.shape[1]).index_add_(0, place, torch.cat(gradients))
        if module.padding_idx is not None:
            self.sums[self.token == module.padding_idx] = 0.0
        self.patients = rows.patients

    def squares(self) -> Tensor:
        return self.sums.new_zeros(self.patients).index_add_(0, self.patient, self.sums.square().sum(1))

    def weighted(self, scale: Tensor) -> Mapping[str, Tensor]:
        part = scaled(scale[self.patient], self.sums)
        return {"weight": part.new_zeros(self.shape).index_add_(0, self.token, part)}


class _Sampled(Layer):
    """Any other layer, by Opacus' function for its type, or by functorch, which takes any layer of one input.

    What it gives is kept where it is smaller than what it was made from; else the layer is run once more, backwards
    with the weighted gradient.
    """

    def __init__(self, module: nn.Module, trained: Collection[str], uses: Sequence[Use], rows: Rows) -> None:
        self.module, self.uses, self.rows = module, uses, rows
        self.parameters = {name: getattr(module, name) for name in trained}
        size = sum(parameter.numel() for parameter in self.parameters.values()) * rows.patients
        self.keep = size <= sum(use.x.numel() + use.gradient.numel() for use in uses)

    @cached_property
    def kept(self) -> dict[str, Tensor]:
        return self._each()

    def squares(self) -> Tensor:
        each = self.kept if self.keep else self._each()
        return reduce(torch.add, [gradient.flatten(1).square().sum(1) for gradient in each.values()])

    def weighted(self, scale: Tensor) -> Mapping[str, Tensor]:
        if self.keep:
            return {name: contracted(scale, gradient) for name, gradient in self.kept.items()}
        scale = self.rows.spread(scale)
        total = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        for use in self.uses:
            with torch.enable_grad():
                y = self.module(scaled(scale > 0, use.x))
            parts = torch.autograd.grad(y, list(self.parameters.values()), scaled(scale, use.gradient))
            total = [whole + part for whole, part in zip(total, parts, strict=True)]
        return dict(zip(self.parameters, total, strict=True))

    def _each(self) -> dict[str, Tensor]:
        """Each patient's gradient, [P, ...]."""
        sampler = sampler_of(self.module)
        each: dict[str, Tensor] = {}
        for use in self.uses:
            # Opacus reads the strides of a convolution's input wrongly unless they are contiguous.
            found = sampler(self.module, [use.x.contiguous()], use.gradient.contiguous())
            for name, parameter in self.parameters.items():
                part = self.rows.summed(found[parameter])
                each[name] = each[name] + part if name in each else part
        return each


def sampler_of(module: nn.Module) -> Callable[[nn.Module, list[Tensor], Tensor], dict[Any, Tensor]]:
    """Opacus' function from a layer, its inputs and the gradient of its output to gradients of each row."""
    from opacus.grad_sample import GradSampleModule
    from opacus.grad_sample.functorch import ft_compute_per_sample_gradient

    from mmfm_core.models import _torchvision_ops  # noqa: F401
    from timm.layers import LayerNorm  # isort: skip

    kind = nn.LayerNorm if type(module) is LayerNorm else type(module)
    # Opacus' layer norm asks a bias that is not there, and its convolutions take all padding for zeros.
    special = getattr(module, "bias", True) is None if kind is nn.LayerNorm else False
    special |= getattr(module, "padding_mode", "zeros") != "zeros"
    registered = GradSampleModule.GRAD_SAMPLERS.get(kind, ft_compute_per_sample_gradient)
    return ft_compute_per_sample_gradient if special else registered


def scaled(scale: Tensor, x: Tensor) -> Tensor:
    """Rows of x ([N, ...]) times `scale` ([N], number or bool), and zero where it is zero, even what is not finite."""
    shape = (-1, *[1] * (x.ndim - 1))
    if scale.dtype == torch.bool:
        return x if scale.all() else torch.where(scale.reshape(shape), x, 0.0)
    return scaled(scale > 0, x) * scale.reshape(shape)


def contracted(scale: Tensor, x: Tensor) -> Tensor:
    """The sum of the rows of x ([N, ...]) times `scale` ([N]), zero where that is zero."""
    return torch.tensordot(scale, scaled(scale > 0, x), dims=([0], [0]))


def _tokens(each: Sequence[Tensor], rows: Rows) -> list[Tensor]:
    """[R, ..., d] of each use -> [patients, T, d] of each group."""
    flat = [x.reshape(len(x), -1, x.shape[-1]) for x in each]
    together = torch.cat(flat, 1) if len(flat) > 1 else flat[0]
    return [group.flatten(1, 2) for group in rows.folded(together)]


def _cuts_patches(module: nn.Conv1d | nn.Conv2d | nn.Conv3d, uses: Sequence[Use]) -> bool:
    """Whether a convolution's kernels tile its input: then it is a linear layer on patches."""
    return (
        type(module) in CONVOLUTIONS  # a subclass may read its weight in its own way
        and module.kernel_size == module.stride
        and module.groups == 1
        and not any(module.padding)
        and set(module.dilation) == {1}
        and all(side % k == 0 for use in uses for side, k in zip(use.x.shape[2:], module.kernel_size, strict=True))
    )


def _of_patches(use: Use, kernel: Sequence[int]) -> Use:
    """[R, C, *size] -> [R, patches, C * kernel], and the gradient [R, p, *patches] -> [R, patches, p]."""
    x = use.x
    for axis, side in enumerate(kernel):
        x = x.unflatten(2 + 2 * axis, (-1, side))
    places, inside = range(2, x.ndim, 2), range(3, x.ndim, 2)
    x = x.permute(0, *places, 1, *inside)
    return Use(x.reshape(len(x), math.prod(x.shape[1 : 1 + len(kernel)]), -1), use.gradient.flatten(2).transpose(1, 2))
