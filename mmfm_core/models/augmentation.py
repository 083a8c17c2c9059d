"""Random changes of images in training, with the targets that lie on them."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mmfm_core.config.modality import AXES, Augment, Axis
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch


def augmented(batch: Batch, model: Model) -> Batch:
    """Each study's images changed as their modalities say, and its targets with them.

    One draw mirrors all of a study's images that may be mirrored, so that what is registered stays so, and masks and
    boxes stay on what they mark; the other changes are of each image alone. (monai's transforms take one study at a
    time, and draw from numpy's generator, which no site seeds.)
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
    inputs |= {name: _jittered(inputs[name], change) for name, change in changes.items()}
    return replace(batch, inputs=inputs, targets=targets)


def mirrors(model: Model, encoders: Sequence[str]) -> frozenset[Axis]:
    """The axes along which the images of `encoders` are mirrored, with what is drawn on them.

    Raises:
        ValueError: they are not mirrored alike.
    """
    images = [model.modalities[name] for encoder in encoders for name in model.encoders[encoder].inputs(encoder)]
    axes = {frozenset(change.mirror if (change := getattr(image, "augment", None)) else ()) for image in images}
    if len(axes) > 1:
        raise ValueError(
            "encoders: images that something is drawn on are mirrored alike; give all one 'augment.mirror'"
        )
    return axes.pop()


def _jittered(images: Tensor, change: Augment) -> Tensor:
    contrast, brightness = (2 * images.new_empty(2, len(images), *[1] * (images.ndim - 1)).uniform_() - 1).unbind()
    images = images * (1 + change.contrast * contrast) + change.brightness * brightness
    return images + change.noise * torch.randn_like(images) if change.noise else images


def _where(chosen: Tensor, one: Tensor, other: Tensor) -> Tensor:
    return torch.where(chosen.reshape(-1, *[1] * (other.ndim - 1)), one, other)
