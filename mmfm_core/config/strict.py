"""The base of every document: unknown keys are errors that propose the key that was meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, StringConstraints, model_validator
from pydantic_core import PydanticCustomError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A short proposal: the close match among `known`, or else the list of them."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"


class Strict(BaseModel):
    """Immutable, and closed: a key that the document does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    context = {"key": str(key), "hint": did_you_mean(str(key), cls.model_fields)}
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", context)
        return data


def plain(cell: str) -> str:
    """A cell without the '.0' that an export adds to whole numbers once their column has a gap."""
    whole = cell.removesuffix(".0")
    return whole if whole.removeprefix("-").isdecimal() else cell


def _cell(value: Any) -> Any:
    # YAML reads `1: x` as a number, and true without its spelling; cells of a manifest are compared as text.
    if isinstance(value, bool):
        raise PydanticCustomError("yaml_boolean", "true and false must be in quotes here")
    return plain(str(value)) if isinstance(value, int | float | str) else value


def _can_be_told_apart(words: tuple[str, ...]) -> tuple[str, ...]:
    for word in words:
        if words.count(word) > 1:
            raise ValueError(f"'{word}' is named twice")
        if word in MISSING_CELLS:
            raise ValueError(f"'{word}' in a manifest means that the value is missing; choose another word")
    return words


Cell = Annotated[str, BeforeValidator(_cell)]
"""A value as it stands in a manifest, always text."""

MISSING_CELLS = ("", "NA", "N/A", "n/a", "NaN", "nan", "None", "null", "NULL", "?")

Choices = Annotated[tuple[Cell, ...], Field(min_length=2), AfterValidator(_can_be_told_apart)]
"""The values that a column may have, after a site renamed its own to them."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
"""A name used in state-dict names, folders and reports: no dots, slashes or spaces."""
