"""Clipping engines: one clipped gradient per patient, against plain autograd and brute force."""

from collections.abc import Mapping

import pytest
import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch
from mmfm_core.privacy.engines import ENGINES, Clipped, Engine

STUDIES_OF = torch.tensor([3, 0, 1, 3, 2, 1, 3, 3])
"""Whose each study is: two patients of one study, one of two and one of four."""

C = 0.5


def batch_of(x: Tensor) -> Batch:
    here = torch.ones(len(x), dtype=torch.bool)
    return Batch({"x": x}, {"x": here}, {}, {"task": here})


class Small(nn.Module):
    """Two layers, the second used twice; `unreached` is never used."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.unreached = nn.Linear(6, 5), nn.Linear(5, 5), nn.Linear(5, 5)
        self.norm = nn.LayerNorm(5)

    def losses(self, batch: Batch) -> Tensor:
        states = torch.tanh(self.first(batch.inputs["x"]))
        return self.norm(self.second(torch.tanh(self.second(states)))).pow(2).mul(torch.arange(5) - 1).sum((1, 2))


@pytest.fixture
def small() -> Small:
    torch.manual_seed(0)
    return Small()


@pytest.fixture
def batch() -> Batch:
    torch.manual_seed(1)
    return batch_of(torch.randn(len(STUDIES_OF), 3, 6) * 3)


def run(engine: Engine, model: Small, batch: Batch, patients: Tensor = STUDIES_OF, max_norm: float = C) -> Clipped:
    return engine(model, model.losses, batch, patients, dict(model.named_parameters()), max_norm)


def flat(total: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([total[name].flatten() for name in sorted(total)])


def without(batch: Batch, patients: Tensor, patient: int) -> tuple[Batch, Tensor]:
    kept = (patients != patient).nonzero()[:, 0].tolist()
    return batch.rows(kept), patients[kept]


def by_hand(model: Small, batch: Batch, units: Tensor, max_norm: float = C) -> Tensor:
    """The sum over units (patients, or studies) by backward, one after the other."""
    total = torch.zeros(sum(parameter.numel() for parameter in model.parameters()))
    for unit in units.unique():
        model.zero_grad()
        model.losses(batch.rows((units == unit).nonzero()[:, 0].tolist())).mean().backward()
        one = flat({n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()})
        total += one * min(1.0, max_norm / float(one.norm()))
    model.zero_grad()
    return total


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
def test_the_sum_is_of_one_vector_per_patient(engine, small, batch, max_norm):
    found = run(ENGINES[engine], small, batch, max_norm=max_norm)
    torch.testing.assert_close(flat(found.total), by_hand(small, batch, STUDIES_OF, max_norm), rtol=1e-4, atol=1e-5)
    mean_losses = [small.losses(batch)[patient == STUDIES_OF].mean() for patient in range(4)]
    assert found.loss == pytest.approx(float(sum(mean_losses).detach()), rel=1e-5)
    assert found.dropped == 0
    assert not found.total["unreached.weight"].any()
    assert all(parameter.grad is None and parameter.requires_grad for parameter in small.parameters())


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("patient", range(4))
def test_removing_any_patient_moves_the_sum_by_at_most_the_bound(engine, small, batch, patient):
    with_all, rest = (
        run(ENGINES[engine], small, batch),
        run(ENGINES[engine], small, *without(batch, STUDIES_OF, patient)),
    )
    assert float((flat(with_all.total) - flat(rest.total)).norm()) <= C * (1 + 1e-5)


def test_clipping_each_study_instead_would_exceed_the_bound(small, batch):
    studies = torch.arange(len(batch))
    kept = (STUDIES_OF != 3).nonzero()[:, 0]
    moved = by_hand(small, batch, studies) - by_hand(small, batch.rows(kept.tolist()), kept)
    assert float(moved.norm()) > 1.5 * C


@pytest.mark.parametrize("engine", ENGINES)
def test_an_empty_batch_is_a_sum_over_nobody(engine, small):
    found = run(ENGINES[engine], small, batch_of(torch.zeros(0, 3, 6)), torch.zeros(0, dtype=torch.long))
    assert not flat(found.total).any()
    assert (found.loss, found.dropped) == (0.0, 0)
