"""The strategy takes only what it asked for; a bad reply costs only its sender."""

from collections import Counter
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest
from tiny import tiny_federation

from mmfm_core.config.privacy import Privacy
from mmfm_core.config.rounds import Round, rounds_of
from mmfm_core.errors import MmfmError
from mmfm_core.models.parameters import matches
from mmfm_core.protocol import RoundReply, SiteDescription
from mmfm_core.storage import Tensors
from server.coordinator import initial_state
from server.shrinking import shrunk
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


SHRUNK = "encoders.*.weight"


def shrinking(ema: float, memory: Tensors | None = None, shared: Tensors | None = None) -> Strategy:
    privacy = Privacy(epsilon=8, delta=1e-5, rate=1, shrink=(SHRUNK,))
    aggregation = FEDERATION.aggregation.model_copy(update={"ema": ema})
    federation = FEDERATION.model_copy(update={"privacy": privacy, "aggregation": aggregation})
    return Strategy(federation, initial_state(FEDERATION) if shared is None else shared, memory)


@pytest.mark.parametrize("ema", [0.0, 0.5])
def test_what_matrices_learned_is_shrunk_once_at_the_end_and_nothing_else_is(ema):
    strategy, start, rng = shrinking(ema), initial_state(FEDERATION), np.random.default_rng(0)
    values = [{name: rng.normal(size=t.shape).astype(t.dtype) for name, t in start.items()} for _ in range(3)]
    for value in values:
        reply = reply_of(strategy, NORTH, 0.0)
        strategy.fold(replace(reply, tensors={name: value[name] for name in reply.tensors}), NORTH, FIRST)
        strategy.advance([NORTH, SOUTH])
        strategy = shrinking(ema, dict(strategy.memory), dict(strategy.shared))  # as a resumed run begins
    weights = np.array([0.25, 0.5, 1]) if ema else np.array([0, 0, 1])
    for _ in range(2):  # each site's adaptation, and the last look
        strategy.conclude()
        strategy.advance([NORTH, SOUTH])
    names = {name for name, tensor in start.items() if matches(name, [SHRUNK]) and tensor.ndim == 2}
    assert 0 < len(names) < len(start)
    for name, tensor in strategy.shared.items():
        ended = np.average([value[name] for value in values], axis=0, weights=weights)
        expected = start[name] + shrunk(ended - start[name]) if name in names else ended
        np.testing.assert_allclose(tensor, expected, rtol=1e-4, atol=1e-5, err_msg=name)


def test_shrinking_takes_more_noise_than_signal_from_what_outputs_learned_alike():
    """Ten outputs of 200 inputs that learned two things between them; Efron and Morris gain whatever the truth is."""
    rng = np.random.default_rng(0)
    alike = rng.normal(size=(10, 2)) @ rng.normal(size=(2, 200)) * 0.5
    for truth in (alike, rng.normal(size=(10, 200)), np.zeros((10, 200))):
        noisy = [truth + rng.normal(size=truth.shape) for _ in range(20)]
        before, after = (np.mean([((m - truth) ** 2).sum() for m in each]) for each in (noisy, map(shrunk, noisy)))
        assert after < before
        if truth is alike:
            assert after < 0.6 * before


@pytest.mark.parametrize("shape", [(1, 5), (2, 5), (5, 1)])
def test_what_has_too_few_outputs_to_tell_noise_by_stays_as_it_is(shape):
    """The least singular value of one row is the row itself: all that was learned would go."""
    change = np.random.default_rng(0).normal(size=shape)
    assert np.array_equal(shrunk(change), change)


def test_shrinking_keeps_directions_and_never_turns_one_around():
    change = np.diag([3.0, 2.0, 1.0])
    np.testing.assert_allclose(shrunk(change), np.diag([3 - 1 / 3, 2 - 1 / 2, 0]), atol=1e-12)
    assert not shrunk(np.zeros((3, 4))).any()


def drawing(sites_per_round: int | None, seed: int = 0) -> Strategy:
    aggregation = FEDERATION.aggregation.model_copy(update={"sites_per_round": sites_per_round})
    federation = FEDERATION.model_copy(update={"aggregation": aggregation, "seed": seed})
    return Strategy(federation, initial_state(FEDERATION))


MANY = {node: site(f"hospital-{node}", "labs") for node in range(20)}


def in_round(number: int) -> Round:
    return replace(FIRST, number=number)


def test_every_site_is_drawn_about_equally_often_and_no_round_has_more_than_asked():
    """400 rounds, 5 of 20: each site in 100 on average; within 5 standard deviations of a hypergeometric draw."""
    strategy = drawing(5)
    rounds = [strategy.drawn(MANY, in_round(number)) for number in range(1, 401)]
    assert {len(chosen) for chosen in rounds} == {5}
    counts = Counter(node for chosen in rounds for node in chosen)
    assert all(abs(counts[node] - 100) < 5 * (400 * 0.25 * 0.75) ** 0.5 for node in MANY)
    assert len({tuple(chosen) for chosen in rounds}) > 350  # not the same few sites again and again


def test_a_draw_is_repeated_by_a_resumed_run_and_changed_by_seed_round_and_attempt():
    first = drawing(5).drawn(MANY, in_round(3))
    renumbered = {100 - node: site for node, site in MANY.items()}  # Flower gives a node a new number
    again = drawing(5).drawn(dict(reversed(renumbered.items())), in_round(3))
    assert {site.site for site in again.values()} == {site.site for site in first.values()}
    others = [
        drawing(5).drawn(MANY, in_round(4)),
        drawing(5).drawn(MANY, in_round(3), attempt=2),
        drawing(5, seed=1).drawn(MANY, in_round(3)),
    ]
    assert all(set(other) != set(first) for other in others)


def test_a_site_that_is_absent_moves_nobody_but_its_substitute():
    first = drawing(5).drawn(MANY, FIRST)
    gone = next(iter(first))
    now = drawing(5).drawn({node: site for node, site in MANY.items() if node != gone}, FIRST)
    assert set(first) - {gone} < set(now)
    assert len(now) == 5


def test_what_sites_do_for_themselves_is_not_left_to_chance():
    assert drawing(5).drawn(MANY, LAST) == MANY
    assert drawing(None).drawn(MANY, FIRST) == MANY
    assert drawing(50).drawn(MANY, FIRST) == MANY
