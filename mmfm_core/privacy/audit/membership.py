"""Membership inference with shadow models: LiRA (Carlini et al. 2022, 2112.03570), and the most that it may find.

Many models are trained, each on a random half of the patients. Each in turn is attacked, by what all others say of how
sure a model is of a patient whom it was trained on, and of one whom it was not.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.stats import norm, rankdata
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Batch
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.privacy.accounting import Charge, privacy_curve
from mmfm_core.privacy.audit.made_up import HEAD, MODALITY, dataset_of, model_with, names_of
from mmfm_core.privacy.randomness import Floats, chosen
from mmfm_core.privacy.step import Mechanism
from mmfm_core.training.steps import train

Matrix = NDArray[np.float64]
Coins = NDArray[np.bool_]

MODELS, PATIENTS, FEATURES = 32, 300, 100
FLIPPED = 0.2  # of the labels: what can only be learned by heart
FALSE_POSITIVES = 0.01


@dataclass(frozen=True)
class Membership:
    """What an attack finds, or may find at most.

    Attributes:
        area: under the curve of true over false positives; 0.5 is chance.
        error: the standard error of `area`; zero of a theoretical one.
        found: the share of those who were there that is found while `FALSE_POSITIVES` of the others are accused.
    """

    area: float
    error: float
    found: float


class Logistic(Head):
    """Logistic regression on the row of numbers: a head on the features of a frozen trunk, as far as privacy goes."""

    def __init__(self, features: int) -> None:
        super().__init__()
        self.linear = nn.Linear(features, 1)
        nn.init.zeros_(self.linear.weight)

    def forward(self, encoding: Encoding) -> Tensor:
        """The log-odds of each study, [B]."""
        logits: Tensor = self.linear(encoding.batch.inputs[MODALITY])[:, 0]
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy of each study, [B]."""
        return F.binary_cross_entropy_with_logits(outputs, batch.targets[HEAD].float(), reduction="none")

    def predict(self, encoding: Encoding) -> dict[str, list[float]]:
        """The log-odds."""
        return {"logit": self(encoding).tolist()}


def attack(
    steps: int,
    mechanism: Mechanism | None,
    models: int = MODELS,
    told: Callable[[int, int], None] = lambda done, of: None,
) -> Membership:
    """LiRA on models that were trained for so many steps by the private step, or plainly without a mechanism.

    The patients of `mechanism` are those of each model; `told` hears of models trained, and of how many.
    """
    public = torch.Generator().manual_seed(0)  # the attacker knows all patients, and asks who was there
    x = torch.randn(PATIENTS, FEATURES, generator=public)
    truth = x @ torch.randn(FEATURES, generator=public) > 0
    y = torch.where(torch.rand(PATIENTS, generator=public) < FLIPPED, ~truth, truth).long()
    coins = chosen(models * PATIENTS, 0.5).reshape(models, PATIENTS)
    sure = np.zeros((models, PATIENTS))
    for index, included in enumerate(coins):
        sure[index] = _trained(x, y, included, steps, mechanism)
        told(index + 1, models)
    scores = likelihood_ratios(sure, coins)
    area = curve_area(scores.ravel(), coins.ravel())
    # Leaving out one attacked model at a time: patients of one are not independent.
    rest = [np.arange(models) != index for index in range(models)]
    areas = np.array([curve_area(scores[these].ravel(), coins[these].ravel()) for these in rest])
    error = math.sqrt((models - 1) / models * float(((areas - areas.mean()) ** 2).sum()))
    return Membership(area, error, found_at(scores.ravel(), coins.ravel(), FALSE_POSITIVES))


