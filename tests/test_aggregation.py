"""Block-wise averaging, against a plain numpy mean."""

import tracemalloc
from fractions import Fraction

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmfm_core.models.parameters import block_of
from server.aggregation import CHUNK, BlockwiseMean

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


@given(
    st.lists(
        st.tuples(st.integers(1, 500), st.lists(st.floats(-1e6, 1e6, width=32), min_size=4, max_size=4)), min_size=1
    )
)
def test_a_mean_is_the_exact_one_but_for_its_last_rounding(sent):
    """Against rational numbers: half a unit in the last place of float32, and what float64 sums may lose at most."""
    mean, shared = BlockwiseMean(), {"fusion.weight": np.zeros(4, np.float32)}
    for weight, values in sent:
        mean.fold({"fusion.weight": np.array(values, np.float32)}, {"fusion": float(weight)})
    mean.apply_to(shared)
    total = sum(weight for weight, _ in sent)
    for column, got in enumerate(shared["fusion.weight"]):
        exact = sum(weight * Fraction(values[column]) for weight, values in sent) / total
        largest = sum(weight * abs(Fraction(values[column])) for weight, values in sent) / total
        allowed = max(abs(exact), Fraction(2) ** -126) / 2**24 + largest * (len(sent) + 2) / 2**53
        assert abs(Fraction(float(got)) - exact) <= allowed


def test_a_tensor_of_any_length_and_layout_is_averaged_to_its_end():
    """Shorter and longer than the pieces that it is worked on in, as wide as them, and transposed."""
    rng = np.random.default_rng(0)
    for shape in ((1,), (CHUNK,), (CHUNK + 1,), (3, CHUNK), (2 * CHUNK - 1,), (0,), ()):
        replies = [np.asarray(rng.normal(size=shape[::-1]).T.astype(np.float32)) for _ in range(3)]
        mean, shared = BlockwiseMean(), {"fusion.weight": np.zeros(shape, np.float32)}
        for weight, reply in enumerate(replies, start=1):
            mean.fold({"fusion.weight": reply}, {"fusion": float(weight)})
        mean.apply_to(shared)
        expected = np.average(np.stack(replies).astype(np.float64), axis=0, weights=[1, 2, 3])
        np.testing.assert_array_equal(shared["fusion.weight"], expected.astype(np.float32))
