"""The private step: Poisson sampling of patients, one clipped gradient for each, and noise (Abadi et al. 2016)."""

import logging
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.placement import generators
from mmfm_core.privacy.engines import ENGINES, choose
from mmfm_core.privacy.randomness import chosen, gaussian

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Mechanism:
    """How steps are made private; all of it is public.

    Attributes:
        noise: the noise multiplier: the standard deviation of each coordinate of the sum, over `max_norm`.
        max_norm: what a patient's gradient is clipped to, over all trained parameters together.
        rate: each patient's chance to be in a step.
        patients: how many there are, as the site tells it; gradients are divided by `rate * patients`.
        views: passes of each patient in a step.
        engine: a name of `mmfm_core.privacy.engines.ENGINES`, or 'auto'.
    """

    noise: float
    max_norm: float
    rate: float
    patients: int
    views: int = 1
    engine: str = "auto"


def patients_of(dataset: Dataset, rows: Sequence[int]) -> list[list[int]]:
    """The rows of each patient."""
    by_patient: dict[str, list[int]] = {}
    for row in rows:
        by_patient.setdefault(dataset.studies[row].patient, []).append(row)
    return list(by_patient.values())


def noisy_gradients(
    model: nn.Module,
    losses: Callable[[Batch], Tensor],
    dataset: Dataset,
    patients: Sequence[Sequence[int]],
    parameters: Mapping[str, nn.Parameter],
    mechanism: Mechanism,
    at_once: int,
) -> float:
    """Set `.grad` of every parameter to the noised mean over a sample of `patients`, and return that of their losses.

    The mean loss is not noised, and must stay at the site. About `at_once` rows are in memory at a time.
    """
    engine = choose(model, parameters) if mechanism.engine == "auto" else mechanism.engine
    here = chosen(len(patients), mechanism.rate)
    sampled = [rows for rows, taken in zip(patients, here, strict=True) if taken]
    total = {name: torch.zeros_like(parameter) for name, parameter in parameters.items()}
    device = next(iter(parameters.values())).device
    loss, dropped = 0.0, 0
    together = list(groups(sampled, max(at_once // mechanism.views, 1)))
    for group, next_group in zip_longest(together, together[1:], fillvalue=()):
        batch = dataset.batch(
            [row for rows in group for row in rows for _ in range(mechanism.views)],
            next_rows=[row for rows in next_group for row in rows],
        )
        owner = [index for index, rows in enumerate(group) for _ in range(len(rows) * mechanism.views)]
        asked = (model, losses, batch, torch.tensor(owner, device=device), parameters, mechanism.max_norm)
        try:
            clipped = ENGINES[engine](*asked)
        except MmfmError:
            if mechanism.engine != "auto" or engine == "loop":
                raise
            engine = "loop"  # only a pass shows what every layer is given; the loop asks no layer
            clipped = ENGINES[engine](*asked)
        for name, part in clipped.total.items():
            total[name] += part
        loss, dropped = loss + clipped.loss, dropped + clipped.dropped
    expected = mechanism.rate * mechanism.patients
    for name, parameter in parameters.items():
        noise = torch.from_numpy(gaussian(parameter.numel())).reshape(parameter.shape)
        noised = total[name].double().cpu() + mechanism.noise * mechanism.max_norm * noise
        parameter.grad = (noised / expected).to(parameter)
    if dropped:
        log.warning(
            "%d of %d patients of a step had a gradient that is not finite, and were left out", dropped, len(sampled)
        )
    return loss / expected


def groups(patients: Sequence[Sequence[int]], rows: int) -> Iterator[list[Sequence[int]]]:
    """Patients in order, about `rows` rows at a time. A patient is never divided: each part would be clipped alone."""
    group: list[Sequence[int]] = []
    for patient in patients:
        if group and sum(map(len, group)) + len(patient) > rows:
            yield group
            group = []
        group.append(patient)
    if group:
        yield group


@contextmanager
def unpredictable() -> Iterator[None]:
    """Torch's generators from a secret seed inside the block.

    Were masks and dropout drawn from a seed that others know, the draws of all patients after one would tell whether
    that one was there.
    """
    with generators(secrets.randbits(63)):
        yield
