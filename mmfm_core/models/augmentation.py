"""Random changes of images in training, with the targets that lie on them."""

from collections.abc import Sequence
from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from mmfm_core.config.modality import AXES, Augment, PixelModality
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.motion import draws, moved


def augmented(batch: Batch, model: Model) -> Batch:
    """Each study's images changed as their modalities say, and its targets with them.

    One draw mirrors all of a study's images that may be mirrored, and another turns, scales and shifts them, so that
    what is registered stays so, and masks and boxes stay on what they mark; the other changes are of each image alone.
    (monai's transforms take one study at a time, and draw from numpy's generator, which no site seeds.)
    """
    changes = {name: change for name in batch.inputs if (change := getattr(model.modalities[name], "augment", None))}
    if not changes:
        return batch
    inputs, targets = dict(batch.inputs), dict(batch.targets)
    for axis in AXES[3]:
        mirrored = [name for name, change in changes.items() if axis in change.mirror]
        if not mirrored:
            continue
        chosen = torch.rand(len(batch), device=inputs[mirrored[0]].device) < 0.5
        for name in mirrored:
            inputs[name] = _where(chosen, inputs[name].flip(AXES[inputs[name].ndim - 2][axis]), inputs[name])
        for name, target in targets.items():
            targets[name] = _where(chosen, model.heads[name].mirrored(target, model, axis), target)
    if moving := [name for name, change in changes.items() if change.moves]:
        drawn = draws(len(batch), inputs[moving[0]].device)
        inputs |= {name: moved(inputs[name], drawn, cast(PixelModality, model.modalities[name])) for name in moving}
        targets = {name: model.heads[name].moved(target, model, drawn) for name, target in targets.items()}
    inputs |= {name: _jittered(inputs[name], change) for name, change in changes.items()}
    return replace(batch, inputs=inputs, targets=targets)


def moves_of(model: Model, encoders: Sequence[str]) -> Augment:
    """How the images of `encoders` are mirrored and moved, with what is drawn on them.

    Raises:
        ValueError: they are not moved alike.
    """
    images = [model.modalities[name] for encoder in encoders for name in model.encoders[encoder].inputs(encoder)]
    changes = {change.places: change for image in images for change in [getattr(image, "augment", None) or Augment()]}
    if len(changes) > 1:
        raise ValueError(
            "encoders: images that something is drawn on are moved alike; give all of them one 'mirror', 'rotate', "
            "'scale' and 'shift' under 'augment'"
        )
    return next(iter(changes.values()))


def _jittered(images: Tensor, change: Augment) -> Tensor:
    contrast, brightness = (2 * images.new_empty(2, len(images), *[1] * (images.ndim - 1)).uniform_() - 1).unbind()
    images = images * (1 + change.contrast * contrast) + change.brightness * brightness
    return images + change.noise * torch.randn_like(images) if change.noise else images


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (other.ndim - 1)), one, other)
