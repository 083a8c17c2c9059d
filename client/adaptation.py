"""Adaptation that does no harm: how far a site goes from the shared state is for its validation patients to say."""

from collections.abc import Sequence

import numpy as np
import torch

from client.loading import load
from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Dataset
from mmfm_core.metrics.ranking import Floats
from mmfm_core.models.model import MultimodalModel
from mmfm_core.storage import Tensors
from mmfm_core.training.evaluation import BATCH


def choose(
    model: MultimodalModel, dataset: Dataset, stage: Stage, before: Tensors, after: Tensors
) -> tuple[float, Tensors]:
    """How far to go from the state `before` to `after`, and the state there.

    One choice, `interpolate: [1]` for example, needs nobody's opinion.
    """
    shares = sorted(stage.interpolate)
    states = [between(before, after, share) for share in shares]
    chosen = 0
    if len(shares) > 1:
        losses = [validation_losses(model, dataset, stage, state) for state in states]
        chosen = nearest_within_noise(losses)
    return shares[chosen], states[chosen]


def between(before: Tensors, after: Tensors, share: float) -> Tensors:
    """The state `share` of the way; tensors that are not of real numbers go all the way, unless none is gone."""
    return {
        name: (
            ((1 - share) * before[name] + share * tensor).astype(tensor.dtype)
            if tensor.dtype.kind == "f"
            else (tensor if share else before[name])
        )
        for name, tensor in after.items()
    }


def validation_losses(model: MultimodalModel, dataset: Dataset, stage: Stage, state: Tensors) -> Floats:
    """The stage's loss of each validation patient, [P]: the mean over the patient's studies."""
    load(model, state)
    model.eval()
    tasks = {name: task for name, task in stage.tasks.items() if name in model.heads or name in model.objectives}
    rows = dataset.rows("val", list(tasks))
    losses: list[float] = []
    with torch.inference_mode():
        for start in range(0, len(rows), BATCH):
            each = model.losses(dataset.batch(rows[start : start + BATCH]), tasks)
            losses += torch.stack([task.weight * each[name] for name, task in tasks.items()]).sum(0).tolist()
    patients, patient = np.unique([dataset.studies[row].patient for row in rows], return_inverse=True)
    sums = np.bincount(patient, losses, minlength=len(patients))
    means: Floats = sums / np.bincount(patient, minlength=len(patients))
    return means


def nearest_within_noise(losses: Sequence[Floats]) -> int:
    """The first candidate whose mean loss is within one standard error of the best one's.

    Candidates go from the shared state outwards, each with the losses of the same patients [P]. The standard error is
    that of the paired difference, so that few patients, or patients who disagree, keep a site near the shared state;
    with fewer than two it stays there. (The one-standard-error rule: Breiman et al. 1984, section 3.4.3.)
    """
    patients = len(losses[0])
    if patients < 2:
        return 0
    best = min(losses, key=lambda each: float(each.mean()))
    for index, each in enumerate(losses):
        worse = each - best
        if worse.mean() <= worse.std(ddof=1) / patients**0.5:
            return index
    return len(losses) - 1
