"""Messages: what goes in comes out, and damaged or hostile records are a sentence, never an action."""

import io
import json
import math
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, MetricRecord, RecordDict
from flwr.supercore.inflatable.inflatable_object import InflatableObject
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import (
    ARRAY,
    MESSAGES,
    Describe,
    Message,
    Metric,
    Note,
    Refusal,
    RoundReply,
    RoundRequest,
    SiteDescription,
    Unpacked,
    from_records,
    to_records,
)
from mmfm_core.storage import packed

texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
counts = st.dictionaries(texts, st.integers(0, 2**40), max_size=3)
numbers = st.floats(allow_nan=False, allow_infinity=False)
kinds = st.sampled_from([np.float16, np.float32, np.float64, np.int8, np.int64, np.uint8, np.bool_, ">f4"])
tensors = st.dictionaries(
    texts, arrays.arrays(kinds, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)), max_size=3
)
metrics = st.builds(
    Metric, texts, texts, texts, texts, st.none() | numbers, st.integers(), st.none() | numbers, st.none() | numbers
)
messages = st.one_of(
    st.builds(Describe, texts),
    st.builds(
        SiteDescription,
        texts,
        counts,
        counts,
        st.dictionaries(texts, counts, max_size=2),
        st.dictionaries(texts, st.dictionaries(texts, counts, max_size=2), max_size=2),
        st.dictionaries(texts, counts, max_size=2),
        st.lists(st.builds(Note, st.integers(0, 2**40), st.integers(0, 2**40), texts), max_size=2),
        st.integers(1, 2**40),
    ),
    st.builds(RoundRequest, texts, st.integers(), tensors),
    st.builds(
        RoundReply,
        texts,
        st.integers(),
        st.dictionaries(texts, numbers, max_size=2),
        st.lists(metrics, max_size=2),
        st.none() | numbers,
        numbers,
        tensors,
    ),
    st.builds(Refusal, texts, texts),
)


def over_the_wire(records: RecordDict) -> RecordDict:
    """Records as they arrive: rebuilt from the bytes of all their parts."""

    def rebuild(part: InflatableObject) -> InflatableObject:
        children = part.children or {}
        return type(part).inflate(part.deflate(), {name: rebuild(child) for name, child in children.items()})

    arrived = rebuild(records)
    assert isinstance(arrived, RecordDict)
    return arrived


def without_tensors(message: Message) -> dict[str, Any]:
    return {name: value for name, value in vars(message).items() if name != "tensors"}


def assert_same(found: Message, sent: Message) -> None:
    assert type(found) is type(sent)
    assert without_tensors(found) == without_tensors(sent)
    here, there = getattr(found, "tensors", {}), getattr(sent, "tensors", {})
    assert here.keys() == there.keys()
    for name, tensor in there.items():
        assert (here[name].dtype, here[name].shape) == (tensor.dtype.newbyteorder("="), tensor.shape)
        np.testing.assert_array_equal(here[name], tensor)


@given(message=messages)
@settings(deadline=None)
def test_a_message_arrives_as_it_was_sent(message: Message) -> None:
    assert_same(from_records(over_the_wire(to_records(message)), type(message)), message)


def test_a_tensor_that_lies_in_memory_in_another_order_arrives_as_it_was_sent() -> None:
    request = RoundRequest("document", 3, {"fusion.w": np.arange(6.0).reshape(2, 3).T})
    assert_same(from_records(over_the_wire(to_records(request)), RoundRequest), request)


@given(message=messages)
@settings(deadline=None)
def test_a_message_within_a_process_arrives_as_it_was_sent_and_cannot_be_written_to(message: Message) -> None:
    """Sites of a simulation are handed one request, and the coordinator folds what a site holds."""
    arrived = from_records(Unpacked(message), type(message))
    assert arrived is message
    for tensor in getattr(arrived, "tensors", {}).values():
        with pytest.raises(ValueError, match="read-only"):
            tensor[...] = 0


@given(sent=messages, expected=st.sampled_from(sorted(MESSAGES)))
@settings(deadline=None)
def test_a_message_within_a_process_that_is_not_expected_is_not_taken(sent: Message, expected: str) -> None:
    if not isinstance(sent, MESSAGES[expected]):
        with pytest.raises(MmfmError, match="expected"):
            from_records(Unpacked(sent), MESSAGES[expected])


