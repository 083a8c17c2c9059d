"""Local training steps."""

from collections.abc import Collection, Iterator, Sequence

import torch
from torch import nn

from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel


def train(
    model: MultimodalModel, dataset: Dataset, stage: Stage, trainable: Collection[str], shared: Collection[str] = ()
) -> float:
    """Train the parameters named in `trainable` for the stage's local steps, and return the mean loss.

    Those of them that are `shared` are held to where they begin, as strongly as `stage.proximal` says.

    Every loss is reduced within a study before the mean over the batch, so that no patient's gradient depends on
    another's. Randomness comes from torch's global generator: seed it first (`mmfm_core.models.model.seeded`).

    Raises:
        MmfmError: the site has no training study with a label, or the loss is not finite.
    """
    tasks = {name: task for name, task in stage.tasks.items() if name in model.heads or name in model.objectives}
    rows = dataset.rows("train", list(tasks))
    if not rows:
        raise MmfmError(
            f"no training study has a label or modality for {', '.join(stage.tasks)}; map it in the site's file"
        )
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in trainable)
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise MmfmError(f"stage '{stage.name}' trains nothing that this site holds; check 'train' and 'parameters'")
    optimizer = optimizer_of(stage, parameters)
    held = [
        (parameter, parameter.detach().clone())
        for name, parameter in model.named_parameters()
        if stage.proximal and parameter.requires_grad and name in shared
    ]
    model.train()
    total = torch.zeros(())
    for batch_rows in shuffled_batches(rows, stage.batch_size, stage.local_steps):
        batch = dataset.batch(batch_rows)
        losses = model.losses(batch, tasks)
        loss = torch.stack([task.weight * losses[name].mean() for name, task in tasks.items()]).sum()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        for parameter, start in held:
            if parameter.grad is not None:
                parameter.grad.add_(parameter.detach() - start, alpha=stage.proximal)
        optimizer.step()
        total += loss.detach()
    mean = float(total) / stage.local_steps
    if not torch.isfinite(total):
        raise MmfmError(f"the training loss of stage '{stage.name}' is not finite; lower its optimizer.lr")
    return mean


def optimizer_of(stage: Stage, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a stage names, fresh."""
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[stage.optimizer.type]
    return kind(parameters, lr=stage.optimizer.lr, weight_decay=stage.optimizer.weight_decay)


def shuffled_batches(rows: Sequence[int], size: int, steps: int) -> Iterator[list[int]]:
    """`steps` batches without repetition inside a pass over `rows`; the remainder of a pass is dropped."""
    size = min(size, len(rows))
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = [rows[i] for i in torch.randperm(len(rows)).tolist()]
        batch, order = order[:size], order[size:]
        yield batch
