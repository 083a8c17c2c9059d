"""The base of every document: unknown keys are errors that propose the key that was meant."""

from collections.abc import Iterable
from difflib import get_close_matches
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, StringConstraints, model_validator
from pydantic_core import PydanticCustomError


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """A short proposal: the close match among `known`, or else the list of them."""
    known = sorted(known)
    close = get_close_matches(word, known, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(known) or 'none'}"


class Strict(BaseModel):
    """Immutable, and closed: a key that the document does not know is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _no_unknown_key(cls, data: Any) -> Any:
        if isinstance(data, dict):
            for key in data:
                if key not in cls.model_fields:
                    hint = did_you_mean(str(key), cls.model_fields)
                    raise PydanticCustomError("unknown_key", "unknown key '{key}'; {hint}", {"key": key, "hint": hint})
        return data


def _cell(value: Any) -> Any:
    # YAML reads `no: x` as false and `1: x` as a number; cells of a manifest are compared as text.
    if isinstance(value, bool):
        raise PydanticCustomError("yaml_boolean", "YAML reads this as true/false; put it in quotes")
    return str(value) if isinstance(value, int | float) else value


Cell = Annotated[str, BeforeValidator(_cell)]
"""A value as it stands in a manifest, always text."""

Name = Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_-]*$")]
"""A name used in state-dict names, folders and reports: no dots, slashes or spaces."""
