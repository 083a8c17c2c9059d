"""FedProx against its objective, written out and differentiated by autograd: F(w) + mu / 2 * |w - w_round|^2."""

from pathlib import Path

import torch
from tiny import tiny_federation, write_sites

from client.learning import learn
from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import load_dataset
from mmfm_core.models.model import full_model, seeded

STEPS, RATE, LOCAL = 5, 0.05, "heads.disease."


def stage(proximal: float) -> Stage:
    described = {"name": "train", "local_steps": STEPS, "batch_size": 10_000, "tasks": {"disease": {}}}
    return Stage.model_validate(
        described | {"optimizer": {"type": "sgd", "lr": RATE, "weight_decay": 0.0}, "proximal": proximal}
    )


def test_shared_parameters_are_held_to_what_the_round_began_with_and_local_ones_are_free(tmp_path: Path) -> None:
    document = tiny_federation().model_dump(mode="json")
    document["model"]["fusion"]["modality_dropout"] = 0.0
    model_config = tiny_federation(model=document["model"]).model
    # No note: its encoder draws dropout, of which both would have to draw the same.
    data = load_dataset(write_sites(tmp_path, {"north": ("scan", "labs")})["north"], model_config)
    ours, reference = full_model(model_config, 0), full_model(model_config, 0)
    names = list(dict(ours.named_parameters()))
    shared = [name for name in names if not name.startswith(LOCAL)]

    with seeded(0, "north", 1):
        learn(ours, data, stage(0.7), names, shared, {}, {})

    batch = data.batch(data.rows("train", ["disease"]))  # one batch holds all, so its order is of no account
    parameters = dict(reference.train().named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    for _ in range(STEPS):
        distance = sum(((parameters[name] - start[name]) ** 2).sum() for name in shared)
        objective = reference.losses(batch, ["disease"])["disease"].mean() + 0.7 / 2 * distance
        gradients = torch.autograd.grad(objective, list(parameters.values()), allow_unused=True)
        with torch.no_grad():
            for parameter, gradient in zip(parameters.values(), gradients, strict=True):
                if gradient is not None:
                    parameter.sub_(RATE * gradient)
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter, parameters[name], rtol=1e-4, atol=1e-6)
    moved = max(float((parameters[name] - start[name]).detach().abs().max()) for name in shared)
    assert moved > 1e-3, "otherwise nothing was compared"
