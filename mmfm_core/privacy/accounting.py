"""What steps of the Poisson-sampled Gaussian mechanism cost, by Google's accountants.

The unit is the patient; neighbours differ by adding or removing one. Renyi differential privacy (Mironov 2017; Mironov,
Talwar & Zhang 2019) decides, because its sums remain valid when rounds are chosen adaptively (Feldman & Zrnic 2021).
The privacy loss distribution (Koskela et al. 2020) is tighter, holds for a schedule fixed beforehand, and is reported.
"""

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mmfm_core.config import Federation
from mmfm_core.errors import MmfmError
from mmfm_core.privacy.randomness import Floats

ORDERS = (*range(2, 64), 128, 256, 512)
"""Pinned, as a budget must not change with a library's default. Whole, as the series of others may not converge."""


@dataclass(frozen=True)
class Charge:
    """Steps of one kind: the noise multiplier, each patient's chance to be in a step, and how many steps."""

    noise: float
    rate: float
    steps: int


def composed(charges: Iterable[Charge], delta: float) -> float:
    """What steps of several kinds cost together, by RDP; zero for none, infinity without noise."""
    from dp_accounting.rdp import RdpAccountant

    return _spent(RdpAccountant(ORDERS), charges, delta)


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """What `steps` steps with this noise multiplier and sampling rate cost, by RDP; infinity without noise."""
    return composed([Charge(noise, rate, steps)], delta)


def tight_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """The same by privacy loss distribution: for a schedule that nothing about the data can change."""
    return tightly_composed([Charge(noise, rate, steps)], delta)


def tightly_composed(charges: Iterable[Charge], delta: float) -> float:
    """What steps of several kinds cost together, by privacy loss distribution: see `tight_epsilon`."""
    from dp_accounting.pld import PLDAccountant

    return _spent(PLDAccountant(), charges, delta)


def privacy_curve(charge: Charge, points: int = 60) -> tuple[Floats, Floats]:
    """Epsilons, and for each the delta at which the schedule keeps it, [points], by privacy loss distribution."""
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent
    from dp_accounting.pld import PLDAccountant

    accountant = PLDAccountant()
    accountant.compose(PoissonSampledDpEvent(charge.rate, GaussianDpEvent(charge.noise)), charge.steps)
    highest = accountant.get_epsilon(1e-8)
    epsilons = np.linspace(0, highest, points)
    return epsilons, np.array([accountant.get_delta(float(each)) for each in epsilons])


def noise_for(target: float, rate: float, steps: int, delta: float, beside: Sequence[Charge] = ()) -> float:
    """The least noise multiplier, rounded up to three digits after the point, that keeps `steps` steps within `target`.

    Args:
        beside: what is paid for out of `target` too.

    Raises:
        MmfmError: no noise multiplier up to 1e6 does.
    """

    def spent_with(noise: float) -> float:
        return composed([*beside, Charge(noise, rate, steps)], delta)

    def over(logarithm: float) -> float:
        spent = spent_with(math.exp(logarithm))
        return math.log(spent / target) if 0 < spent < math.inf else (1e9 if spent else -1e9)

    from scipy.optimize import brentq

    low, high = math.log(1e-2), math.log(1e6)
    if over(high) > 0:
        raise MmfmError(
            f"no noise keeps {steps} steps at rate {rate:g} within ε {target:g} at δ {delta:g}; ask for more ε"
        )
    if over(low) <= 0:
        return 1e-2
    noise = math.ceil(math.exp(brentq(over, low, high, xtol=1e-5)) * 1000) / 1000
    return noise if spent_with(noise) <= target else noise + 1e-3


def schedule_of(federation: Federation) -> Charge:
    """What all federated rounds of a private document cost each patient, with the least noise where it names none.

    Raises:
        MmfmError: no noise keeps them, and noised figures, within the document's epsilon, or the noise that it names
            does not.
    """
    privacy = federation.privacy
    assert privacy
    steps = sum(stage.rounds * stage.local_steps for stage in federation.stages if stage.federated)
    figures = figures_of(federation)
    alone = composed(figures, privacy.delta)
    if alone >= privacy.epsilon:
        raise MmfmError(
            f"privacy.figure_noise: noised figures alone cost ε {alone:.3f} of privacy.epsilon {privacy.epsilon:g}, "
            "which leaves nothing to train with; raise it"
        )
    if privacy.noise is None:
        noise = noise_for(privacy.epsilon, privacy.rate, steps, privacy.delta, figures)
        return Charge(noise, privacy.rate, steps)
    charge = Charge(privacy.noise, privacy.rate, steps)
    spent = composed([charge, *figures], privacy.delta)
    if spent > privacy.epsilon:
        and_figures = " and the noised figures" * bool(figures)
        raise MmfmError(
            f"privacy.noise: {steps} steps with {privacy.noise:g}{and_figures} cost ε {spent:.3f}, more than "
            f"privacy.epsilon {privacy.epsilon:g}; leave 'noise' out, and the least that suffices is taken"
        )
    return charge


def figures_of(federation: Federation) -> list[Charge]:
    """What noised figures cost each patient: one step with everybody in it. None where none leave.

    Training patients are no test patients, so that nobody pays for both; they are added up all the same, as the ledger
    does, which knows no splits.
    """
    privacy = federation.privacy
    return [Charge(privacy.figure_noise, 1.0, 1)] if privacy and privacy.figures == "noised" else []


def costs_of(federation: Federation) -> list[Charge]:
    """All that a private document costs each patient.

    Raises:
        MmfmError: see `schedule_of`.
    """
    return [schedule_of(federation), *figures_of(federation)]


def _spent(accountant: Any, charges: Iterable[Charge], delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    steps: Counter[tuple[float, float]] = Counter()  # of a kind together: the order does not matter, and it is faster
    for charge in charges:
        steps[charge.noise, charge.rate] += charge.steps
    for (noise, rate), count in steps.items():
        if noise <= 0:
            return math.inf
        accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), count)
    return float(accountant.get_epsilon(delta)) if steps else 0.0
