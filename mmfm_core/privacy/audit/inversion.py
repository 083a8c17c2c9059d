"""Gradient inversion: an image read out of the message that one step on it leaves (Phong et al. 2018; Geiping 2020).

Of a linear layer with a bias the gradient of each row of weights is the layer's input, times the gradient of that row's
bias. With one patient in the step the quotient is the image, exactly, and clipping scales both alike.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import seeded
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.privacy.audit.made_up import HEAD, MODALITY, dataset_of, model_with, names_of
from mmfm_core.privacy.step import Mechanism
from mmfm_core.training.steps import train

SIDE, WIDTH = 32, 16
TRIES = 8
RECOGNISED = 20.0
"""The PSNR (dB) from which an image of values between 0 and 1 is taken for recognisable: a mean error of a tenth."""


@dataclass(frozen=True)
class Inversion:
    """Peak signal-to-noise ratios of an image of values between 0 and 1, in dB.

    Attributes:
        found: of what the attack read out of the patient's message, the mean over `TRIES` patients.
        guess: of what it read out of another patient's: what it would say without having seen anything of this one.
    """

    found: float
    guess: float


class Perceptron(Head):
    """Two linear layers on the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(SIDE**2, WIDTH), nn.Linear(WIDTH, 2)

    def forward(self, encoding: Encoding) -> Tensor:
        """Logits [B, 2]."""
        logits: Tensor = self.second(self.first(encoding.batch.inputs[MODALITY]).tanh())
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each study, [B]."""
        return F.cross_entropy(outputs, batch.targets[HEAD], reduction="none")

    def predict(self, encoding: Encoding) -> dict[str, Sequence[float]]:
        """The first logit."""
        return {"logit": self(encoding)[:, 0].tolist()}


def attack(mechanism: Mechanism | None) -> Inversion:
    """Read a patient out of the message that a step of training on that patient alone leaves.

    At the worst: the attacker knows that nobody else was in the step, whatever the rate of sampling.
    """
    found, guesses = [], []
    for index in range(TRIES):
        image = film(index)
        found.append(psnr(inverted(*message(image, mechanism)), image))
        guesses.append(psnr(inverted(*message(film(TRIES + index), mechanism)), image))
    return Inversion(float(np.mean(found)), float(np.mean(guesses)))


def message(image: Tensor, mechanism: Mechanism | None) -> tuple[Tensor, Tensor]:
    """How far a step on one patient moves the first layer's weights, [W, pixels], and biases, [W]."""
    with seeded("inversion"):
        model = model_with(Perceptron())
    optimizer = {"type": "sgd", "lr": 1.0, "weight_decay": 0.0}
    stage = Stage.model_validate({"name": "see", "local_steps": 1, "tasks": {HEAD: {}}, "optimizer": optimizer})
    names = (f"heads.{HEAD}.first.weight", f"heads.{HEAD}.first.bias")
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, dataset_of(image.reshape(1, -1), ["patient"]), stage, names_of(model), mechanism=mechanism)
    weight, bias = (before[name] - model.state_dict()[name] for name in names)
    return weight, bias


def inverted(weight: Tensor, bias: Tensor) -> Tensor:
    """The image, [side, side], by every row of the layer, each as far as its bias moved: the least-squares quotient."""
    pixels = (bias[:, None] * weight).sum(0) / bias.square().sum().clamp(min=1e-30)
    return pixels.clamp(0, 1).reshape(SIDE, SIDE)


def film(seed: int) -> Tensor:
    """An image, [side, side], of a few smooth spots, with values from 0 to 1."""
    generator = torch.Generator().manual_seed(seed)
    axis = torch.linspace(0, 1, SIDE)
    image = torch.zeros(SIDE, SIDE)
    for x, y, size in torch.rand(6, 3, generator=generator).tolist():
        image += (-((axis[:, None] - y) ** 2 + (axis - x) ** 2) / (0.02 + 0.05 * size)).exp()
    return (image - image.min()) / (image.max() - image.min())


def psnr(guess: Tensor, image: Tensor) -> float:
    """Peak signal-to-noise ratio in dB; 150 where the two are equal to rounding."""
    error = float((guess.double() - image.double()).square().mean())
    return 150.0 if error < 1e-15 else -10 * float(np.log10(error))
