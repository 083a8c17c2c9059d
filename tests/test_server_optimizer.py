"""The coordinator's optimisers, step by step against Flower's own."""

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAdam as FlowerAdam
from flwr.serverapp.strategy import FedYogi as FlowerYogi
from flwr.supercore.task_identity import TaskIdentity
from tiny import prepare_run, tiny_federation, write_sites

from mmfm_core.config.federation import Aggregation, FedAdam, FedYogi
from mmfm_core.storage import Tensors
from server.aggregation import BlockwiseMean
from server.engines.in_process import simulate
from server.optimizer import ServerOptimizer
from server.record import Run

NAME, TAU, BETAS, RATE = "fusion.weight", 0.02, (0.8, 0.95), 0.05
WEIGHTS = (30.0, 10.0, 60.0)


def sent(generator: np.random.Generator, around: np.ndarray) -> list[np.ndarray]:
    return [around + generator.normal(0, 0.1, around.shape) for _ in WEIGHTS]


def by_flower(strategy: FlowerAdam, number: int, before: np.ndarray, tensors: list[np.ndarray]) -> np.ndarray:
    strategy.current_arrays = {NAME: before}
    TaskIdentity.task_id, TaskIdentity.run_id, TaskIdentity.node_id = 1, 1, 1
    replies = [
        Message(
            RecordDict(
                {"arrays": ArrayRecord({NAME: Array(tensor)}), "metrics": MetricRecord({"num-examples": weight})}
            ),
            dst_node_id=0,
            message_type="train",
        )
        for tensor, weight in zip(tensors, WEIGHTS, strict=True)
    ]
    arrays, _ = strategy.aggregate_train(number, replies)
    assert arrays is not None
    return arrays[NAME].numpy()


@pytest.mark.parametrize(("ours", "theirs"), [(FedAdam, FlowerAdam), (FedYogi, FlowerYogi)])
def test_six_rounds_are_flowers(ours: type[FedAdam], theirs: type[FlowerAdam]) -> None:
    generator = np.random.default_rng(0)
    flower = theirs(eta=RATE, beta_1=BETAS[0], beta_2=BETAS[1], tau=TAU)
    reference = generator.normal(size=(4, 3))
    shared: Tensors = {NAME: reference.copy()}
    moments: Tensors = {f"second/{NAME}": np.zeros((4, 3))}  # where Flower starts; the paper starts from tau squared
    for number in range(1, 7):
        # Flower's Adam, unlike its Yogi and the paper, corrects the bias of its moments: the same as another rate.
        corrected = math.sqrt(1 - BETAS[1] ** (number + 1)) / (1 - BETAS[0] ** (number + 1)) if ours is FedAdam else 1
        config = {"lr": RATE * corrected, "beta1": BETAS[0], "beta2": BETAS[1], "tau": TAU}
        optimizer = ServerOptimizer(ours.model_validate(config | {"type": ours.__name__.lower()}), moments)
        tensors = sent(generator, reference)
        reference = by_flower(flower, number, reference, tensors)
        mean = BlockwiseMean()
        for tensor, weight in zip(tensors, WEIGHTS, strict=True):
            mean.fold({NAME: tensor}, {"fusion": weight})
        mean.apply_to(shared, optimizer.step)
        moments = optimizer.moments
        np.testing.assert_allclose(shared[NAME], reference, rtol=1e-10, atol=1e-12)


def test_what_no_site_sent_keeps_its_value_and_its_moments() -> None:
    optimizer = ServerOptimizer(FedAdam(type="fedadam"), {})
    shared: Tensors = {"fusion.weight": np.zeros(2), "heads.y.bias": np.zeros(2)}
    mean = BlockwiseMean()
    mean.fold(dict.fromkeys(shared, np.ones(2)), {"fusion": 1.0, "heads.y": 1.0})
    mean.apply_to(shared, optimizer.step)
    kept, known = shared["heads.y.bias"].copy(), optimizer.moments["second/heads.y.bias"].copy()
    mean.fold({"fusion.weight": np.ones(2)}, {"fusion": 1.0})
    mean.apply_to(shared, optimizer.step)
    np.testing.assert_array_equal(shared["heads.y.bias"], kept)
    np.testing.assert_array_equal(optimizer.moments["second/heads.y.bias"], known)


def test_a_strategys_name_alone_stands_for_its_defaults() -> None:
    assert Aggregation.model_validate({"strategy": "fedadam"}).strategy == FedAdam(type="fedadam")


@pytest.mark.slow
def test_a_run_goes_on_with_the_moments_it_had(tmp_path: Path) -> None:
    federation = tiny_federation(aggregation=Aggregation(strategy={"type": "fedadam", "lr": 0.01}, min_sites=2))
    run = prepare_run(tmp_path / "run", federation, write_sites(tmp_path / "data"))
    simulate(run)
    whole = Run(run).checkpoint()
    assert whole is not None
    last, before = (run / "checkpoints" / f"round-{whole[0] - back:05d}" for back in (0, 1))
    assert (before / "memory.safetensors").is_file()
    shutil.rmtree(last)
    Run(run).update(status="prepared")
    simulate(run)
    again = Run(run).checkpoint()
    assert again is not None
    assert again[0] == whole[0]
    for name, tensor in whole[1].items():
        np.testing.assert_array_equal(again[1][name], tensor)
