"""Who is in a step, and its noise: from the operating system's cryptographic generator, which no seed can fix.

Torch's and NumPy's generators are predictable from a seed that stands in the document, or from enough of their output;
whoever knows the noise can subtract it.
"""

import os

import numpy as np
from scipy.special import ndtri

Floats = np.ndarray[tuple[int], np.dtype[np.float64]]
Flags = np.ndarray[tuple[int], np.dtype[np.bool_]]

_BITS = 53  # of a float64's significand


def uniform(size: int) -> Floats:
    """Independent numbers from (0, 1), without its ends: the middles of 2^53 equal parts."""
    whole = np.frombuffer(os.urandom(8 * size), dtype=np.uint64) >> np.uint64(64 - _BITS)
    return np.asarray((whole + 0.5) * 2.0**-_BITS, dtype=np.float64)


def chosen(count: int, rate: float) -> Flags:
    """Whether each of `count` takes part: with the chance `rate`, independently of all others (Poisson sampling)."""
    return np.asarray(uniform(count) < rate)


def gaussian(size: int) -> Floats:
    """Independent standard normal numbers.

    Each is half the sum of four, so that which floating-point numbers can occur tells nothing of what noise is added to
    (Holohan & Braghin 2021, and how Opacus does it in its secure mode).
    """
    total = np.zeros(size)
    for _ in range(4):
        total += ndtri(uniform(size))
    return total / 2
