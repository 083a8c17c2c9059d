"""From guesses who was there to the least epsilon that would explain them (Steinke, Nasr & Jagielski 2023, 2305.08846).

Each of m patients is in the data or not, by a fair coin. Whoever sees a release that is (epsilon, delta)-private, with
neighbours differing by one patient, guesses the coins of r of them. However those are picked, and however many coins
one release tells of, the number of right guesses is hardly larger than that of r biased coins, each right with the
chance 1 / (1 + exp(-epsilon)). So one run tests epsilon.
"""

from dataclasses import dataclass

import numpy as np
from scipy.special import expit
from scipy.stats import binom

from mmfm_core.privacy.randomness import Flags, Floats

CONFIDENCE = 0.95
SHARES = (0.02, 0.05, 0.1, 0.2, 0.4, 0.8)
"""Of all patients, how many are guessed: few guesses can be sure ones, many are evidence. Each share is one try."""

_HIGHEST = 40.0  # an epsilon at which all coins are right, to rounding


@dataclass(frozen=True)
class Bound:
    """What guesses show.

    Attributes:
        epsilon: the release is not (epsilon, delta)-private for any smaller one, with the confidence asked for; zero
            where the guesses show nothing.
        guesses, correct: of the try that shows most.
        highest: what as many tries would show if every guess were right: more cannot be seen with so many patients.
    """

    epsilon: float
    guesses: int
    correct: int
    highest: float


def bound(scores: Floats, included: Flags, delta: float, confidence: float = CONFIDENCE) -> Bound:
    """The bound from scores, [m], which are the higher the more a patient seems to be `included`, [m].

    For each of `SHARES` the highest scores are guessed to be in, as many of the lowest to be out, and the others not
    at all. The chance of an error is divided over the tries (Bonferroni).
    """
    order = np.argsort(-scores, kind="stable")
    tries = []
    for share in SHARES:
        half = int(len(scores) * share / 2)
        if half:
            correct = int(included[order[:half]].sum() + (~included[order[-half:]]).sum())
            tries.append((2 * half, correct))
    error = (1 - confidence) / max(len(tries), 1)
    found = [(least_epsilon(len(scores), r, v, delta, error), r, v) for r, v in tries]
    highest = max((least_epsilon(len(scores), r, r, delta, error) for r, _ in tries), default=0.0)
    return Bound(*max(found, default=(0.0, 0, 0)), highest)


def least_epsilon(patients: int, guesses: int, correct: int, delta: float, error: float) -> float:
    """The largest epsilon that the guesses reject, when a true one is rejected with a chance of at most `error`."""

    def rejected(epsilon: float) -> bool:
        return p_value(patients, guesses, correct, epsilon, delta) < error

    low, high = 0.0, _HIGHEST
    if not rejected(low):
        return 0.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if rejected(middle) else (low, middle)
    return low


def p_value(patients: int, guesses: int, correct: int, epsilon: float, delta: float) -> float:
    """The most that the chance of so many correct guesses can be if the release is (epsilon, delta)-private.

    The paper's theorem for approximate differential privacy, as its appendix D computes it: beta + 2 m delta alpha,
    where W is binomial over r guesses, beta = P[W >= v], and alpha the greatest P[v > W >= v - i] / i.
    """
    right = float(expit(epsilon))
    beta = float(binom.sf(correct - 1, guesses, right))
    below = np.arange(1, correct + 1)
    alpha = float((np.cumsum(binom.pmf(correct - below, guesses, right)) / below).max(initial=0.0))
    return min(1.0, beta + 2 * patients * delta * alpha)
