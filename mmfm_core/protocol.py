"""What coordinator and site say to each other, and the only place that turns it into Flower records.

Two questions, three answers. Tensors travel as the content of one safetensors file (nothing pickled), the rest as one
JSON text that is validated on arrival; nothing here needs torch, so that a relay stays small.
"""

from collections.abc import Callable, Iterable
from dataclasses import field, replace
from typing import Any, TypeVar

from flwr.app import Array, ArrayRecord, ConfigRecord, RecordDict
from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from mmfm_core.errors import MmfmError
from mmfm_core.storage import Tensors, packed, unpacked

ARRAY = "safetensors"
"""The name and the type of the one array that holds all tensors: each array costs Flower two requests a hop."""

STRICT = ConfigDict(arbitrary_types_allowed=True, extra="forbid")


@dataclass(frozen=True, config=STRICT)
class Describe:
    """Which site are you, and what do you hold of what this federation (a document's sha256) asks for?"""

    federation: str


@dataclass(frozen=True, config=STRICT)
class Note:
    """A repair made while reading: `count` of `of` (texts, targets) were changed, and how."""

    count: int
    of: int
    text: str

    def __str__(self) -> str:
        return f"{self.count} of {self.of} {self.text}"


@dataclass(frozen=True, config=STRICT)
class SiteDescription:
    """What a site holds. All counts are of studies, by split ('train', 'val', 'test'), told as the site's policy says.

    Attributes:
        patients: distinct patients by split.
        modalities: modality -> split -> studies that have it.
        targets: head -> split -> label -> how many.
        tasks: head or objective -> split -> studies that can serve it.
        min_count: all counts are rounded up to multiples of it.
    """

    site: str
    studies: dict[str, int]
    patients: dict[str, int]
    modalities: dict[str, dict[str, int]]
    targets: dict[str, dict[str, dict[str, int]]]
    tasks: dict[str, dict[str, int]]
    notes: list[Note]
    min_count: int = 1


@dataclass(frozen=True, config=STRICT)
class RoundRequest:
    """Take part in one round of an approved federation, from these shared tensors."""

    federation: str
    round: int
    tensors: Tensors = field(default_factory=dict)


@dataclass(frozen=True, config=STRICT)
class Metric:
    """One figure of one site.

    Attributes:
        model: 'shared' for the state as received, 'adapted' after training that is sent nowhere.
        value: None where it is undefined (too few patients of a class) or not told (too few studies).
        low, high: 95 % interval by bootstrap over patients, where it was computed.
        n: studies behind the figure, told as the site's policy says.
        modalities: the only ones used, joined by '+'; all that the site has where empty.
        noised: whether it has the noise that the document's privacy asks of it, and its interval covers that too.
    """

    task: str
    model: str
    split: str
    metric: str
    value: float | None
    n: int
    low: float | None = None
    high: float | None = None
    modalities: str = ""
    noised: bool = False


@dataclass(frozen=True, config=STRICT)
class RoundReply:
    """A site's answer: trained shared tensors, the studies behind each block, and its figures.

    Attributes:
        weights: block of the model -> training studies that had its modality (or target), told as `Metric.n`.
        loss: mean training loss; None where nothing was trained, or where it is withheld.
        epsilon: what the document's rounds have cost each patient of the site so far; None where they are not private.
    """

    site: str
    round: int
    weights: dict[str, float]
    metrics: list[Metric]
    loss: float | None
    seconds: float
    tensors: Tensors = field(default_factory=dict)
    epsilon: float | None = None


@dataclass(frozen=True, config=STRICT)
class Refusal:
    """The site will not answer, and why. The reason holds nothing read from a patient's record."""

    site: str
    reason: str


MESSAGES = {kind.__name__: kind for kind in (Describe, SiteDescription, RoundRequest, RoundReply, Refusal)}
ADAPTERS: dict[str, TypeAdapter[Any]] = {name: TypeAdapter(kind) for name, kind in MESSAGES.items()}
Message = Describe | SiteDescription | RoundRequest | RoundReply | Refusal
Pack = Callable[[Message], RecordDict]
Expected = TypeVar("Expected", bound=Message)


def text_of(message: Message) -> str:
    """All of a message but its tensors, as JSON."""
    return ADAPTERS[type(message).__name__].dump_json(message, exclude={"tensors"}).decode()


def to_records(message: Message) -> RecordDict:
    """Pack a message into Flower records."""
    records = RecordDict({"message": ConfigRecord({"type": type(message).__name__, "json": text_of(message)})})
    if isinstance(message, RoundRequest | RoundReply):
        data = packed(message.tensors)
        records["tensors"] = ArrayRecord({ARRAY: Array("uint8", (len(data),), ARRAY, data)})
    return records


class Unpacked(RecordDict):
    """A message to somebody in the same process, who takes it as it is. No records that came over a network are this.

    Its tensors are the sender's own memory, and so nobody's to write to, as what is unpacked cannot be written to.
    """

    def __init__(self, message: Message) -> None:
        super().__init__()
        for tensor in message.tensors.values() if isinstance(message, RoundRequest | RoundReply) else ():
            tensor.flags.writeable = False
        self.message = message


def from_records(records: RecordDict, *expected: type[Expected]) -> Expected:
    """Unpack a message, which must be of one of the `expected` kinds.

    Raises:
        MmfmError: the records are no such message; the text names the field, not its content.
    """
    if isinstance(records, Unpacked):
        if isinstance(records.message, expected):
            return records.message
        raise _unexpected(expected)
    try:
        name, text = str(records["message"]["type"]), str(records["message"]["json"])
        tensors = unpacked(records["tensors"][ARRAY].data) if "tensors" in records else {}
    except Exception as error:  # whatever a damaged or hostile record makes Flower or safetensors raise
        raise MmfmError(f"the message is damaged ({type(error).__name__}); nothing in it was used") from error
    return parsed(name, text, tensors, *expected)


def parsed(name: str, text: str, tensors: Tensors, *expected: type[Expected]) -> Expected:
    """The message of a kind's name, its JSON text and its tensors, which must be of one of the `expected` kinds.

    Raises:
        MmfmError: it is no such message; the text names the field, not its content.
    """
    kind = MESSAGES.get(name)
    if kind not in expected:
        raise _unexpected(expected)
    try:
        message: Expected = ADAPTERS[name].validate_json(text)
        return replace(message, tensors=tensors) if isinstance(message, RoundRequest | RoundReply) else message
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise MmfmError(f"the message {name} is malformed: {where}: {first['msg']}") from error


def _unexpected(expected: Iterable[type]) -> MmfmError:
    return MmfmError(f"expected {' or '.join(kind.__name__ for kind in expected)}, and another kind of message came")
