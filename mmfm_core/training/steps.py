"""Local training steps."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor, nn

from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel
from mmfm_core.privacy.step import Mechanism, noisy_gradients, patients_of


@dataclass(frozen=True)
class Rule:
    """What a federated method adds to plain training.

    Attributes:
        anchors: parameters, and what they are held to.
        strength: of that: `strength / 2 * |w - anchor|^2` is added to the objective.
        correction: added to the gradients of the parameters it names.
        first: what `Stage.local_first` trains alone, before the others.
    """

    anchors: Mapping[str, Tensor] = field(default_factory=dict)
    strength: float = 0.0
    correction: Mapping[str, Tensor] = field(default_factory=dict)
    first: Collection[str] = ()


PLAIN = Rule()


def train(
    model: MultimodalModel,
    dataset: Dataset,
    stage: Stage,
    trainable: Collection[str],
    rule: Rule = PLAIN,
    mechanism: Mechanism | None = None,
) -> float:
    """Train the parameters named in `trainable` for the stage's local steps, and return the mean loss.

    Every loss is reduced within a study before the mean over the batch, so that no patient's gradient depends on
    another's. Randomness comes from torch's global generator: seed it first (`mmfm_core.models.model.seeded`).

    With a `mechanism` every step is private, also one that trains only what is local: its noise protects what later
    steps make of it. Then the loss is the one thing that has no noise.

    Raises:
        MmfmError: the site has no training study with a label, or the loss is not finite.
    """
    tasks = {name: task for name, task in stage.tasks.items() if name in model.heads or name in model.objectives}
    rows = dataset.rows("train", list(tasks))
    if not rows:
        raise MmfmError(
            f"no training study has a label or modality for {', '.join(stage.tasks)}; map it in the site's file"
        )
    phases = [(set(trainable), stage.local_steps)]
    if stage.local_first:
        first = set(trainable) & set(rule.first)
        phases = [(first, stage.local_first), (set(trainable) - first, stage.local_steps - stage.local_first)]
    parameters = dict(model.named_parameters())
    if parameters.keys().isdisjoint(trainable):
        raise MmfmError(f"stage '{stage.name}' trains nothing that this site holds; check 'train' and 'parameters'")

    def losses(batch: Batch) -> Tensor:
        each = model.losses(batch, tasks)
        weighted = [task.weight * each[name] for name, task in tasks.items()]
        return weighted[0] if len(weighted) == 1 else torch.stack(weighted).sum(0)

    gradients: Callable[[Mapping[str, nn.Parameter]], float | Tensor]
    if mechanism:
        patients = patients_of(dataset, rows)
        gradients = partial(
            noisy_gradients, model, losses, dataset, patients, mechanism=mechanism, at_once=stage.batch_size
        )
    else:
        batches = shuffled_batches(rows, stage.batch_size, stage.local_steps)
        gradients = partial(_plain_gradients, model, losses, dataset, batches)
    total = torch.zeros((), device=model.device)
    for names, steps in phases:
        trained = {name: parameter for name, parameter in parameters.items() if name in names}
        for name, parameter in parameters.items():
            parameter.requires_grad_(name in trained)
        if not trained:
            continue
        model.train()  # after the flags: a frozen trunk has no dropout
        optimizer = optimizer_of(stage, list(trained.values()))
        for _ in range(steps):
            total += gradients(trained)
            _apply(rule, trained)
            optimizer.step()
    if not torch.isfinite(total):
        raise MmfmError(f"the training loss of stage '{stage.name}' is not finite; lower its optimizer.lr")
    return float(total) / stage.local_steps


def _plain_gradients(
    model: MultimodalModel,
    losses: Callable[[Batch], Tensor],
    dataset: Dataset,
    batches: Iterator[tuple[list[int], list[int]]],
    parameters: Mapping[str, nn.Parameter],
) -> Tensor:
    """Set `.grad` to that of the mean loss over the next batch, and return that loss."""
    for parameter in parameters.values():
        parameter.grad = None
    with torch.autocast(model.device.type, model.precision, enabled=model.precision != torch.float32):
        loss = losses(dataset.batch(*next(batches))).float().mean()
    loss.backward()
    return loss.detach()


def _apply(rule: Rule, trained: Mapping[str, nn.Parameter]) -> None:
    if not rule.strength and not rule.correction:
        return
    for name, parameter in trained.items():
        if parameter.grad is not None:
            if rule.strength and name in rule.anchors:
                parameter.grad.add_(parameter.detach() - rule.anchors[name], alpha=rule.strength)
            if name in rule.correction:
                parameter.grad.add_(rule.correction[name])


def optimizer_of(stage: Stage, parameters: Sequence[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimiser that a stage names, fresh.

    Fused: torch's default walks through the parameters in Python, a third of a small model's step.
    """
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[stage.optimizer.type]
    return kind(parameters, lr=stage.optimizer.lr, weight_decay=stage.optimizer.weight_decay, fused=True)


def shuffled_batches(rows: Sequence[int], size: int, steps: int) -> Iterator[tuple[list[int], list[int]]]:
    """`steps` batches without repetition inside a pass over `rows`; the remainder of a pass is dropped.

    Beside each the one after it, which is empty at the end of a pass: the next one's order is not drawn yet.
    """
    size = min(size, len(rows))
    order: list[int] = []
    for _ in range(steps):
        if len(order) < size:
            order = [rows[i] for i in torch.randperm(len(rows)).tolist()]
        batch, order = order[:size], order[size:]
        yield batch, order[:size] if len(order) >= size else []
