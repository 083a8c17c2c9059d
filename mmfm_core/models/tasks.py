"""What heads and objectives are given, and what they give."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.fusion.base import dropped
from mmfm_core.models.tokens import Fused, Tokens

if TYPE_CHECKING:
    from mmfm_core.models.model import MultimodalModel


class Encoding:
    """A batch as a model sees it, where the model is.

    Nothing is computed before a head or an objective asks for it, and nothing twice.
    """

    def __init__(self, model: MultimodalModel, batch: Batch) -> None:
        self.model, self.batch = model, batch.to(model.device)
        self._inputs: dict[str, Tensor] = {}
        self._fused: dict[tuple[str, ...], Fused] = {}

    def encoder(self, name: str) -> Encoder:
        """The encoder `name`."""
        encoder = self.model.encoders[name]
        assert isinstance(encoder, Encoder)
        return encoder

    def present(self, name: str) -> Tensor:
        """The studies ([B] bool) in which encoder `name` has something to read."""
        inputs = [self.batch.present[m] for m in self.model.inputs_of[name] if m in self.batch.inputs]
        return torch.stack(inputs).any(0)

    def input(self, name: str) -> Tensor:
        """What encoder `name` reads; where contrasts are stacked, with those filled in that are missing or dropped."""
        if name not in self._inputs:
            modalities = self.model.inputs_of[name]
            self._inputs[name] = (
                self.batch.inputs[modalities[0]] if len(modalities) == 1 else self._stacked(name, modalities)
            )
        return self._inputs[name]

    def _stacked(self, name: str, modalities: Sequence[str]) -> Tensor:
        here = [m for m in modalities if m in self.batch.inputs]
        present = torch.stack([self.batch.present[m] for m in here], 1)
        if self.model.training and self.model.fusion.modality_dropout:
            present = dropped(present, self.model.fusion.modality_dropout)
        return self.encoder(name).stack(self.batch.inputs, dict(zip(here, present.T, strict=True)))

    @cached_property
    def parts(self) -> dict[str, Tokens]:
        """Each encoder's tokens before fusion; what a study's absent modalities hold has no influence."""
        return {
            name: self._tokens(name).only(self.present(name))
            for name in self.model.encoders
            if any(modality in self.batch.inputs for modality in self.model.inputs_of.get(name, ()))
        }

    def _tokens(self, name: str) -> Tokens:
        encoder, features = self.encoder(name), self.batch.features.get(name)
        x = self.input(name) if features is None or encoder.reads_input else features
        tokens: Tokens = encoder(x, features)
        return tokens

    def fused(self, encoders: Sequence[str] = ()) -> Fused:
        """The fusion of the tokens of `encoders`, or of all."""
        key = tuple(name for name in self.parts if not encoders or name in encoders)
        if key not in self._fused:
            self._fused[key] = self.model.fusion({name: self.parts[name] for name in key})
        return self._fused[key]


class Head(nn.Module, ABC):
    """What a task reads from a model.

    A study that cannot serve the head (`batch.usable`) still passes through it: its loss is finite, and is not counted.
    """

    @abstractmethod
    def forward(self, encoding: Encoding) -> Any:
        """The head's outputs."""

    @abstractmethod
    def loss(self, outputs: Any, batch: Batch) -> Tensor:
        """The loss of each study, [B], reduced within the study."""

    @abstractmethod
    def predict(self, encoding: Encoding) -> Mapping[str, Sequence[Any]]:
        """Columns of a table with a row for each study: predictions, and the targets they are to be measured by."""


class Objective(nn.Module, ABC):
    """A pre-training loss around the encoders."""

    @abstractmethod
    def forward(self, encoding: Encoding) -> Tensor:
        """The loss of each study, [B], reduced within the study; finite where the study cannot serve it."""
