"""The model: encoders, fusion, heads, objectives. The prefixes of its state dict are the federation's vocabulary."""

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from mmfm_core.config.model import Model as ModelConfig
from mmfm_core.data.dataset import NO_ARTIFACTS, Batch
from mmfm_core.errors import MmfmError
from mmfm_core.models.adapters import add_adapters, check_targets
from mmfm_core.models.augmentation import augmented
from mmfm_core.models.encoders.shared import SharedEncoder
from mmfm_core.models.fusion.base import Fusion
from mmfm_core.models.placement import generators
from mmfm_core.models.tasks import Encoding, Head, Objective


class MultimodalModel(nn.Module):
    """A site builds the encoders of the modalities it holds, and the heads and objectives that it can train.

    Every part is initialised from its own seed, so that it starts the same wherever it is built.

    Attributes:
        inputs_of: encoder -> the modalities that it reads here. An encoder that is only lent to others has none.
        precision: what plain training steps compute in, where torch's autocast finds it harmless.
    """

    fusion: Fusion
    precision: torch.dtype = torch.float32

    def __init__(
        self,
        config: ModelConfig,
        modalities: Collection[str],
        targets: Collection[str],
        seed: int,
        artifacts: Path = NO_ARTIFACTS,
    ) -> None:
        """Build what a site has that holds `modalities`, and targets for the heads `targets`.

        `artifacts` is the folder of pinned files, by their hash (`mmfm_core.artifacts`).
        """
        super().__init__()
        held = config.held(modalities, targets)
        self.config = config
        self.inputs_of = {name: config.encoders[name].inputs(name) for name in held.encoders}
        self.encoders = built(
            "encoders", seed, {n: partial(config.encoders[n].build, config, n, artifacts) for n in held.encoders}
        )
        for encoder in self.encoders.values():
            if isinstance(encoder, SharedEncoder):
                encoder.borrow(self.encoders)
        with seeded(seed, "fusion"):
            self.fusion = config.fusion.build(config)
        blocks = {**{f"encoders.{name}": part for name, part in self.encoders.items()}, "fusion": self.fusion}
        if held.encoders == tuple(config.encoders):  # else a pattern may name what this site does not have
            check_targets(blocks, config.adapters)
        add_adapters(blocks, config.adapters, partial(seeded, seed))
        self.heads = built("heads", seed, {n: partial(config.heads[n].build, config, n, artifacts) for n in held.heads})
        self.objectives = built(
            "objectives", seed, {n: partial(config.objectives[n].build, config, n, artifacts) for n in held.objectives}
        )

    def forward(self, batch: Batch, heads: Collection[str]) -> dict[str, object]:
        """Outputs of `heads`; what a study's absent modalities hold has no influence."""
        encoding = Encoding(self, batch)
        return {name: self.heads[name](encoding) for name in heads}

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return next(self.parameters()).device

    def losses(self, batch: Batch, tasks: Collection[str]) -> dict[str, Tensor]:
        """The loss of each study for each head or objective, [B]; zero where it cannot serve it."""
        batch = batch.to(self.device)
        if self.training:
            batch = augmented(batch, self.config)
        encoding = Encoding(self, batch)
        losses = {}
        for name in tasks:
            if name in self.heads:
                head = self.heads[name]
                assert isinstance(head, Head)
                loss = head.loss(head(encoding), batch)
            else:
                objective = self.objectives[name]
                assert isinstance(objective, Objective)
                loss = objective(encoding)
            losses[name] = torch.where(batch.usable[name], loss, 0.0)
        return losses


def built(kind: str, seed: int, parts: Mapping[str, Callable[[], nn.Module]]) -> nn.ModuleDict:
    """The parts of one kind, each from a seed of its own."""
    modules = nn.ModuleDict()
    for name, build in parts.items():
        with seeded(seed, kind, name):
            part = build()
        try:
            modules[name] = part
        except KeyError as error:
            raise MmfmError(f"model: '{name}' is a word that torch keeps for itself; choose another name") from error
    return modules


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Torch's generators seeded from `parts` inside the block, and as they were after it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    with generators(int.from_bytes(digest[:8]) % 2**63):
        yield


def full_model(config: ModelConfig, seed: int, artifacts: Path = NO_ARTIFACTS) -> MultimodalModel:
    """The model with every modality and head, as the coordinator starts from."""
    return MultimodalModel(config, config.modalities, config.heads, seed, artifacts)
