"""What one study costs on this machine, measured with the document's own model."""

import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from client.loading import arrays
from mmfm_core.config import Federation
from mmfm_core.config.modality import TableModality, TextModality
from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.data.features import with_features
from mmfm_core.data.manifest import Study
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.parameters import fates_of, held

STUDIES = (1, 4, 16)  # in a step that is measured
STEPS = 3  # of which the fastest counts: the first also allocates
A_MOMENT = 0.5  # seconds
A_TOKEN = 5  # it and the one before it: ids that every tokenizer has and that are no padding


@dataclass(frozen=True)
class Seconds:
    """What one study with every modality costs on this machine: in each training step, and once for frozen trunks."""

    step: float
    once: float


def cost_of_a_study(model: MultimodalModel, federation: Federation) -> Seconds:
    """Measured on random studies: on a batch as large as `A_MOMENT` lets it be, for a plan is not to be waited for."""
    for studies in STUDIES:
        started = time.perf_counter()
        cost = _cost(model, federation, studies)
        if time.perf_counter() - started > A_MOMENT:
            break
    return cost


def _cost(model: MultimodalModel, federation: Federation, studies: int) -> Seconds:
    frozen = held(fates_of(federation, arrays(model)), "frozen")
    started = time.perf_counter()
    with TemporaryDirectory() as cache:
        names = [Study(row, str(row), str(row), "train", {}, {}) for row in range(studies)]
        random = Dataset(_random_batch(federation, studies), names)
        batch = with_features(random, model, federation.model, frozen, Path(cache)).everything
    once = (time.perf_counter() - started) / studies if batch.features else 0.0
    model.train()
    steps: list[float] = []
    while len(steps) < STEPS and sum(steps) < A_MOMENT:
        started = time.perf_counter()
        losses = model.losses(batch, list(federation.model.tasks)).values()
        torch.stack([loss.sum() for loss in losses]).sum().backward()
        steps.append(time.perf_counter() - started)
    return Seconds(min(steps) / studies, once)


def _random_batch(federation: Federation, studies: int) -> Batch:
    inputs = {}
    for name, modality in federation.model.modalities.items():
        if isinstance(modality, TextModality):
            inputs[name] = torch.full((studies, modality.max_length), A_TOKEN)
            for row in range(studies):  # what is alike would be computed once
                inputs[name][row, row % modality.max_length] = A_TOKEN - 1
        elif isinstance(modality, TableModality):
            inputs[name] = torch.zeros(studies, len(modality.features))
        else:
            inputs[name] = torch.randn(studies, getattr(modality, "channels", 1), *modality.size)
    unlabelled = {name: head.unlabelled(federation.model) for name, head in federation.model.heads.items()}
    return Batch(
        inputs,
        {name: torch.ones(studies, dtype=torch.bool) for name in inputs},
        {name: target.expand(studies, *target.shape).clone() for name, target in unlabelled.items()},
        {name: torch.ones(studies, dtype=torch.bool) for name in federation.model.tasks},
    )