def objects_of(part: InflatableObject) -> int:
    return 1 + sum(objects_of(child) for child in (part.children or {}).values())


def test_many_tensors_are_no_more_parts_than_few() -> None:
    """Flower asks for every part with a request of its own at every hop, so many tensors must not be many parts."""
    few, many = ({f"w{n}": np.full(3, n, np.float32) for n in range(count)} for count in (1, 100))
    assert objects_of(to_records(RoundRequest("d", 1, many))) == objects_of(to_records(RoundRequest("d", 1, few)))


@given(sent=messages, expected=st.sampled_from(sorted(MESSAGES)))
@settings(deadline=None)
def test_only_what_is_expected_is_taken(sent: Message, expected: str) -> None:
    kind, records = MESSAGES[expected], to_records(sent)
    if type(sent) is kind:
        assert_same(from_records(records, kind), sent)
    else:
        with pytest.raises(MmfmError, match=f"expected {expected}, and another kind of message came"):
            from_records(records, kind)


def reply_records(text: str | None = None, array: Array | None = None) -> RecordDict:
    """The records of a whole reply, in which the JSON text or the tensors' array may be replaced."""
    records = to_records(RoundReply("north", 1, {"fusion": 2.0}, [], 0.5, 1.0))
    if text is not None:
        records["message"] = ConfigRecord({"type": "RoundReply", "json": text})
    if array is not None:
        records["tensors"] = ArrayRecord({ARRAY: array})
    return records


def said_of(records: RecordDict) -> str:
    with pytest.raises(MmfmError) as error:
        from_records(records, RoundReply)
    assert len(str(error.value)) < 300
    return str(error.value)


WHOLE = json.loads(str(reply_records()["message"]["json"]))
METRIC = {"task": "disease", "model": "shared", "split": "val", "metric": "f1", "value": 0.5, "n": 1}


@pytest.mark.parametrize(
    "spoil",
    [
        lambda whole: whole | {"extra": 1},
        lambda whole: {name: value for name, value in whole.items() if name != "round"},
        lambda whole: whole | {"round": "first"},
        lambda whole: whole | {"round": 1.5},
        lambda whole: whole | {"round": None},
        lambda whole: whole | {"weights": {"fusion": "many"}},
        lambda whole: whole | {"weights": [1]},
        lambda whole: whole | {"metrics": [{"task": "disease"}]},
        lambda whole: whole | {"metrics": [METRIC | {"more": 1}]},
        lambda whole: whole | {"tensors": {"fusion.w": [1.0]}},
        lambda whole: [whole],
        lambda whole: None,
    ],
    ids=range(12),
)
def test_a_malformed_text_is_named_by_its_field(spoil: Callable[[dict[str, Any]], Any]) -> None:
    assert said_of(reply_records(json.dumps(spoil(WHOLE)))).startswith("the message RoundReply is malformed: ")


def test_what_stands_in_a_malformed_text_is_not_repeated() -> None:
    said = said_of(reply_records(json.dumps(WHOLE | {"round": "CANARY", "loss": "CANARY", "weights": {"a": "CANARY"}})))
    assert "CANARY" not in said


