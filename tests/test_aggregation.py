"""Block-wise averaging, against a plain numpy mean."""

import tracemalloc

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmfm_core.models.parameters import block_of
from server.aggregation import BlockwiseMean

NAMES = ("encoders.scan.weight", "encoders.scan.count", "encoders.note.weight", "fusion.weight", "heads.y.bias")
KINDS = {"encoders.scan.count": np.int64, "heads.y.bias": np.float16}
SHAPES = dict.fromkeys(NAMES, (2, 3)) | {"encoders.scan.count": (), "heads.y.bias": (4,)}


def tensors_of(names):
    def values(name):
        kind = KINDS.get(name, np.float32)
        bounds = {"min_value": -1000, "max_value": 1000}
        width = {} if kind is np.int64 else {"width": 8 * np.dtype(kind).itemsize}
        element = st.integers(**bounds) if kind is np.int64 else st.floats(**bounds, **width)
        return arrays.arrays(kind, SHAPES[name], elements=element)

    return st.fixed_dictionaries({name: values(name) for name in names})


@st.composite
def replies(draw):
    """Any number of sites, each with some of the blocks and a weight for each block that it sends."""
    found = []
    for _ in range(draw(st.integers(0, 6))):
        blocks = draw(st.sets(st.sampled_from(sorted({block_of(name) for name in NAMES}))))
        tensors = draw(tensors_of([name for name in NAMES if block_of(name) in blocks]))
        found.append((tensors, {block: float(draw(st.integers(0, 500))) for block in blocks}))
    return found


@given(tensors_of(NAMES), replies(), st.randoms())
def test_every_block_is_the_weighted_mean_over_the_sites_that_sent_it_in_any_order(shared, sent, random):
    expected = {}
    for name, before in shared.items():
        holders = [(t[name], w[block_of(name)]) for t, w in sent if name in t and w[block_of(name)] > 0]
        if holders:
            values = np.stack([np.asarray(tensor, np.float64) for tensor, _ in holders])
            expected[name] = np.average(values, axis=0, weights=[weight for _, weight in holders])
        else:
            expected[name] = before
    random.shuffle(sent)
    mean, result = BlockwiseMean(), dict(shared)
    for tensors, weights in sent:
        mean.fold(tensors, weights)
    mean.apply_to(result)
    assert result.keys() == shared.keys()
    for name, tensor in result.items():
        assert tensor.dtype == shared[name].dtype
        assert tensor.shape == shared[name].shape
        if tensor.dtype.kind == "i":
            assert np.abs(tensor - expected[name]).max() <= 0.5 + 1e-9  # rounded, not cut off
        else:
            tolerance = 2 * np.finfo(tensor.dtype).eps
            np.testing.assert_allclose(tensor, expected[name], rtol=tolerance, atol=1000 * tolerance)


def test_folding_leaves_the_replies_and_the_shared_state_alone_until_the_round_ends():
    shared = {"fusion.weight": np.ones(3, np.float32)}
    reply = {"fusion.weight": np.full(3, 5, np.float32)}
    mean = BlockwiseMean()
    mean.fold(reply, {"fusion": 2.0})
    assert (shared["fusion.weight"] == 1).all()
    assert (reply["fusion.weight"] == 5).all()
    mean.apply_to(shared)
    assert (shared["fusion.weight"] == 5).all()
    mean.apply_to(shared)  # nothing is left of the round
    assert (shared["fusion.weight"] == 5).all()


def test_memory_is_that_of_one_model_for_any_number_of_sites():
    def peak(sites: int) -> int:
        mean = BlockwiseMean()
        tracemalloc.start()
        for site in range(sites):
            mean.fold({"fusion.weight": np.full(1_000_000, site, np.float32)}, {"fusion": 1.0})
        _, highest = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        return highest

    assert peak(40) < 1.05 * peak(4)
