"""What pydantic found wrong with a document, as sentences for the person who wrote it."""

import re
from typing import Any

from pydantic import ValidationError

from mmfm_core.config.strict import did_you_mean

_MUST_BE = {
    "dict_type": "must be a mapping, like {key: value}",
    "model_type": "must be a mapping, like {key: value} or {}",
    "model_attributes_type": "must be a mapping, like {key: value}",
    "tuple_type": "must be a list, like [a, b]",
    "string_type": "must be text; put it in quotes",
    "path_type": "must be text; put it in quotes",
    "string_unicode": "must be text",
    "string_pattern_mismatch": "must start with a letter and hold only letters, digits, '_' and '-'",
    "bool_type": "must be true or false",
    "bool_parsing": "must be true or false",
    "int_type": "must be a whole number",
    "int_from_float": "must be a whole number",
    "int_parsing": "must be a whole number",
    "float_type": "must be a number",
    "float_parsing": "must be a number",
    "missing": "is missing",
}


def sentences(error: ValidationError, data: Any, where: str) -> list[str]:
    """One sentence for each thing that is wrong with `data`, which stands at `where` in its file."""
    problems, said = error.errors(), []
    for problem in problems:
        kind, context, place = problem["type"], problem.get("ctx", {}), problem["loc"]
        if kind == "too_short" and any(place == p["loc"][: len(place)] for p in problems if p is not problem):
            continue  # pydantic counts the entries that are right
        message = _MUST_BE.get(kind, problem["msg"]).removeprefix("Value error, ").replace("Input should", "must", 1)
        if kind == "union_tag_invalid":
            known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            message = f"unknown {context['discriminator']} '{context['tag']}'; {did_you_mean(context['tag'], known)}"
        elif kind == "union_tag_not_found":
            message = f"{context['discriminator']} is missing"
        elif kind == "too_long":
            message = f"must have at most {context['max_length']} of them"
        elif kind == "too_short":
            message = f"must have at least {context['min_length']} of them"
        elif place[-1:] == ("[key]",):
            place, message = place[:-2], f"the key '{problem['input']}': {message}"
        field = ".".join([where] * bool(where) + _written(place, data, kind == "missing"))
        # A rule between several fields says itself which one it means.
        joint = "." if kind == "value_error" and re.match(r"[\w.-]+: ", message) else ": "
        said.append(f"{field}{joint}{message}" if field else message)
    return list(dict.fromkeys(said))


def _written(place: tuple[int | str, ...], data: Any, missing: bool) -> list[str]:
    """The parts of a place that stand in the document: pydantic's own names for what it tried there do not."""
    parts = []
    for part in place:
        if part in (data if isinstance(data, dict) else range(len(data)) if isinstance(data, list) else ()):
            data = data[part]
            parts.append(str(part))
    return [*parts, str(place[-1])] if missing else parts
