"""The gradient of every study as Opacus' hooks see it, folded by patient: the independent cross-check."""

import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.engines.base import Clipped, Losses, scales, zeros
from mmfm_core.privacy.engines.layer import Scale
from mmfm_core.privacy.engines.rows import rows_of
from mmfm_core.privacy.engines.support import unsupported

OPACUS = ("grad_sample", "_forward_counter", "_current_grad_sample")
"""What it writes on parameters."""


class _Model(nn.Module):
    """The losses as the output of a module, so that hooks find the model's layers under it."""

    def __init__(self, model: nn.Module, losses: Losses) -> None:
        super().__init__()
        self.model, self.losses = model, losses

    def forward(self, batch: Batch) -> Tensor:
        return self.losses(batch)


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    batch: Batch,
    patients: Tensor,
    parameters: Mapping[str, nn.Parameter],
    max_norm: float,
) -> Clipped:
    """See `Engine`. Memory grows with the number of studies times that of parameters.

    Raises:
        MmfmError: see `unsupported`; or Opacus misses a parameter that has a gradient. Use `loop`.
    """
    if reason := unsupported(model, parameters):
        raise _refused(reason)
    total = zeros(parameters)
    if not len(batch):
        return Clipped(total, 0.0, 0)
    rows = rows_of(patients)
    weight = 1 / rows.studies
    with _hooked(_Model(model, losses)) as hooked:
        each = hooked(batch.rows(rows.order.tolist()))
        gradients = _gradients((each * weight).sum(), parameters)
    gradients = {name: rows.summed(gradient) for name, gradient in gradients.items()}
    of_patients = rows.summed(each.detach() * weight)
    squares = [gradient.flatten(1).square().sum(1) for gradient in gradients.values()]
    norms = torch.stack(squares).sum(0).sqrt() if squares else torch.zeros_like(of_patients)
    scale = scales(norms, of_patients, max_norm)
    total |= {name: Scale.of(scale).contracted(gradient) for name, gradient in gradients.items()}
    kept = scale > 0
    return Clipped(total, float(of_patients[kept].sum()), int((~kept).sum()))


def _gradients(loss: Tensor, parameters: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of each study, [R, ...], of the parameters that the loss reaches."""
    if not loss.requires_grad:
        return {}
    reached = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    found = {}
    for (name, parameter), whole in zip(parameters.items(), reached, strict=True):
        if whole is None:
            continue
        # Opacus pairs calls with gradients from the last one backwards: one without a gradient would shift the others.
        written = vars(parameter)
        if written["_forward_counter"] or written["grad_sample"] is None:
            raise _refused(f"not every call of the layer of '{name}' led to the loss, or no hook saw it")
        found[name] = written["grad_sample"]
    return found


@contextmanager
def _hooked(model: nn.Module) -> Iterator[nn.Module]:
    """The model with Opacus' hooks, and without a trace of them afterwards, so that no step sees another's."""
    from opacus import GradSampleModule

    hooked = GradSampleModule(model, loss_reduction="sum", strict=False)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings(
                "ignore", "Full backward hook is firing"
            )  # on a model whose inputs need no gradient
            yield hooked
    finally:
        hooked.remove_hooks()
        for parameter in model.parameters():
            for name in OPACUS:
                vars(parameter).pop(name, None)
        for module in model.modules():
            vars(module).pop("activations", None)
            vars(module).pop("max_batch_len", None)


def _refused(reason: str) -> MmfmError:
    return MmfmError(f"clipping by hooks: {reason}; use the engine 'loop', which takes any model")
