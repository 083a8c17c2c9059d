"""What each kind of layer adds to the patients' squared norms, and its part of the weighted sum."""

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import cached_property, reduce
from typing import Any

import torch
from torch import Tensor, nn

from mmfm_core.privacy.engines.layer import Layer, Scale, Use
from mmfm_core.privacy.engines.linear import CONVOLUTIONS, Linear, cuts_patches, of_patches
from mmfm_core.privacy.engines.rows import Rows


def layer_of(module: nn.Module, trained: Collection[str], uses: Sequence[Use], rows: Rows) -> Layer:
    """How to compute the gradients of the parameters `trained` of a layer."""
    from transformers.pytorch_utils import Conv1D

    if type(module) is nn.Embedding:
        return _Embedding(module, uses, rows)
    if type(module) in (nn.Linear, Conv1D):
        return Linear(module, trained, uses, rows, transposed=type(module) is Conv1D)
    if isinstance(module, CONVOLUTIONS) and cuts_patches(module, uses):
        return Linear(module, trained, [of_patches(use, module.kernel_size) for use in uses], rows)
    return _Sampled(module, trained, uses, rows)


class _Embedding(Layer):
    """A patient's gradient lies in the rows of the tokens it has, which are summed without making the table."""

    def __init__(self, module: nn.Embedding, uses: Sequence[Use], rows: Rows) -> None:
        self.shape = module.weight.shape
        patient = rows.patient
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

    def weighted(self, scale: Scale) -> Mapping[str, Tensor]:
        part = scale.at(self.patient).times(self.sums)
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

    def weighted(self, scale: Scale) -> Mapping[str, Tensor]:
        if self.keep:
            return {name: scale.contracted(gradient) for name, gradient in self.kept.items()}
        scale = scale.at(self.rows.patient)
        total = [torch.zeros_like(parameter) for parameter in self.parameters.values()]
        for use in self.uses:
            with torch.enable_grad():
                y = self.module(scale.finite(use.x))
            parts = torch.autograd.grad(y, list(self.parameters.values()), scale.times(use.gradient))
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
