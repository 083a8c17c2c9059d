"""What steps of the Poisson-sampled Gaussian mechanism cost, by Google's accountants.

The unit is the patient; neighbours differ by adding or removing one. Renyi differential privacy (Mironov 2017; Mironov,
Talwar & Zhang 2019) decides, because its sums remain valid when rounds are chosen adaptively (Feldman & Zrnic 2021).
The privacy loss distribution (Koskela et al. 2020) is tighter, holds for a schedule fixed beforehand, and is reported.
"""

import math
from typing import Any

from scipy.optimize import brentq

from mmfm_core.errors import MmfmError

ORDERS = (*range(2, 64), 128, 256, 512)
"""Pinned, as a budget must not change with a library's default. Whole, as the series of others may not converge."""


def epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """What `steps` steps with this noise multiplier and sampling rate cost, by RDP; infinity without noise."""
    from dp_accounting.rdp import RdpAccountant

    return _spent(RdpAccountant(ORDERS), noise, rate, steps, delta)


def tight_epsilon(noise: float, rate: float, steps: int, delta: float) -> float:
    """The same by privacy loss distribution: for a schedule that nothing about the data can change."""
    from dp_accounting.pld import PLDAccountant

    return _spent(PLDAccountant(), noise, rate, steps, delta)


def noise_for(target: float, rate: float, steps: int, delta: float) -> float:
    """The least noise multiplier, rounded up to three digits after the point, that keeps `steps` steps within `target`.

    Raises:
        MmfmError: no noise multiplier up to 1e6 does.
    """

    def over(logarithm: float) -> float:
        spent = epsilon(math.exp(logarithm), rate, steps, delta)
        return math.log(spent / target) if 0 < spent < math.inf else (1e9 if spent else -1e9)

    low, high = math.log(1e-2), math.log(1e6)
    if over(high) > 0:
        raise MmfmError(
            f"no noise keeps {steps} steps at rate {rate:g} within ε {target:g} at δ {delta:g}; ask for more ε"
        )
    if over(low) <= 0:
        return 1e-2
    noise = math.ceil(math.exp(brentq(over, low, high, xtol=1e-5)) * 1000) / 1000
    return noise if epsilon(noise, rate, steps, delta) <= target else noise + 1e-3


def _spent(accountant: Any, noise: float, rate: float, steps: int, delta: float) -> float:
    from dp_accounting import GaussianDpEvent, PoissonSampledDpEvent

    if noise <= 0:
        return math.inf
    accountant.compose(PoissonSampledDpEvent(rate, GaussianDpEvent(noise)), steps)
    return float(accountant.get_epsilon(delta))
