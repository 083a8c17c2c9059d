"""2D images: any architecture of timm as a trunk, from random weights or from a checkpoint."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self, cast

import timm
import torch
from pydantic import AfterValidator, Field, PositiveInt, StringConstraints
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.batchnorm import _BatchNorm

from mmfm_core.config.modality import ImageModality
from mmfm_core.config.model import Artifact, Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.config.strict import Name, did_you_mean
from mmfm_core.errors import MmfmError
from mmfm_core.models.encoders import pretrained
from mmfm_core.models.encoders.base import Encoder, FeatureDropout
from mmfm_core.models.tokens import Tokens


def _known(architecture: str) -> str:
    if not timm.is_model(architecture):
        raise ValueError(f"timm has no '{architecture}'; {did_you_mean(architecture, timm.list_models())}")
    return architecture


# No colon or slash: timm reads 'hf-hub:' and 'local-dir:' as places to load from.
Architecture = Annotated[str, StringConstraints(pattern="^[a-z0-9_]+$"), AfterValidator(_known)]


class TimmTrunk(EncoderConfig):
    """A timm architecture, convolutional or not, whose last map becomes `grid` x `grid` tokens.

    One with BatchNorm must be frozen (`parameters.frozen`): its statistics mix a batch's patients. A transformer's own
    position vectors are bare parameters, which have no gradient per patient: for private training, freeze them too.

    Attributes:
        channels: image modalities of one size, stacked as input channels; the encoder's own modality where none.
        architecture: its name in timm.
        grid: tokens along each side, averaged from the trunk's own map (`adaptive_avg_pool2d`).
        dropout: share of the trunk's features that the linear layer behind it does not see in training. On a frozen
            trunk, few studies are soon known by heart.
        pretrained: its safetensors state dict under timm's names. Input channels, and sides of a transformer, may
            differ from the file's.
    """

    READS = ("image2d",)

    type: Literal["timm"]
    channels: tuple[Name, ...] = ()
    architecture: Architecture
    grid: PositiveInt = 7
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pretrained: Artifact | None = None

    def inputs(self, name: str) -> tuple[str, ...]:
        """The modalities that are stacked, or the encoder's own."""
        return self.channels or (name,)

    def check(self, model: Model, name: str) -> None:
        """Check that stacked images are alike."""
        images = [cast(ImageModality, model.modalities[modality]) for modality in self.inputs(name)]
        if len({(image.size, image.channels) for image in images}) > 1:
            raise ValueError("channels: modalities that are stacked must have one size and the same number of channels")

    def build(self, model: Model, name: str, artifacts: Path) -> "TrunkEncoder":
        """The encoder; its trunk has random weights or those of its checkpoint."""
        field = f"model.encoders.{name}"
        try:
            encoder = TrunkEncoder(model, self, self.inputs(name))
            unused = encoder.unused()
        except Exception as error:  # each architecture has its own way to refuse a size
            raise MmfmError(
                f"{field}.architecture: '{self.architecture}' gives no map of features for images of this size; "
                f"choose another size or architecture ({error})"
            ) from error
        if self.pretrained:
            state = pretrained.tensors(artifacts, self.pretrained, f"{field}.pretrained")
            pretrained.into_timm(encoder.trunk, state, f"{field}.pretrained")
        for child in unused:  # it would be sent for nothing, and has no gradient
            setattr(encoder.trunk, child, nn.Identity())
        return encoder


class TrunkEncoder(Encoder):
    """A trunk's last map as a grid of tokens."""

    reads_input = False

    def __init__(self, model: Model, config: TimmTrunk, inputs: tuple[str, ...]) -> None:
        image = cast(ImageModality, model.modalities[inputs[0]])
        super().__init__(model.dim, inputs, image.channels)
        self.shape = (image.channels * len(inputs), *image.size)
        published = timm.get_pretrained_cfg(config.architecture)
        # Transformers must know the image's size; convolutional networks do not take it.
        sized: dict[str, Any] = {"img_size": image.size} if published and published.fixed_input_size else {}
        self.trunk = timm.create_model(
            config.architecture, pretrained=False, in_chans=self.shape[0], num_classes=0, **sized
        )
        width = self.trunk.num_features
        # A convolutional network's last map has no common scale, and is far from centred after its ReLU.
        self.project = nn.Sequential(nn.LayerNorm(width), FeatureDropout(config.dropout), nn.Linear(width, model.dim))
        self.grid = (config.grid, config.grid)

    def unused(self) -> list[str]:
        """The trunk's children that `features` does not pass through: what only a classifier needs."""
        used: set[nn.Module] = set()
        hooks = [
            module.register_forward_hook(lambda module, *_: used.add(module))
            for module in self.trunk.modules()
            if module is not self.trunk
        ]
        with torch.inference_mode():
            self.eval().features(torch.zeros(1, *self.shape))
        self.train()
        for hook in hooks:
            hook.remove()
        return [name for name, child in self.trunk.named_children() if used.isdisjoint(child.modules())]

    def train(self, mode: bool = True) -> Self:
        """Set the mode, except that BatchNorm keeps using its own statistics."""
        super().train(mode)
        for module in self.trunk.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self

    def features(self, x: Tensor) -> Tensor:
        """[B, C, H, W] -> [B, 1, grid * grid, W]."""
        states: Tensor = self.trunk.forward_features(x)
        if states.ndim == 3:  # a transformer's: class and register tokens first, then the patches
            side = self.trunk.patch_embed.grid_size
            states = states[:, self.trunk.num_prefix_tokens :].transpose(1, 2).unflatten(2, side)
        elif getattr(self.trunk, "output_fmt", "NCHW") == "NHWC":
            states = states.permute(0, 3, 1, 2)
        return F.adaptive_avg_pool2d(states, self.grid).flatten(2).transpose(1, 2)[:, None]

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens of the model's width with their grid."""
        projected: Tensor = self.project(features[:, 0])
        return Tokens(projected, projected.new_ones(projected.shape[:2], dtype=torch.bool), self.grid)
