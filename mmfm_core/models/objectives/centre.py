"""Where an encoder's vectors lie: the centres of the `sum` fusion, learned like anything else, and so privately too."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.config.part import ObjectiveConfig
from mmfm_core.models.fusion.sum import SumFusion
from mmfm_core.models.tasks import Encoding, Objective
from mmfm_core.models.tokens import learned


class Centre(ObjectiveConfig):
    """Half the squared distance of a study's vectors from the centres of the fusion, which must be `sum`.

    The gradient is the difference itself: plain SGD at the rate 1 moves a centre to the batch's mean. In private
    training the difference is what is clipped; the task's `weight` brings its length near `max_grad_norm`. Train
    `fusion.centre.*` alone: encoders that are trained too would bring all studies to one point.
    """

    type: Literal["centre"]

    def check(self, model: Model) -> None:
        """Check that the fusion has centres."""
        if model.fusion.type != "sum":
            raise ValueError(f"type: 'centre' is for the fusion 'sum', and the document's is '{model.fusion.type}'")

    def usable(self, model: Model, present: Mapping[str, Tensor]) -> Tensor:
        """Studies with one of the encoders."""
        return torch.stack([present[name] for name in self.sees(model)]).any(0)

    def build(self, model: Model, name: str, artifacts: Path) -> "CentreObjective":
        """The objective; it has no parameters of its own."""
        return CentreObjective(self.sees(model))


class CentreObjective(Objective):
    """How far each vector of a study is from its centre."""

    def __init__(self, encoders: Sequence[str]) -> None:
        super().__init__()
        self.encoders = tuple(encoders)

    def forward(self, encoding: Encoding) -> Tensor:
        """Half the squared distances, added up over the encoders that a study has, [B]."""
        fusion = encoding.model.fusion
        assert isinstance(fusion, SumFusion)
        parts = {name: encoding.parts[name] for name in self.encoders if name in encoding.parts}
        centres = learned(fusion.centre, len(encoding.batch))
        vectors, _ = fusion.vectors(parts, centres)
        return (vectors - centres).square().sum((1, 2)) / 2
