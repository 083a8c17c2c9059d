"""The private step: what one patient can change, and what the noise is."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch, Dataset
from mmfm_core.data.manifest import Study
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.randomness import chosen, gaussian
from mmfm_core.privacy.step import Mechanism, groups, noisy_gradients, patients_of, unpredictable

STUDIES_OF = {"ann": 1, "bea": 2, "cid": 4, "dan": 1, "eve": 2}
UNLIKELY = 1e-6


class Toy(nn.Module):
    """A small network on a row of numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1))

    def losses(self, batch: Batch) -> Tensor:
        return 10 * (self.net(batch.inputs["row"])[:, 0] - batch.targets["y"]).square()


@pytest.fixture
def toy() -> Toy:
    torch.manual_seed(3)
    return Toy()


@pytest.fixture
def dataset() -> Dataset:
    generator = torch.Generator().manual_seed(4)
    patients = [name for name, count in STUDIES_OF.items() for _ in range(count)]
    size = len(patients)
    batch = Batch(
        {"row": torch.randn(size, 6, generator=generator)},
        {"row": torch.ones(size, dtype=torch.bool)},
        {"y": 5 * torch.randn(size, generator=generator)},
        {"y": torch.ones(size, dtype=torch.bool)},
    )
    return Dataset(batch, [Study(i, str(i), patient, "train", {}, {}) for i, patient in enumerate(patients)])


def released(
    model: Toy, dataset: Dataset, patients: Sequence[Sequence[int]], mechanism: Mechanism, rows: int
) -> Tensor:
    """The sum that a step is made of: what it sets as gradients, times what it divided by."""
    parameters = dict(model.named_parameters())
    noisy_gradients(model, model.losses, dataset, patients, parameters, mechanism, rows)
    flat = torch.cat([p.grad.flatten() for p in parameters.values() if p.grad is not None])
    return flat.double() * mechanism.rate * mechanism.patients


@pytest.mark.parametrize("rows", [1, 3, 100])
@pytest.mark.parametrize("patient", range(len(STUDIES_OF)), ids=list(STUDIES_OF))
def test_one_patient_moves_the_sum_by_no_more_than_the_norm(
    toy: Toy, dataset: Dataset, patient: int, rows: int
) -> None:
    """However many studies the patient has, and wherever the batch is divided to fit into memory."""
    mechanism = Mechanism(noise=0.0, max_norm=0.7, rate=1.0, patients=10, engine="loop")
    everybody = patients_of(dataset, range(len(dataset)))
    others = [rows for index, rows in enumerate(everybody) if index != patient]
    moved = released(toy, dataset, everybody, mechanism, rows) - released(toy, dataset, others, mechanism, rows)
    assert 0.5 < moved.norm() <= 0.7 * (1 + 1e-5)  # the losses are large enough that everybody is clipped


def test_clipping_studies_instead_of_patients_would_fail_that_test(toy: Toy, dataset: Dataset) -> None:
    mechanism = Mechanism(noise=0.0, max_norm=0.7, rate=1.0, patients=10, engine="loop")
    cid = patients_of(dataset, range(len(dataset)))[2]
    each = [[row] for row in range(len(dataset))]
    others = [[row] for row in range(len(dataset)) if row not in cid]
    moved = released(toy, dataset, each, mechanism, 100) - released(toy, dataset, others, mechanism, 100)
    assert moved.norm() > 0.7 * 1.5


class Folded(Toy):
    """All studies are one row to a layer: only a pass shows that it cannot tell them apart."""

    def losses(self, batch: Batch) -> Tensor:
        return 10 * (self.net(batch.inputs["row"][None])[0, :, 0] - batch.targets["y"]).square()


def test_what_book_keeping_cannot_see_is_left_to_the_loop_unless_it_was_named(dataset: Dataset) -> None:
    torch.manual_seed(3)
    model, everybody = Folded(), patients_of(dataset, range(len(dataset)))
    sums = {
        engine: released(model, dataset, everybody, Mechanism(0.0, 0.7, 1.0, 10, engine=engine), 4)
        for engine in ("loop", "auto")
    }
    torch.testing.assert_close(sums["auto"], sums["loop"])
    with pytest.raises(MmfmError):
        released(model, dataset, everybody, Mechanism(0.0, 0.7, 1.0, 10, engine="bookkeeping"), 4)


