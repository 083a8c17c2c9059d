"""The strategy: which sites take part in a round, what each is sent, and how replies become the next shared state.

Ours rather than a subclass of Flower's: those need every reply in memory at once and the same tensors from every site,
while here sites hold different blocks and each reply is folded and dropped as it comes.
"""

import math
from collections.abc import Mapping

import numpy as np

from mmfm_core.config import Federation
from mmfm_core.config.federation import Stage
from mmfm_core.config.rounds import Round
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import block_of, matches
from mmfm_core.protocol import RoundReply, SiteDescription
from mmfm_core.storage import Tensors
from server.aggregation import BlockwiseMean
from server.optimizer import ServerOptimizer


class Strategy:
    """Block-wise aggregation of the shared tensors `shared`, which it owns and advances."""

    def __init__(self, federation: Federation, shared: Tensors, moments: Tensors | None = None) -> None:
        self.federation, self.shared = federation, shared
        self.optimizer = ServerOptimizer(federation.aggregation.strategy, moments or {})
        self._mean = BlockwiseMean()

    def takes_part(self, site: SiteDescription, this: Round) -> bool:
        """Whether a site has anything to train on in this round (or, where nothing is trained, anything at all)."""
        return this.stage is None or training_studies(site, this.stage) > 0

    def tensors_for(self, site: SiteDescription) -> list[str]:
        """The names of the shared tensors that a site holds."""
        held = self.federation.model.held(site.modalities, site.targets).blocks
        return [name for name in self.shared if block_of(name) in held]

    def fold(self, reply: RoundReply, site: SiteDescription, this: Round) -> None:
        """Check one reply alone and add it to the round's mean; a bad one leaves the mean as it was.

        Raises:
            MmfmError: names, shapes, types, values or weights are not what this site was asked for.
        """
        if reply.round != this.number:
            raise MmfmError(f"it answers round {reply.round}, not {this.number}")
        expected = []
        if this.stage and this.returns_tensors:
            expected = [name for name in self.tensors_for(site) if matches(name, this.stage.train)]
        self._check_tensors(reply.tensors, expected)
        self._check_weights(reply.weights, {block_of(name) for name in expected}, site)
        self._mean.fold(reply.tensors, reply.weights)

    def advance(self) -> None:
        """End the round: the shared state moves to, or towards, the folded mean."""
        self._mean.apply_to(self.shared, self.optimizer.step)

    def void(self) -> None:
        """End the round without a result: the shared state stays."""
        self._mean = BlockwiseMean()

    def _check_tensors(self, tensors: Tensors, expected: list[str]) -> None:
        missing = [name for name in expected if name not in tensors]
        extra = len(tensors) - (len(expected) - len(missing))
        if missing or extra:
            example = f" (for one '{missing[0]}')" if missing else ""
            raise MmfmError(f"{len(missing)} tensors are missing{example} and {extra} were not asked for")
        for name in expected:
            got, like = tensors[name], self.shared[name]
            if got.shape != like.shape or got.dtype != like.dtype:
                raise MmfmError(f"'{name}' is {got.dtype}{list(got.shape)}, expected {like.dtype}{list(like.shape)}")
            if not np.isfinite(got).all():
                raise MmfmError(f"'{name}' holds values that are not finite")

    @staticmethod
    def _check_weights(weights: Mapping[str, float], blocks: set[str], site: SiteDescription) -> None:
        if set(weights) != blocks:
            raise MmfmError("its weights do not name the blocks it was asked for")
        for block, weight in weights.items():
            if not math.isfinite(weight) or not 0 <= weight <= site.studies["train"]:
                raise MmfmError(
                    f"its weight of '{block}' is not between 0 and its {site.studies['train']} training studies"
                )


def training_studies(site: SiteDescription, stage: Stage) -> int:
    """Training studies of a site that can serve a stage (of several tasks: the one which most can serve)."""
    return max((site.tasks[task]["train"] for task in stage.tasks if task in site.tasks), default=0)
