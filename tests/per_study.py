"""The gradient of each study as hooks see it, against autograd on one study at a time."""

from collections.abc import Callable

import torch
from opacus import GradSampleModule
from torch import Tensor, nn

from mmfm_core.models.model import MultimodalModel


def assert_gradients_separate(model: MultimodalModel, losses: Callable[[list[int]], Tensor], studies: int) -> None:
    """Check every parameter that the losses ([B], of the studies with these row numbers) use, and that some do."""
    model.train()  # hooks look only at a model in training
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    parameters = dict(model.named_parameters())
    truths = [
        torch.autograd.grad(losses([row]).sum(), list(parameters.values()), allow_unused=True) for row in range(studies)
    ]

    class Losses(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, rows: list[int]) -> Tensor:
            return losses(rows)

    hooked = GradSampleModule(Losses(), loss_reduction="sum", strict=False)
    hooked(list(range(studies))).sum().backward()
    used = 0
    for index, (name, parameter) in enumerate(parameters.items()):
        if all(truth[index] is None for truth in truths):
            assert parameter.grad is None or not parameter.grad.any(), name
            continue
        used += 1
        seen = getattr(parameter, "grad_sample", None)
        assert seen is not None, f"{name} has no gradient per study"
        for row in range(studies):
            truth = truths[row][index]
            truth = torch.zeros_like(parameter) if truth is None else truth
            torch.testing.assert_close(seen[row], truth, rtol=1e-3, atol=1e-5, msg=f"{name}, study {row}")
    assert used > 10
