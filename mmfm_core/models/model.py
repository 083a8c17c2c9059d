"""The model: encoders, fusion, heads. The prefixes of its state dict are the federation's vocabulary."""

import hashlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from mmfm_core.config.model import Model as ModelConfig
from mmfm_core.data.dataset import Batch
from mmfm_core.errors import MmfmError
from mmfm_core.models.encoders import build_encoder
from mmfm_core.models.fusion import build_fusion
from mmfm_core.models.heads import ClassificationHead, build_head


class MultimodalModel(nn.Module):
    """A site builds the encoders of the modalities it holds and the heads it has targets for.

    Every part is initialised from its own seed, so that it starts the same wherever it is built.
    """

    def __init__(self, config: ModelConfig, modalities: Collection[str], heads: Collection[str], seed: int) -> None:
        super().__init__()
        self.encoders, self.heads = nn.ModuleDict(), nn.ModuleDict()
        for name in config.modalities:
            if name in modalities:
                with seeded(seed, "encoders", name):
                    _add(self.encoders, name, build_encoder(config, name))
        with seeded(seed, "fusion"):
            self.fusion = build_fusion(config)
        for name in config.heads:
            if name in heads:
                with seeded(seed, "heads", name):
                    _add(self.heads, name, build_head(config, name))

    def forward(self, batch: Batch, heads: Collection[str]) -> dict[str, Tensor]:
        """Outputs of `heads`; what a study's absent modalities hold has no influence."""
        parts = {
            name: encoder(batch.inputs[name]).only(batch.present[name])
            for name, encoder in self.encoders.items()
            if name in batch.inputs
        }
        fused = self.fusion(parts)
        return {name: self.heads[name](fused) for name in heads}

    def losses(self, batch: Batch, heads: Collection[str]) -> dict[str, Tensor]:
        """The loss of each study for each head, [B]; zero where it has no label."""
        outputs = self(batch, heads)
        losses = {}
        for name in heads:
            head = self.heads[name]
            assert isinstance(head, ClassificationHead)
            losses[name] = head.loss(outputs[name], batch.targets[name])
        return losses


def _add(parts: nn.ModuleDict, name: str, part: nn.Module) -> None:
    try:
        parts[name] = part
    except KeyError as error:
        raise MmfmError(f"model: '{name}' is a word that torch keeps for itself; choose another name") from error


@contextmanager
def seeded(*parts: object) -> Iterator[None]:
    """Torch's CPU generator seeded from `parts` inside the block, and as it was after it."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(int.from_bytes(digest[:8]) % 2**63)
        yield


def full_model(config: ModelConfig, seed: int) -> MultimodalModel:
    """The model with every modality and head, as the coordinator starts from."""
    return MultimodalModel(config, config.modalities, config.heads, seed)
