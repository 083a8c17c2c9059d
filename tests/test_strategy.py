"""The strategy takes only what it asked for; a bad reply costs only its sender."""

from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_federation

from mmfm_core.config.rounds import rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import RoundReply, SiteDescription
from server.coordinator import initial_state
from server.strategy import Strategy

FEDERATION = tiny_federation()
FIRST, *_, LAST = rounds_of(FEDERATION)


def site(name: str, *modalities: str) -> SiteDescription:
    counts = {"train": 30, "val": 5, "test": 5}
    labels = {split: {"healthy": 20, "ill": 10} for split in counts}
    return SiteDescription(
        name, counts, counts, dict.fromkeys(modalities, counts), {"disease": labels}, {"disease": counts}, []
    )


NORTH, SOUTH = site("north", "scan", "note", "labs"), site("south", "note", "labs")


def fresh() -> Strategy:
    return Strategy(FEDERATION, initial_state(FEDERATION))


def reply_of(strategy: Strategy, who: SiteDescription, value: float, weight: float = 30.0) -> RoundReply:
    tensors = {name: np.full_like(strategy.shared[name], value) for name in strategy.tensors_for(who, FIRST)}
    blocks = {"fusion", "heads.disease", *(f"encoders.{modality}" for modality in who.modalities)}
    return RoundReply(who.site, FIRST.number, dict.fromkeys(blocks, weight), [], 0.5, 1.0, tensors)


def test_a_site_gets_only_the_blocks_it_holds():
    strategy = fresh()
    assert set(strategy.tensors_for(NORTH, FIRST)) == set(strategy.shared)
    sent = strategy.tensors_for(SOUTH, FIRST)
    assert not any(name.startswith("encoders.scan.") for name in sent)
    assert set(strategy.shared) - set(sent) == {n for n in strategy.shared if n.startswith("encoders.scan.")}


def test_a_block_is_averaged_over_its_holders_by_their_studies():
    strategy = fresh()
    strategy.fold(reply_of(strategy, NORTH, 1.0, weight=10.0), NORTH, FIRST)
    strategy.fold(reply_of(strategy, SOUTH, 4.0, weight=30.0), SOUTH, FIRST)
    strategy.advance([NORTH, SOUTH])
    for name, tensor in strategy.shared.items():
        assert np.allclose(tensor, 1.0 if name.startswith("encoders.scan.") else 3.25), name


def test_whole_models_are_averaged_where_the_document_says_so():
    """A site without a block counts as if it had left it as it was."""
    aggregation = FEDERATION.aggregation.model_copy(update={"weight": "studies"})
    strategy = Strategy(FEDERATION.model_copy(update={"aggregation": aggregation}), initial_state(FEDERATION))
    before = {name: tensor.copy() for name, tensor in strategy.shared.items()}
    strategy.fold(reply_of(strategy, NORTH, 1.0, weight=10.0), NORTH, FIRST)
    strategy.fold(reply_of(strategy, SOUTH, 4.0, weight=30.0), SOUTH, FIRST)
    strategy.advance([NORTH, SOUTH])
    for name, tensor in strategy.shared.items():
        expected = (10 + 30 * before[name]) / 40 if name.startswith("encoders.scan.") else 3.25
        np.testing.assert_allclose(tensor, np.broadcast_to(expected, tensor.shape), rtol=1e-5, err_msg=name)


def test_a_void_round_leaves_the_shared_state():
    strategy = fresh()
    before = {name: tensor.copy() for name, tensor in strategy.shared.items()}
    strategy.fold(reply_of(strategy, NORTH, 1.0), NORTH, FIRST)
    strategy.void()
    strategy.advance([NORTH, SOUTH])
    assert all((strategy.shared[name] == tensor).all() for name, tensor in before.items())


def spoiled(reply: RoundReply, name: str, tensor: np.ndarray | None) -> RoundReply:
    tensors = dict(reply.tensors)
    if tensor is None:
        del tensors[name]
    else:
        tensors[name] = tensor
    return replace(reply, tensors=tensors)


