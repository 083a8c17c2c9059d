"""What travels in fewer bits: how much is lost, that it is made up for, and how many bytes there are."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from pydantic import ValidationError
from test_agent import Coordination, agents, ask
from tiny import private_federation, tiny_federation, write_sites

from mmfm_core.compression import BLOCK, LOST, SCALE, bytes_of, closed, narrowed, opened
from mmfm_core.config import Federation, Site
from mmfm_core.config.federation import UpdateFormat
from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Refusal, RoundReply
from mmfm_core.storage import Tensors

FORMS: tuple[UpdateFormat, ...] = ("fp16", "int8")
UPDATES = arrays(np.float32, array_shapes(max_dims=3, max_side=20), elements=st.floats(-100, 100, width=32))


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Site]:
    return write_sites(tmp_path_factory.mktemp("hospitals"))


def with_wire(federation: Federation, **wire: str) -> Federation:
    document = federation.model_dump(mode="json")
    document["aggregation"]["wire"] = wire
    return Federation.model_validate(document)


@settings(deadline=None)
@given(UPDATES)
def test_int8_is_within_half_a_step_of_each_block(update: np.ndarray) -> None:
    before = {"w": np.zeros_like(update)}
    sent, lost = closed(before, {"w": update}, {}, "int8")
    read = opened(sent, before, "int8")["w"]
    flat, got = update.ravel(), read.ravel()
    for start in range(0, flat.size, BLOCK):
        block = slice(start, start + BLOCK)
        step = np.float64(sent[SCALE + "w"][start // BLOCK])
        assert (
            step
            <= np.abs(flat[block]).max().astype(np.float64) / 127 * 1.0001 + np.finfo(np.float32).smallest_subnormal
        )
        assert np.abs(got[block].astype(np.float64) - flat[block]).max() <= step * 0.5001
    np.testing.assert_allclose(read + lost[LOST + "w"], update, atol=1e-5)


@settings(deadline=None)
@given(st.lists(arrays(np.float32, (5, 3), elements=st.floats(-1, 1, width=32)), min_size=1, max_size=12))
@pytest.mark.parametrize("form", FORMS)
def test_over_many_rounds_no_more_is_lost_than_in_one(form: UpdateFormat, updates: list[np.ndarray]) -> None:
    """What arrives in all, and what is still kept, are what was learned in all: the sums telescope."""
    zero = {"w": np.zeros((5, 3), np.float32)}
    kept: Tensors = {}
    arrived = np.zeros((5, 3))
    for update in updates:
        sent, kept = closed(zero, {"w": update}, kept, form)
        arrived += opened(sent, zero, form)["w"]
    np.testing.assert_allclose(arrived + kept[LOST + "w"], np.sum(updates, axis=0, dtype=np.float64), atol=1e-5)


@pytest.mark.parametrize("form", FORMS)
def test_what_is_no_update_of_the_state_is_refused(form: UpdateFormat) -> None:
    base = {"w": np.zeros((3, 4), np.float32), "steps": np.array(3)}
    sent, _ = closed(base, {"w": np.ones((3, 4), np.float32), "steps": np.array(5)}, {}, form)
    np.testing.assert_allclose(opened(sent, base, form)["w"], 1, rtol=1e-3)
    assert opened(sent, base, form)["steps"] == 5, "whole numbers travel as they are"
    for broken, told in (
        ({n: t for n, t in sent.items() if n != "w"}, "'w' is missing"),
        (sent | {"v": sent["w"]}, "'v' is not asked for"),
        (sent | {"w": sent["w"].ravel()}, r"'w' is \w+\[12\], expected"),
        (sent | {"w": sent["w"].astype(np.float64)}, "'w' is float64"),
    ):
        with pytest.raises(MmfmError, match=told):
            opened(broken, base, form)


def test_a_scale_that_is_not_finite_is_told_as_a_value_that_is_not() -> None:
    base = {"w": np.zeros(4, np.float32)}
    sent, _ = closed(base, {"w": np.ones(4, np.float32)}, {}, "int8")
    sent[SCALE + "w"][0] = np.nan
    assert not np.isfinite(opened(sent, base, "int8")["w"]).all()  # which the strategy's own check refuses


def test_a_state_beyond_half_precision_is_named() -> None:
    with pytest.raises(MmfmError, match=r"aggregation\.wire\.state: 'w' has values beyond half precision"):
        narrowed({"w": np.array([1e5], np.float32)})


@pytest.mark.parametrize(("form", "share"), [("fp16", 0.5), ("int8", 0.26)])
def test_a_round_travels_in_fewer_bytes_and_ends_nearly_where_it_would(
    tmp_path: Path, sites: dict[str, Site], form: UpdateFormat, share: float
) -> None:
    full = Coordination(tiny_federation(), agents(tmp_path / "full", tiny_federation(), sites))
    federation = with_wire(tiny_federation(), update=form)
    less = Coordination(federation, agents(tmp_path / "less", federation, sites))
    before = {name: tensor.copy() for name, tensor in full.strategy.shared.items()}
    exact, rounded = full.round(1), less.round(1)
    for name in exact:
        tensors, fewer = exact[name][0].tensors, rounded[name][0].tensors
        sent = sum(tensor.nbytes for tensor in fewer.values())
        large = sum(tensor.nbytes for tensor in tensors.values() if tensor.size >= BLOCK)
        small = sum(tensor.nbytes for tensor in tensors.values()) - large
        assert sent <= share * large + small
        assert sent == bytes_of(tensors, form)
    for name, tensor in full.strategy.shared.items():
        moved = np.abs(tensor - before[name]).max()
        assert np.abs(less.strategy.shared[name] - tensor).max() <= moved / 100 + 1e-7, name


def test_the_state_in_half_precision_does_not_round_what_the_coordinator_keeps(
    tmp_path: Path, sites: dict[str, Site]
) -> None:
    """Sites that learn nothing leave it bit for bit as it was, though they were sent it rounded."""
    document = with_wire(tiny_federation(), state="fp16", update="fp16").model_dump(mode="json")
    document["stages"][0]["optimizer"] |= {"lr": 1e-30, "weight_decay": 0}
    federation = Federation.model_validate(document)
    together = Coordination(federation, agents(tmp_path, federation, sites))
    before = {name: tensor.copy() for name, tensor in together.strategy.shared.items()}
    for name, agent in together.agents.items():
        request = together.request(name, 1)
        refused, _ = ask(agent, request)
        assert isinstance(refused, Refusal), "the document says half precision"
        reply, _ = ask(agent, replace(request, tensors=narrowed(request.tensors)))
        assert isinstance(reply, RoundReply), reply
        together.strategy.fold(reply, together.sites[name], together.rounds[0])
    together.strategy.advance(together.sites.values())
    assert any(not np.array_equal(t, t.astype(np.float16)) for t in before.values()), "rounding would not show"
    for name, tensor in before.items():
        np.testing.assert_array_equal(together.strategy.shared[name], tensor)


def test_what_rounding_took_stays_at_the_site_and_comes_with_the_next_update(
    tmp_path: Path, sites: dict[str, Site]
) -> None:
    federation = with_wire(private_federation(), update="int8")
    together = Coordination(federation, agents(tmp_path, federation, sites))
    for reply, _ in together.round(1).values():
        assert not any(name.startswith(LOST) for name in reply.tensors)
    for agent in together.agents.values():
        kept = agent.participate(together.document).state.before(2)
        assert any(name.startswith(LOST) and tensor.any() for name, tensor in kept.items())


def test_scaffold_is_refused_by_name() -> None:
    document = tiny_federation().model_dump(mode="json")
    document["aggregation"] |= {"strategy": {"type": "scaffold"}, "wire": {"update": "int8"}}
    with pytest.raises(ValidationError, match="control variates travel in full precision; leave it out"):
        Federation.model_validate(document)
