"""Block-wise weighted averaging, one reply at a time."""

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from scipy.linalg.blas import daxpy

from mmfm_core.models.parameters import block_of
from mmfm_core.storage import Tensors

Step = Callable[[str, np.ndarray, np.ndarray], np.ndarray]
"""From a tensor's name, its value and the sites' mean (float64) to its next value."""

CHUNK = 32_768  # values; what is made of them on the way stays in the cache of a core


def the_mean(name: str, before: np.ndarray, mean: np.ndarray) -> np.ndarray:
    """The step of plain averaging: where the sites' mean is."""
    return mean


class BlockwiseMean:
    """The running weighted mean of each block over the sites that hold it (block-wise FedAvg, McMahan et al. 2017).

    A block (an encoder, the fusion, a head) is averaged over the sites that sent it, each by its studies that had the
    modality: sum_k n_k w_k / sum_k n_k. Memory is that of one model, whatever the number of sites. Sums are float64, so
    that the order of arrival does not show: in float32 it changes four results of five (`benchmarks/speed`).
    """

    def __init__(self) -> None:
        self._sums: dict[str, np.ndarray] = {}
        self._weights: dict[str, float] = {}

    def fold(self, tensors: Mapping[str, np.ndarray], weights: Mapping[str, float]) -> None:
        """Add one site's tensors, each weighted by its block's entry in `weights` (studies; zero adds nothing)."""
        for name, tensor in tensors.items():
            weight = weights[block_of(name)]
            if weight == 0:
                continue
            if name not in self._sums:
                self._sums[name] = np.zeros(tensor.shape, np.float64)
                self._weights[name] = 0.0
            add(self._sums[name], tensor, weight)
            self._weights[name] += weight

    def names(self) -> list[str]:
        """What has been folded."""
        return list(self._sums)

    def apply_to(self, shared: Tensors, step: Step = the_mean) -> None:
        """Move the averaged entries of `shared` to their means, in their own types. Ends the round.

        `step` says where a tensor goes instead. Integer buffers are rounded means. The arrays of `shared` are replaced,
        never written to: a message may still hold them.
        """
        for name in list(self._sums):
            mean = self._sums.pop(name)
            mean /= self._weights.pop(name)
            kind = shared[name].dtype
            if kind.kind == "f":
                mean = step(name, shared[name], mean)
            shared[name] = np.asarray(np.rint(mean) if kind.kind in "iub" else mean).astype(kind)


def add(total: np.ndarray, tensor: np.ndarray, weight: float) -> None:
    """`total += weight * tensor` in float64, with one pass through memory."""
    sums, values = total.reshape(-1), np.ascontiguousarray(tensor).reshape(-1)
    converted = np.empty(min(CHUNK, sums.size))
    for chunk in chunks(sums.size):
        part, out = sums[chunk], converted[: chunk.stop - chunk.start]
        np.copyto(out, values[chunk])
        daxpy(out, part, a=weight)  # in place


def chunks(size: int) -> Iterator[slice]:
    """The pieces of a flat array."""
    return (slice(start, min(start + CHUNK, size)) for start in range(0, size, CHUNK))