@pytest.mark.parametrize("figure", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_figure_that_is_none_is_refused_or_visibly_not_finite(figure: str) -> None:
    text = json.dumps(WHOLE).replace('"loss": 0.5', f'"loss": {figure}')
    assert figure in text
    try:
        reply = from_records(reply_records(text), RoundReply)
    except MmfmError:
        return
    assert reply.loss is not None
    assert not math.isfinite(reply.loss), "the coordinator's own check must see it"


@given(
    text=st.text(max_size=60) | st.recursive(st.none() | st.integers() | texts, st.lists, max_leaves=4).map(json.dumps)
)
@settings(deadline=None)
def test_any_text_is_a_message_or_a_sentence(text: str) -> None:
    for kind in MESSAGES.values():
        records = reply_records()
        records["message"] = ConfigRecord({"type": kind.__name__, "json": text})
        with pytest.raises(MmfmError):
            from_records(records, kind)


def test_a_text_nested_without_end_is_a_sentence() -> None:
    said_of(reply_records("[" * 200_000))
    said_of(reply_records('{"metrics":' * 50_000))
    said_of(reply_records('{"round": ' + "9" * 100_000 + "}"))


@pytest.mark.parametrize(
    "records",
    [
        RecordDict(),
        RecordDict({"message": ConfigRecord()}),
        RecordDict({"message": ConfigRecord({"type": "RoundReply"})}),
        RecordDict({"message": ConfigRecord({"type": ["RoundReply"], "json": [1]})}),
        RecordDict({"message": ConfigRecord({"type": "Exception", "json": "{}"})}),
        RecordDict({"message": MetricRecord({"type": 1, "json": 2})}),
        RecordDict({"message": ArrayRecord({"type": Array(np.ones(1)), "json": Array(np.ones(1))})}),
        RecordDict({"message": reply_records()["message"], "tensors": ConfigRecord({"fusion.w": 1})}),
        RecordDict({"message": reply_records()["message"], "tensors": MetricRecord({"fusion.w": 1})}),
    ],
    ids=range(9),
)
def test_records_of_another_shape_are_a_sentence(records: RecordDict) -> None:
    said_of(records)


class Trap:
    """What runs when it is unpickled."""

    def __init__(self, sprung: Path) -> None:
        self.sprung = sprung

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.sprung,)


def bytes_of(array: np.ndarray) -> bytes:
    file = io.BytesIO()
    np.save(file, array, allow_pickle=True)
    return file.getvalue()


def test_a_pickled_object_is_never_opened(tmp_path: Path) -> None:
    sprung = tmp_path / "sprung"
    trap = np.empty(1, object)
    trap[0] = Trap(sprung)
    zipped = io.BytesIO()
    np.savez(zipped, trap=trap)
    for data in (bytes_of(trap), pickle.dumps(Trap(sprung)), pickle.dumps(trap), zipped.getvalue()):
        for kind in (ARRAY, "numpy.ndarray", "torch.tensor", "pickle"):
            said = said_of(reply_records(array=Array("float32", (1,), kind, data)))
            assert said.startswith("the message is damaged (")
    assert not sprung.exists()
    pickle.loads(pickle.dumps(Trap(sprung)))  # noqa: S301 (the trap does work)
    assert sprung.exists()


def file(shape: str = "[9]", kind: str = "F32", offsets: str = "[0, 36]", size: int = 36, more: str = "") -> bytes:
    """A safetensors file of one tensor, as its head says it."""
    head = f'{{"fusion.w": {{"dtype": "{kind}", "shape": {shape}, "data_offsets": {offsets}}}{more}}}'.encode()
    return struct.pack("<Q", len(head)) + head + bytes(size)


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"{}",
        file(size=31),
        file(size=40),
        file(shape="[1000000000000000]", offsets="[0, 4000000000000000]"),
        file(shape="[1000000000000000]"),
        file(shape="[4294967296, 4294967296, 4294967296]"),
        file(shape="[-9]"),
        file(offsets="[36, 0]"),
        file(kind="O"),
        file(kind="BF16", offsets="[0, 18]", size=18),
        file(more=', "fusion.v": {"dtype": "F32", "shape": [9], "data_offsets": [0, 36]}'),
        struct.pack("<Q", 1 << 40) + b"{}",
        b"\x93NUMPY\x01\x00",
        b"PK\x03\x04",
    ],
    ids=range(15),
)
def test_a_damaged_array_is_a_sentence(data: bytes) -> None:
    said = said_of(reply_records(array=Array("uint8", (len(data),), ARRAY, data)))
    assert said.startswith("the message is damaged (")


def test_tensors_under_another_name_are_a_sentence() -> None:
    records = reply_records()
    records["tensors"] = ArrayRecord({"fusion.w": Array(np.ones(3))})
    assert said_of(records).startswith("the message is damaged (")


@given(noise=st.binary(max_size=60), start=st.integers(0, 200))
@settings(deadline=None)
def test_noise_in_an_array_is_a_sentence_or_an_array(noise: bytes, start: int) -> None:
    data = bytearray(packed({"w": np.arange(12, dtype=np.float32)}))
    data[start : start + len(noise)] = noise
    try:
        reply = from_records(reply_records(array=Array("uint8", (len(data),), ARRAY, bytes(data))), RoundReply)
    except MmfmError:
        return
    for tensor in reply.tensors.values():
        assert isinstance(tensor, np.ndarray)
        assert tensor.dtype != object
