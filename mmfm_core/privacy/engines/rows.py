"""A batch in an order that makes a patient's studies neighbours, so that folding by patient is a reshape."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """R studies of P patients, those with equally many studies together.

    Attributes:
        order: the studies of the batch in this order, [R].
        groups: how many patients have how many studies each, as (patients, studies each).
    """

    order: Tensor
    groups: tuple[tuple[int, int], ...]

    @property
    def patients(self) -> int:
        """P."""
        return sum(patients for patients, _ in self.groups)

    def folded(self, x: Tensor) -> Iterator[Tensor]:
        """[R, ...] -> [patients, studies each, ...] of each group."""
        if len(self.groups) == 1:
            yield x.unflatten(0, self.groups[0])
            return
        sizes = [patients * studies for patients, studies in self.groups]
        for (patients, studies), rows in zip(self.groups, x.split(sizes), strict=True):
            yield rows.reshape(patients, studies, *x.shape[1:])

    def summed(self, x: Tensor) -> Tensor:
        """[R, ...] -> [P, ...]."""
        if all(studies == 1 for _, studies in self.groups):
            return x
        return torch.cat([group.sum(1) for group in self.folded(x)])

    @cached_property
    def patient(self) -> Tensor:
        """Of each row, [R]."""
        sizes = torch.tensor([studies for patients, studies in self.groups for _ in range(patients)])
        return torch.arange(self.patients).repeat_interleave(sizes).to(self.order.device)

    @property
    def studies(self) -> Tensor:
        """How many studies the patient of each row has, [R]."""
        return torch.cat([self.order.new_full((patients * studies,), studies) for patients, studies in self.groups])


def rows_of(patients: Tensor) -> Rows:
    """The order for a batch of at least one study; `patients` ([R]) says whose each is."""
    _, patient, studies = patients.unique(return_inverse=True, return_counts=True)
    order = torch.argsort(studies[patient] * len(studies) + patient, stable=True)
    each, patients_with = studies.unique(return_counts=True)
    return Rows(order, tuple(zip(patients_with.tolist(), each.tolist(), strict=True)))