def test_views_of_a_patient_are_one_gradient(toy: Toy, dataset: Dataset) -> None:
    """Without dropout all views are the same, and so is their mean."""
    once = Mechanism(noise=0.0, max_norm=0.7, rate=1.0, patients=10, engine="loop")
    thrice = Mechanism(noise=0.0, max_norm=0.7, rate=1.0, patients=10, views=3, engine="loop")
    everybody = patients_of(dataset, range(len(dataset)))
    one, other = released(toy, dataset, everybody, once, 4), released(toy, dataset, everybody, thrice, 4)
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_the_noise_has_the_standard_deviation_that_is_accounted_for(toy: Toy, dataset: Dataset) -> None:
    """Chi-squared over all coordinates of 200 steps in which there is nobody."""
    mechanism = Mechanism(noise=1.3, max_norm=0.5, rate=0.1, patients=20, engine="loop")
    noise = torch.stack([released(toy, dataset, [], mechanism, 8) for _ in range(200)]) / (1.3 * 0.5)
    assert UNLIKELY < stats.chi2.cdf(float(noise.square().sum()), noise.numel()) < 1 - UNLIKELY


def test_no_seed_fixes_the_noise_or_the_sample(toy: Toy, dataset: Dataset) -> None:
    """As two sites, or two runs, with the same document would be."""
    mechanism = Mechanism(noise=1.0, max_norm=1.0, rate=0.5, patients=5, engine="loop")

    def seeded_draws() -> tuple[Tensor, list[bool], float]:
        torch.manual_seed(0)
        np.random.seed(0)
        noise = torch.cat([released(toy, dataset, [], mechanism, 8) for _ in range(50)])
        with unpredictable():
            mask = float(torch.rand(()))
        return noise, chosen(100, 0.5).tolist(), mask

    (noise, sample, mask), (other_noise, other_sample, other_mask) = seeded_draws(), seeded_draws()
    assert sample != other_sample
    assert mask != other_mask
    assert stats.pearsonr(noise.numpy(), other_noise.numpy()).pvalue > UNLIKELY


def test_normal_numbers_are_normal() -> None:
    draws = gaussian(200_000)
    assert np.isfinite(draws).all()
    assert stats.kstest(draws, "norm").pvalue > UNLIKELY
    assert stats.pearsonr(draws[:-1], draws[1:]).pvalue > UNLIKELY


def test_everybody_is_in_a_step_with_the_same_chance_independently() -> None:
    """The size of a sample is binomial (a sample of fixed size, or a shuffled pass, has no variance)."""
    rate, people, steps = 0.2, 50, 4000
    taken = np.stack([chosen(people, rate) for _ in range(steps)])
    inclusions = taken.sum(0)  # of each patient, over the steps
    assert (np.abs(stats.binom.cdf(inclusions, steps, rate) - 0.5) < 0.5 - UNLIKELY / people).all()
    sizes = taken.sum(1)
    spread = sizes.var(ddof=1) / (people * rate * (1 - rate))
    assert UNLIKELY < stats.chi2.cdf(spread * (steps - 1), steps - 1) < 1 - UNLIKELY
    assert chosen(1000, 1.0).all()


@given(st.lists(st.integers(1, 5), max_size=20), st.integers(1, 12))
def test_a_batch_is_divided_between_patients_only(sizes: list[int], rows: int) -> None:
    numbers = iter(range(sum(sizes)))
    patients = [[next(numbers) for _ in range(size)] for size in sizes]
    parts = list(groups(patients, rows))
    assert [patient for part in parts for patient in part] == patients
    assert all(len(part) == 1 or sum(map(len, part)) <= rows for part in parts)


def test_the_generators_of_a_run_are_left_alone() -> None:
    """What a run repeats from its seed, it still repeats."""
    torch.manual_seed(1)
    expected = torch.rand(3)
    torch.manual_seed(1)
    with unpredictable():
        torch.rand(7)
    gaussian(10)
    assert torch.equal(torch.rand(3), expected)
