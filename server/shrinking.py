"""What noise did to a matrix that sites learned together, taken back in part: afterwards, which costs no privacy."""

import numpy as np

FEWEST = 3


def shrunk(change: np.ndarray) -> np.ndarray:
    """A learned change [outputs, inputs] with smaller singular values: s becomes s - least^2 / s.

    Noise of one strength in every entry adds about the same to the square of each singular value, while what the
    outputs learned alike is in few of them. So Efron and Morris (1972) shrink the weak ones most, and lose less in
    total than the noisy matrix does, whatever the truth is. They know the noise; here the least singular value is taken
    for it. With fewer than three rows or columns that is a part of the signal, and the matrix stays as it is.
    """
    if min(change.shape) < FEWEST:
        return change
    left, values, right = np.linalg.svd(change.astype(np.float64), full_matrices=False)
    kept = values - np.divide(values[-1] ** 2, values, out=np.zeros_like(values), where=values > 0)
    result: np.ndarray = (left * kept) @ right
    return result
