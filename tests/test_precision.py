"""Training steps in bfloat16: every task takes one, near the one in float32; private steps stay exact."""

from dataclasses import dataclass

import pytest
import torch
from test_combinations import document, random_batch

from mmfm_core.config.federation import Stage
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import MultimodalModel, full_model, seeded
from mmfm_core.privacy.step import Mechanism
from mmfm_core.registry import FUSIONS, HEADS, OBJECTIVES
from mmfm_core.training.steps import train

STAGE = Stage.model_validate(
    {
        "name": "train",
        "rounds": 1,
        "local_steps": 1,
        "batch_size": 3,
        "tasks": {"task": {}},
        "optimizer": {"type": "sgd", "lr": 1.0, "weight_decay": 0.0},
    }
)


@dataclass
class Study:
    patient: str


class Site:
    """Three studies of three patients, all for training."""

    def __init__(self, everything: Batch) -> None:
        self.everything, self.studies = everything, [Study(str(n)) for n in range(len(everything))]

    def rows(self, split: str, tasks: list[str]) -> list[int]:
        return self.everything.usable["task"].nonzero().flatten().tolist()

    def batch(self, rows: list[int], next_rows: list[int] = ()) -> Batch:
        return self.everything.rows(rows, next_rows)


def step_of(model: MultimodalModel, site: Site, precision: torch.dtype, mechanism: Mechanism | None = None):
    """What one step adds to the parameters, and its loss."""
    model.precision = precision
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    with seeded(1, "step"):
        loss = train(model, site, STAGE, list(before), mechanism=mechanism)
    change = torch.cat([(p.detach() - before[name]).flatten() for name, p in model.named_parameters()])
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(before[name])
    return change, loss


def tiny(task: str, fusion: str) -> tuple[MultimodalModel, Site]:
    config = Model.model_validate(document(task, fusion))
    torch.manual_seed(0)
    everything = tuple(config.modalities)
    return full_model(config, seed=0), Site(random_batch(task, config, everything, everything))


@pytest.mark.parametrize(
    ("task", "fusion"), [*((t, "joint") for t in (*HEADS, *OBJECTIVES)), *(("findings", f) for f in FUSIONS)]
)
def test_a_step_goes_where_the_one_in_float32_goes(task, fusion):
    model, site = tiny(task, fusion)
    exact, loss = step_of(model, site, torch.float32)
    rounded, rounded_loss = step_of(model, site, torch.bfloat16)
    assert not torch.equal(exact, rounded)
    assert torch.cosine_similarity(exact, rounded, dim=0) > 0.99
    assert rounded_loss == pytest.approx(loss, rel=0.02)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_private_steps_stay_exact():
    """That a patient moves the sum by at most the clip norm is shown for float32."""
    model, site = tiny("classification", "concat")
    mechanism = Mechanism(noise=0.0, max_norm=1.0, rate=1.0, patients=3)
    exact, _ = step_of(model, site, torch.float32, mechanism)
    asked, _ = step_of(model, site, torch.bfloat16, mechanism)
    assert torch.equal(exact, asked)
