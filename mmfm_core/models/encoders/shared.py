"""A modality that passes through another modality's encoder."""

from pathlib import Path
from typing import Literal

from torch import Tensor, nn

from mmfm_core.config.model import Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.config.strict import Name, did_you_mean
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.tokens import Tokens


class Shared(EncoderConfig):
    """One trunk for several modalities (frontal and lateral films, say); only the type embedding is its own."""

    READS = ("image2d", "volume3d", "text", "tabular")

    type: Literal["shared"]
    share_with: Name

    def check(self, model: Model, name: str) -> None:
        """Check that the other encoder exists, has weights of its own, and reads the same form."""
        other = model.encoders.get(self.share_with)
        if other is None:
            raise ValueError(
                f"share_with: there is no encoder '{self.share_with}'; {did_you_mean(self.share_with, model.encoders)}"
            )
        if isinstance(other, Shared) or len(other.inputs(self.share_with)) > 1:
            raise ValueError(f"share_with: '{self.share_with}' must be an encoder of one modality with its own weights")
        mine, theirs = model.modalities[name], model.modalities[other.inputs(self.share_with)[0]]
        for form in ("kind", "size", "channels", "max_length", "features"):
            if getattr(mine, form, None) != getattr(theirs, form, None):
                raise ValueError(f"share_with: '{name}' and '{self.share_with}' must have the same {form}")

    def build(self, model: Model, name: str, artifacts: Path) -> "SharedEncoder":
        """The type embedding; the model lends it the trunk at each call."""
        return SharedEncoder(model.dim, self.share_with)


class SharedEncoder(Encoder):
    """Another encoder's trunk, which the state dict holds once, under the other's name."""

    def __init__(self, dim: int, share_with: str) -> None:
        super().__init__(dim)
        self.share_with = share_with

    def borrow(self, encoders: nn.ModuleDict) -> None:
        """Use the trunk of one of `encoders`."""
        # Not as a submodule: the weights are the owner's, and the state dict holds them once.
        self.__dict__["owner"] = encoders[self.share_with]

    @property
    def owner(self) -> Encoder:
        """The encoder whose trunk this one uses."""
        owner: Encoder = self.__dict__["owner"]
        return owner

    @property
    def reads_input(self) -> bool:  # type: ignore[override]
        """As the owner."""
        return self.owner.reads_input

    def features(self, x: Tensor) -> Tensor:
        """What the owner's trunk makes of the input."""
        return self.owner.features(x)

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """What the owner makes of the features."""
        return self.owner.tokens(features, x)
