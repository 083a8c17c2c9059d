"""The strategy: which sites take part in a round, what each is sent, and how replies become the next shared state.

Ours rather than a subclass of Flower's: those need every reply in memory at once and the same tensors from every site,
while here sites hold different blocks and each reply is folded and dropped as it comes.
"""

import hashlib
import math
from collections.abc import Iterable, Mapping

import numpy as np

from mmfm_core.compression import opened
from mmfm_core.config import Federation
from mmfm_core.config.federation import Stage
from mmfm_core.config.rounds import Round
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import CONTROL, block_of, matches
from mmfm_core.protocol import RoundReply, SiteDescription
from mmfm_core.storage import Tensors, finite
from server.aggregation import BlockwiseMean
from server.optimizer import ServerOptimizer
from server.shrinking import shrunk

MEAN = "mean/"
"""Before a shared parameter's name in what the strategy remembers; alone, for the mean of ones."""

START = "start/"
"""Before the name of a matrix that is to be shrunk: as it was before all training."""


class Strategy:
    """Block-wise aggregation of the shared tensors `shared`, which it owns and advances.

    Attributes:
        memory: what it knows beside the shared state, and a resumed run goes on with: the moments of an optimiser,
            SCAFFOLD's control variates (`CONTROL` + name), the running mean of the shared state (`MEAN` + name), and
            where matrices that are to be shrunk began (`START` + name).
    """

    def __init__(self, federation: Federation, shared: Tensors, memory: Tensors | None = None) -> None:
        self.federation, self.shared, self.memory = federation, shared, {} if memory is None else memory
        self._optimizer = ServerOptimizer(federation.aggregation.strategy, self.memory)
        self._begin()

    def _begin(self) -> None:
        self._mean, self._controls = BlockwiseMean(), BlockwiseMean()
        self._took_part: set[str] = set()

    def takes_part(self, site: SiteDescription, this: Round) -> bool:
        """Whether a site has anything to train on in this round (or, where nothing is trained, anything at all)."""
        return this.stage is None or training_studies(site, this.stage) > 0

    def drawn(self, sites: Mapping[int, SiteDescription], this: Round, attempt: int = 1) -> dict[int, SiteDescription]:
        """Those who are asked in a round, by node: all that take part in it, or as many as the document draws of them.

        The draw depends on the document's seed, the round and the attempt alone, so that a resumed run repeats it, and
        a site that is not there moves nobody but its substitute.
        """
        there = {node: site for node, site in sites.items() if self.takes_part(site, this)}
        wanted = self.federation.aggregation.sites_per_round
        if wanted is None or not this.returns_tensors:
            return there

        def place(node: int) -> bytes:
            lot = f"{self.federation.seed}/{this.number}/{attempt}/{there[node].site}"
            return hashlib.sha256(lot.encode()).digest()

        chosen = set(sorted(there, key=place)[:wanted])
        return {node: site for node, site in there.items() if node in chosen}

    def state_for(self, this: Round) -> Tensors:
        """All that a round's messages may hold: the shared state and, for SCAFFOLD, the control variates."""
        if self.federation.aggregation.strategy.type != "scaffold" or not this.returns_tensors:
            return self.shared
        real = {name: tensor for name, tensor in self.shared.items() if tensor.dtype.kind == "f"}
        return self.shared | {CONTROL + n: self.memory.get(CONTROL + n, np.zeros_like(t)) for n, t in real.items()}

    def tensors_for(self, site: SiteDescription, this: Round) -> list[str]:
        """The names of `state_for` that a site holds."""
        held = self.federation.model.held(site.modalities, site.targets).blocks
        return [name for name in self.state_for(this) if block_of(name.removeprefix(CONTROL)) in held]

    def fold(self, reply: RoundReply, site: SiteDescription, this: Round) -> None:
        """Check one reply alone and add it to the round's mean; a bad one leaves the mean as it was.

        Raises:
            MmfmError: names, shapes, types, values or weights are not what this site was asked for.
        """
        if reply.round != this.number:
            raise MmfmError(f"it answers round {reply.round}, not {this.number}")
        expected = []
        if this.stage and this.returns_tensors:
            names = self.tensors_for(site, this)
            expected = [name for name in names if matches(name.removeprefix(CONTROL), this.stage.train)]
        state, wire = self.state_for(this), self.federation.aggregation.wire
        tensors = opened(reply.tensors, {name: state[name] for name in expected}, wire.update)
        self._check_tensors(tensors, expected, state)
        self._check_weights(reply.weights, {block_of(name.removeprefix(CONTROL)) for name in expected}, site)
        self._took_part.add(site.site)
        plain = {name: tensor for name, tensor in tensors.items() if not name.startswith(CONTROL)}
        self._mean.fold(plain, reply.weights)
        if self.federation.aggregation.weight == "studies" and plain:
            others = {
                n: t for n, t in self.shared.items() if this.stage and matches(n, this.stage.train) and n not in plain
            }
            self._mean.fold(others, {block_of(name): max(reply.weights.values()) for name in others})
        changes = {n.removeprefix(CONTROL): tensor for n, tensor in tensors.items() if n.startswith(CONTROL)}
        self._controls.fold(changes, reply.weights)

    def advance(self, sites: Iterable[SiteDescription]) -> None:
        """End the round: the shared state moves to, or towards, the folded mean. `sites` are all that are known."""
        trained = bool(self._mean.names())
        if trained:
            self._remember_start()
        self._mean.apply_to(self.shared, self._optimizer.step)
        controls = {name.removeprefix(CONTROL): t for name, t in self.memory.items() if name.startswith(CONTROL)}
        studies = {site.site: site.studies["train"] for site in sites}
        # Those who were not there keep their part of the mean: |S| / N of the change (Karimireddy et al., algorithm 1).
        share = sum(studies[name] for name in self._took_part) / max(sum(studies.values()), 1)
        for name in self._controls.names():
            controls.setdefault(name, np.zeros_like(self.shared[name]))
        self._controls.apply_to(controls, lambda name, before, mean: before + share * mean)
        self.memory |= {CONTROL + name: tensor for name, tensor in controls.items()}
        if trained and self.federation.aggregation.ema:
            self._remember(self.federation.aggregation.ema)
        self._begin()

    def _remember(self, decay: float) -> None:
        for name, tensor in {"": np.ones(()), **self.shared}.items():
            before = self.memory.get(MEAN + name, np.zeros(tensor.shape))
            self.memory[MEAN + name] = decay * before + (1 - decay) * tensor

    def _remember_start(self) -> None:
        patterns = self.federation.privacy.shrink if self.federation.privacy else ()
        for name, tensor in self.shared.items():
            if tensor.ndim == 2 and matches(name, patterns):
                self.memory.setdefault(START + name, tensor)

    def conclude(self) -> None:
        """End all training: the shared state becomes its running mean, and noise is shrunk, where the document says so.

        The mean began at zero, for which it is corrected as Adam's is (Kingma & Ba 2015, section 3). What that needs is
        forgotten, so that to conclude twice is to conclude once.
        """
        for name, tensor in self.shared.items():
            ended = tensor
            if MEAN in self.memory:
                ended = self.memory.pop(MEAN + name) / self.memory[MEAN]
            if START + name in self.memory:
                start = self.memory.pop(START + name)
                ended = start + shrunk(ended - start)
            self.shared[name] = ended.astype(tensor.dtype, copy=False)
        self.memory.pop(MEAN, None)

    def void(self) -> None:
        """End the round without a result: the shared state stays."""
        self._begin()

    @staticmethod
    def _check_tensors(tensors: Tensors, expected: list[str], state: Tensors) -> None:
        missing = [name for name in expected if name not in tensors]
        extra = len(tensors) - (len(expected) - len(missing))
        if missing or extra:
            example = f" (for one '{missing[0]}')" if missing else ""
            raise MmfmError(f"{len(missing)} tensors are missing{example} and {extra} were not asked for")
        for name in expected:
            got, like = tensors[name], state[name]
            if got.shape != like.shape or got.dtype != like.dtype:
                raise MmfmError(f"'{name}' is {got.dtype}{list(got.shape)}, expected {like.dtype}{list(like.shape)}")
            if not finite(got):
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
