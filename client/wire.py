"""Messages between relay and agent as a stream of bytes: a head in JSON, then every tensor's numbers. Nothing is run.

A stream is cut into chunks, so that each side holds one copy of a model, however large, and no library's limit on the
size of a message applies. The layout: 8 bytes with the head's length, the head, the tensors in the head's order.
"""

import json
import math
from collections.abc import Iterable, Iterator
from typing import Annotated

import numpy as np
from pydantic import ConfigDict, Field, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mmfm_core.errors import MmfmError
from mmfm_core.protocol import Expected, Message, RoundReply, RoundRequest, parsed, text_of
from mmfm_core.storage import Tensors

CHUNK = 1 << 20
LARGEST_HEAD = 32 << 20
LARGEST_MESSAGE = 4 << 30  # bytes of tensors; a site's limits.memory says less

FIELDS = ("kind", "text", "tensors")
PLAIN = "biuf"  # kinds of numpy types that are numbers: no objects, texts or records


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Declared:
    """A tensor that follows: its name, numpy type and shape."""

    name: Annotated[str, Field(max_length=1000)]
    dtype: Annotated[str, Field(max_length=8)]
    shape: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(max_length=16)]


@dataclass(frozen=True, config=ConfigDict(extra="forbid"))
class Head:
    """What stands before the tensors: the message's kind, all of it but its tensors, and what these will be."""

    kind: str
    text: str
    tensors: Annotated[list[Declared], Field(max_length=100_000)]


def chunks(message: Message) -> Iterator[bytes]:
    """A message as chunks of at most `CHUNK` bytes."""
    tensors = message.tensors if isinstance(message, RoundRequest | RoundReply) else {}
    declared = [Declared(name, tensor.dtype.str, tensor.shape) for name, tensor in tensors.items()]
    head = TypeAdapter(Head).dump_json(Head(type(message).__name__, text_of(message), declared))
    yield from _cut(len(head).to_bytes(8, "big") + head)
    for tensor in tensors.values():
        yield from _cut(_bytes_of(np.ascontiguousarray(tensor)))


def received(stream: Iterable[bytes], *expected: type[Expected], largest: int = LARGEST_MESSAGE) -> Expected:
    """The message that a stream of chunks holds, which must be of one of the `expected` kinds.

    Raises:
        MmfmError: it is none, or its tensors are larger than `largest` bytes; the text holds nothing of its content.
    """
    source = _Source(stream)
    size = int.from_bytes(source.take(8), "big")
    if size > LARGEST_HEAD:
        raise MmfmError(f"the message's head is larger than {LARGEST_HEAD >> 20} MB; nothing in it was used")
    try:
        head = TypeAdapter(Head).validate_python(json.loads(source.take(size)))
        types = [np.dtype(declared.dtype) for declared in head.tensors]
    except ValidationError as error:
        where = next((str(part) for part in error.errors()[0]["loc"] if part in FIELDS), "its top")
        raise MmfmError(f"the message's head is malformed at '{where}'; nothing in it was used") from error
    except (ValueError, TypeError, SyntaxError, RecursionError) as error:
        raise MmfmError(f"the message's head is damaged ({type(error).__name__}); nothing in it was used") from error
    if any(dtype.kind not in PLAIN for dtype in types):
        raise MmfmError("the message declares a tensor that is not of numbers; nothing in it was used")
    if len({declared.name for declared in head.tensors}) < len(head.tensors):
        raise MmfmError("the message declares a tensor twice; nothing in it was used")
    sizes = [dtype.itemsize * math.prod(d.shape) for dtype, d in zip(types, head.tensors, strict=True)]
    if sum(sizes) > largest:
        raise MmfmError(f"the message's tensors are larger than the {largest:,} bytes allowed; nothing in it was used")
    tensors: Tensors = {}
    for declared, dtype in zip(head.tensors, types, strict=True):
        try:
            tensors[declared.name] = np.empty(declared.shape, dtype)
        except (ValueError, MemoryError) as error:
            raise MmfmError("the message declares a tensor that is too large; nothing in it was used") from error
        source.fill(_bytes_of(tensors[declared.name]))
    source.end()
    return parsed(head.kind, head.text, tensors, *expected)


def _bytes_of(array: np.ndarray) -> memoryview:
    return memoryview(array.reshape(-1).view(np.uint8))


def _cut(data: bytes | memoryview) -> Iterator[bytes]:
    for start in range(0, len(data), CHUNK):
        yield bytes(data[start : start + CHUNK])


class _Source:
    """A stream of chunks, read by so many bytes."""

    def __init__(self, stream: Iterable[bytes]) -> None:
        self._stream, self._rest = iter(stream), memoryview(b"")

    def take(self, size: int) -> bytes:
        taken = bytearray()
        while len(taken) < size:
            taken += self._some(size - len(taken))
        return bytes(taken)

    def fill(self, buffer: memoryview) -> None:
        done = 0
        while done < len(buffer):
            some = self._some(len(buffer) - done)
            buffer[done : done + len(some)] = some
            done += len(some)

    def end(self) -> None:
        if self._rest or any(self._stream):
            raise MmfmError("the message holds more bytes than it declares; nothing in it was used")

    def _some(self, most: int) -> memoryview:
        while not self._rest:
            try:
                self._rest = memoryview(next(self._stream))
            except StopIteration:
                raise MmfmError("the message ends before all that it declares; nothing in it was used") from None
        some, self._rest = self._rest[:most], self._rest[most:]
        return some