def heavier(reply: RoundReply, block: str, weight: float) -> RoundReply:
    return replace(reply, weights=reply.weights | {block: weight})


BIAS = "heads.disease.linear.bias"
BAD = {
    "not a number": lambda r: spoiled(r, BIAS, np.array([np.nan, 0], np.float32)),
    "infinite": lambda r: spoiled(r, BIAS, np.array([np.inf, 0], np.float32)),
    "wrong shape": lambda r: spoiled(r, BIAS, np.zeros(3, np.float32)),
    "wrong type": lambda r: spoiled(r, BIAS, np.zeros(2, np.float64)),
    "missing": lambda r: spoiled(r, BIAS, None),
    "extra": lambda r: spoiled(r, "heads.disease.secret", np.zeros(1, np.float32)),
    "a block that the site does not hold": lambda r: spoiled(r, "encoders.scan.position.weight", np.zeros((4, 12))),
    "another round": lambda r: replace(r, round=2),
    "negative weight": lambda r: heavier(r, "fusion", -1.0),
    "more weight than it has studies": lambda r: heavier(r, "fusion", 1e9),
    "weight not a number": lambda r: heavier(r, "fusion", float("nan")),
    "weight of a foreign block": lambda r: heavier(r, "encoders.scan", 3.0),
    "no weights": lambda r: replace(r, weights={}),
}


@pytest.mark.parametrize("spoil", BAD.values(), ids=BAD.keys())
def test_a_bad_reply_is_refused_and_leaves_the_mean_as_it_was(spoil):
    strategy, clean = fresh(), fresh()
    strategy.fold(reply_of(strategy, NORTH, 1.0), NORTH, FIRST)
    with pytest.raises(MmfmError):
        strategy.fold(spoil(reply_of(strategy, SOUTH, 100.0)), SOUTH, FIRST)
    strategy.advance([NORTH, SOUTH])
    clean.fold(reply_of(clean, NORTH, 1.0), NORTH, FIRST)
    clean.advance([NORTH, SOUTH])
    assert all((strategy.shared[name] == tensor).all() for name, tensor in clean.shared.items())


def test_nothing_may_come_back_from_adaptation():
    adapt = rounds_of(FEDERATION)[-1]
    strategy = fresh()
    with pytest.raises(MmfmError, match="not asked for"):
        strategy.fold(replace(reply_of(strategy, NORTH, 1.0), round=adapt.number), NORTH, adapt)
    strategy.fold(RoundReply("north", adapt.number, {}, [], 0.5, 1.0), NORTH, adapt)


def test_a_site_without_a_training_label_is_not_asked_to_train():
    unlabelled = replace(NORTH, targets={}, tasks={})
    assert not fresh().takes_part(unlabelled, FIRST)
    assert fresh().takes_part(NORTH, FIRST)


def test_the_running_mean_of_rounds_is_pandas_and_stands_at_the_end():
    aggregation = FEDERATION.aggregation.model_copy(update={"ema": 0.8})
    strategy = Strategy(FEDERATION.model_copy(update={"aggregation": aggregation}), initial_state(FEDERATION))
    values = [1.0, 4.0, 2.0, 8.0]
    for value in values:
        strategy.fold(reply_of(strategy, NORTH, value), NORTH, FIRST)
        strategy.advance([NORTH, SOUTH])
        assert np.allclose(strategy.shared["fusion.gate.weight"], value), "rounds go on from the last state"
    reference = pd.Series(values).ewm(alpha=0.2, adjust=True).mean().iloc[-1]
    for _ in range(2):  # each site's adaptation, and the last look
        strategy.conclude()
        strategy.fold(RoundReply("north", LAST.number, {}, [], None, 1.0), NORTH, LAST)
        strategy.advance([NORTH, SOUTH])
    for name, tensor in strategy.shared.items():
        assert tensor.dtype == np.float32
        assert np.allclose(tensor, reference), name
