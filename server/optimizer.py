"""The coordinator's optimiser: what a strategy makes of the sites' mean."""

import numpy as np

from mmfm_core.config.federation import FedAdam, FedAvg, FedYogi, Scaffold
from mmfm_core.storage import Tensors


class ServerOptimizer:
    """Adam or Yogi on the mean change of a round (Reddi et al., ICLR 2021, algorithm 2), or the mean itself.

    Ours, because Flower's strategies step all tensors in every round, and here a round may train some blocks only: a
    tensor that no site sent keeps its moments. Unlike Flower's FedAdam, and like the paper, it corrects no bias.

    Attributes:
        moments: running means of each tensor's change and of its square, which a resumed run goes on with.
    """

    def __init__(self, config: FedAvg | FedAdam | FedYogi | Scaffold, moments: Tensors) -> None:
        self._config, self.moments = config, moments

    def step(self, name: str, before: np.ndarray, mean: np.ndarray) -> np.ndarray:
        """Where a tensor goes from `before`, given the sites' mean."""
        if isinstance(self._config, FedAvg | Scaffold):
            return mean
        beta1, beta2, change = self._config.beta1, self._config.beta2, mean - before
        first = self.moments.get(f"first/{name}", np.zeros_like(change))
        second = self.moments.get(f"second/{name}", np.full_like(change, self._config.tau**2))
        first = beta1 * first + (1 - beta1) * change
        forgotten = np.sign(second - change**2) * change**2 if isinstance(self._config, FedYogi) else second - change**2
        second = second - (1 - beta2) * forgotten
        self.moments |= {f"first/{name}": first, f"second/{name}": second}
        return before + self._config.lr * first / (np.sqrt(second) + self._config.tau)