def _trained(x: Tensor, y: Tensor, included: Coins, steps: int, mechanism: Mechanism | None) -> Floats:
    """How sure a model, trained on the patients `included`, is of each one's label: the log-odds of that, [P]."""
    rows = np.flatnonzero(included)
    model = model_with(Logistic(x.shape[1]))
    optimizer = {"type": "adamw", "lr": 0.05, "weight_decay": 0.0}
    stage = Stage.model_validate(
        {"name": "learn", "local_steps": steps, "batch_size": len(x), "tasks": {HEAD: {}}, "optimizer": optimizer}
    )
    train(model, dataset_of(x[rows], [str(row) for row in rows], y[rows]), stage, names_of(model), mechanism=mechanism)
    with torch.inference_mode():
        logits = model(dataset_of(x, [""] * len(x), y).everything, [HEAD])[HEAD]
    assert isinstance(logits, Tensor)
    return torch.where(y > 0, logits, -logits).double().numpy()


def likelihood_ratios(sure: Matrix, coins: Coins) -> Matrix:
    """How much likelier 'in' is than 'out', for each model and patient, [M, P], by the other models alone.

    Both are normal, with means of the patient's own and, as models are few, one variance for all patients (the paper's
    section VI-C). Where no other model had the patient in, or none out, nothing is known, and the ratio is 0.
    """

    def by_others(members: Coins) -> tuple[Matrix, Matrix]:
        """The mean over the other models that `members` takes, and their number."""
        count = members.sum(0) - members
        return (np.where(members, sure, 0).sum(0) - np.where(members, sure, 0)) / np.maximum(count, 1), count

    (mean_in, count_in), (mean_out, count_out) = by_others(coins), by_others(~coins)
    of_in = float(np.square(np.where(coins, sure - mean_in, 0)).sum() / max(coins.sum(), 1))
    of_out = float(np.square(np.where(coins, 0, sure - mean_out)).sum() / max((~coins).sum(), 1))
    ratio = norm.logpdf(sure, mean_in, math.sqrt(of_in) + 1e-12) - norm.logpdf(
        sure, mean_out, math.sqrt(of_out) + 1e-12
    )
    known: Matrix = np.where((count_in > 0) & (count_out > 0), ratio, 0.0)
    return known


def curve_area(scores: Floats, included: Coins) -> float:
    """The chance that who was there scores higher than who was not, ties counting half (Mann & Whitney)."""
    ins, outs = int(included.sum()), int((~included).sum())
    return float((rankdata(scores)[included].sum() - ins * (ins + 1) / 2) / (ins * outs))


def found_at(scores: Floats, included: Coins, false_positives: float) -> float:
    """The share of those who were there that score above all but `false_positives` of the others."""
    outs = np.sort(scores[~included])[::-1]
    return float((scores[included] > outs[int(false_positives * len(outs))]).mean())


def allowed(charge: Charge | None) -> Membership:
    """The most that any attack on one patient's membership may find, whatever it knows: everything without privacy.

    A release that is (epsilon, delta)-private has of every attack with false positives a no more true ones than
    delta + exp(epsilon) a, and 1 - exp(-epsilon) (1 - delta - a) (Wasserman & Zhou 2010; Kairouz et al. 2015). That
    holds for each point of the schedule's curve of (epsilon, delta), which Google's accountant gives as upper bounds;
    so the least of them holds, at every rate of sampling. At rate 1 it is Phi(sqrt(steps) / noise + Phi^-1(a)), with
    the area Phi(sqrt(steps) / noise / sqrt(2)) (Dong, Roth & Su 2022). It is one curve for all patients, and concave:
    so it holds for the mean over patients too, which the attack is measured by.
    """
    if charge is None:
        return Membership(1.0, 0.0, 1.0)
    epsilons, deltas = privacy_curve(charge)

    def most(false: Floats) -> Floats:
        up = deltas[:, None] + np.exp(epsilons)[:, None] * false
        down = 1 - np.exp(-epsilons)[:, None] * (1 - deltas[:, None] - false)
        least: Floats = np.minimum(np.minimum(up, down).min(0), 1.0)
        return least

    grid = np.concatenate([np.logspace(-8, -2, 2000), np.linspace(0.01, 1, 8000)[1:]])
    # It grows: the value at the right end of each interval is its greatest there.
    area = float((most(grid) * np.diff(grid, prepend=0.0)).sum())
    return Membership(min(area, 1.0), 0.0, float(most(np.array([FALSE_POSITIVES]))[0]))
