"""SCAFFOLD, FedRep and Ditto against their algorithms, written out with autograd on whole batches."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import tiny_federation, write_sites
from torch import Tensor

from client.learning import PERSONAL, learn
from client.loading import arrays, load
from mmfm_core.config import Federation
from mmfm_core.config.rounds import rounds_of
from mmfm_core.data.dataset import Dataset, load_dataset
from mmfm_core.data.description import describe
from mmfm_core.models.model import MultimodalModel, full_model, seeded
from mmfm_core.models.parameters import CONTROL
from mmfm_core.protocol import RoundReply
from mmfm_core.storage import Tensors
from server.strategy import Strategy

STEPS, RATE, ROUNDS = 3, 0.05, 4
# No note: its encoder draws dropout, of which both would have to draw the same.
SITES = {"north": ("scan", "labs"), "south": ("scan", "labs")}
PATIENTS = {"north": 24, "south": 12}


def federation(stage: Mapping[str, Any], **changes: Any) -> Federation:
    model = tiny_federation().model.model_dump(mode="json")
    model["fusion"]["modality_dropout"] = 0.0
    whole = {"local_steps": STEPS, "batch_size": 10_000, "optimizer": {"type": "sgd", "lr": RATE, "weight_decay": 0.0}}
    described = {"name": "train", "rounds": ROUNDS, "tasks": {"disease": {}}} | whole | dict(stage)
    return tiny_federation(model=model, stages=[described], **changes)


@pytest.fixture
def data(tmp_path: Path) -> dict[str, Dataset]:
    model = federation({}).model
    sites = {n: write_sites(tmp_path / n, {n: held}, PATIENTS[n])[n] for n, held in SITES.items()}
    return {name: load_dataset(site, model) for name, site in sites.items()}


def gradient(model: MultimodalModel, dataset: Dataset, at: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Of the mean loss over all training studies."""
    parameters = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(at[name])
    batch = dataset.batch(dataset.rows("train", ["disease"]))
    loss = model.train().losses(batch, ["disease"])["disease"].mean()
    found = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
    zero = torch.zeros
    return {n: zero(p.shape) if g is None else g for (n, p), g in zip(parameters.items(), found, strict=True)}


def start_of(model: MultimodalModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_scaffold_is_algorithm_1_of_its_paper(data: dict[str, Dataset]) -> None:
    document = federation({}, aggregation={"strategy": "scaffold", "min_sites": 2})
    ours, model = full_model(document.model, 0), full_model(document.model, 0)
    names = list(dict(ours.named_parameters()))
    initial = arrays(ours)
    strategy = Strategy(document, dict(initial))
    sites = {name: describe(name, each.studies, document.model, []) for name, each in data.items()}
    kept: dict[str, Tensors] = {name: {} for name in data}
    sizes = {name: float(site.studies["train"]) for name, site in sites.items()}

    x = start_of(model)
    c = {name: torch.zeros_like(tensor) for name, tensor in x.items()}
    controls = {site: {name: torch.zeros_like(tensor) for name, tensor in x.items()} for site in data}
    for this in rounds_of(document)[:ROUNDS]:
        here = list(data) if this.number != 2 else ["north"]  # one round without the other site
        for name in here:
            wanted = strategy.tensors_for(sites[name], this)
            received = {key: strategy.state_for(this)[key] for key in wanted}
            load(ours, initial | {key: tensor for key, tensor in received.items() if key in initial})
            with seeded(0, name, this.number):
                assert this.stage
                learned = learn(ours, data[name], this.stage, names, names, received, kept[name])
            kept[name] = learned.kept
            blocks = {"encoders.scan", "encoders.labs", "fusion", "heads.disease"}
            sent = {key: learned.after[key] for key in wanted if key in initial} | learned.controls
            weights = dict.fromkeys(blocks, sizes[name])
            strategy.fold(RoundReply(name, this.number, weights, [], 0.0, 1.0, sent), sites[name], this)
        strategy.advance(sites.values())

        moved, changed = {}, {}
        for name in here:
            y = dict(x)
            for _ in range(STEPS):
                g = gradient(model, data[name], y)
                y = {key: y[key] - RATE * (g[key] - controls[name][key] + c[key]) for key in y}
            after = {key: controls[name][key] - c[key] + (x[key] - y[key]) / (STEPS * RATE) for key in y}
            moved[name] = {key: y[key] - x[key] for key in y}
            changed[name] = {key: after[key] - controls[name][key] for key in y}
            controls[name] = after
        present, everyone = sum(sizes[name] for name in here), sum(sizes.values())
        x = {key: x[key] + sum(sizes[n] * moved[n][key] for n in here) / present for key in x}
        c = {key: c[key] + sum(sizes[n] * changed[n][key] for n in here) / everyone for key in c}

    for name, tensor in x.items():
        torch.testing.assert_close(torch.from_numpy(strategy.shared[name]), tensor, rtol=1e-3, atol=1e-5)
    largest = max(float(np.abs(tensor).max()) for name, tensor in strategy.memory.items() if name.startswith(CONTROL))
    assert largest > 1e-3, "otherwise SCAFFOLD is FedAvg, and nothing was compared"


def test_scaffold_needs_plain_gradients() -> None:
    with pytest.raises(ValueError, match="SCAFFOLD corrects gradients; give it sgd"):
        federation({"optimizer": {"type": "adamw"}}, aggregation={"strategy": "scaffold"})


def test_fedrep_trains_what_is_local_first_and_then_only_what_is_shared(data: dict[str, Dataset]) -> None:
    document = federation({"local_steps": 5, "local_first": 2}, parameters={"local": ["heads.*"]})
    ours, model = full_model(document.model, 0), full_model(document.model, 0)
    names = list(dict(ours.named_parameters()))
    shared = [name for name in names if not name.startswith("heads.")]
    with seeded(0, "north", 1):
        after = learn(ours, data["north"], document.stages[0], names, shared, {}, {}).after
    x = start_of(model)
    for step in range(5):
        g = gradient(model, data["north"], x)
        x = {name: x[name] - RATE * g[name] if (name in shared) == (step >= 2) else x[name] for name in x}
    for name, tensor in x.items():
        torch.testing.assert_close(torch.from_numpy(after[name]), tensor, rtol=1e-4, atol=1e-6)


def test_dittos_own_model_is_held_to_the_shared_one_and_does_not_touch_it(data: dict[str, Dataset]) -> None:
    strength = 2.0
    document = federation({"personal": strength})
    ours, model = full_model(document.model, 0), full_model(document.model, 0)
    names = list(dict(ours.named_parameters()))
    received, kept = arrays(ours), {}
    x = start_of(model)
    v = dict(x)
    for number in (1, 2):
        load(ours, received)
        with seeded(0, "north", number):
            learned = learn(ours, data["north"], document.stages[0], names, names, {}, kept)
        kept = learned.kept
        w = dict(x)
        for _ in range(STEPS):  # Li et al. 2021, algorithm 1: the site's part in FedAvg, then its own model
            g = gradient(model, data["north"], w)
            w = {name: w[name] - RATE * g[name] for name in w}
        for _ in range(STEPS):
            g = gradient(model, data["north"], v)
            v = {name: v[name] - RATE * (g[name] + strength * (v[name] - x[name])) for name in v}
        for name in names:
            torch.testing.assert_close(torch.from_numpy(learned.after[name]), w[name], rtol=1e-4, atol=1e-6)
            torch.testing.assert_close(torch.from_numpy(kept[PERSONAL + name]), v[name], rtol=1e-4, atol=1e-6)
        received, x = learned.after, w  # one site alone: its model is the next shared one


@pytest.mark.parametrize(
    ("stages", "said"),
    [
        ([{"local_first": 10}], "leaves no step of local_steps"),
        ([{"local_first": 2}], "nothing is local"),
        ([{"personal": 1.0}, {"name": "adapt", "federated": False}], "take out this stage, or 'personal'"),
        ([{"federated": False, "personal": 1.0}], "makes a model of the site's own already"),
        ([{"interpolate": [0.0, 1.5]}], "less than or equal to 1"),
    ],
)
def test_methods_that_contradict_themselves_are_refused(stages: list[dict[str, Any]], said: str) -> None:
    common = {"name": "train", "tasks": {"disease": {}}}
    with pytest.raises(ValueError, match=said):
        tiny_federation(stages=[common | stage for stage in stages])
