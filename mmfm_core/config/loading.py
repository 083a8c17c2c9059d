"""From YAML files to documents, with errors that name the file, the field and the remedy."""

import hashlib
import os
import re
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from mmfm_core.config.federation import Federation
from mmfm_core.config.site import Site
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError

Document = TypeVar("Document", bound=BaseModel)

_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error (PyYAML silently keeps the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                message = f"'{key}' is written twice (first in line {seen[key]}); keep one"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


def load_federation(path: Path) -> Federation:
    """Read a federation's document.

    Raises:
        MmfmError: the file is missing, is not YAML, or breaks a rule of the document.
    """
    return _validate(Federation, read_yaml(path), path)


def load_site(path: Path) -> Site:
    """Read one site's file; relative paths in it are relative to the file."""
    return _validate(Site, read_yaml(path), path, context={"folder": path.parent})


def load_sites(path: Path) -> dict[str, Site]:
    """Read a simulation's sites: `defaults` that each entry of `sites` amends (null takes a key away)."""
    document = read_yaml(path)
    unknown = [key for key in document if key not in ("defaults", "sites")]
    if unknown:
        raise MmfmError(f"{path}: unknown key '{unknown[0]}'; {did_you_mean(str(unknown[0]), ['defaults', 'sites'])}")
    entries, defaults = document.get("sites"), document.get("defaults") or {}
    if not isinstance(entries, dict) or not entries:
        raise MmfmError(
            f"{path}: sites: must hold at least one site, for example 'sites: {{north: {{manifest: ...}}}}'"
        )
    if not isinstance(defaults, dict):
        raise MmfmError(f"{path}: defaults: must be a mapping of keys of a site")
    sites = {}
    for name, entry in entries.items():
        where = f"sites.{name}"
        if entry is not None and not isinstance(entry, dict):
            raise MmfmError(f"{path}: {where}: must be a mapping of keys of a site ({{}} for the defaults alone)")
        merged = _merge(defaults, entry or {}) | {"name": name}
        sites[str(name)] = _validate(Site, merged, path, where=where, context={"folder": path.parent})
    return sites


def dump(document: BaseModel) -> str:
    """The document as YAML with every default written out; the text whose hash a site approves."""
    return yaml.safe_dump(document.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


def sha256(document: BaseModel) -> str:
    """The hash of `dump(document)`: what a site approves and what every message carries."""
    return hashlib.sha256(dump(document).encode()).hexdigest()


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML mapping; `${NAME:-default}` in it stands for an environment variable.

    Raises:
        MmfmError: the file is missing, unreadable, not YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text"
        raise MmfmError(f"{path}: cannot be read ({reason})") from error
    try:
        data = yaml.load(_VARIABLE.sub(lambda match: _variable(path, match), text), Loader=_Loader)  # noqa: S506 (safe)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "is not YAML"
        if "\\t" in problem:
            problem = "there is a tab; YAML indents with spaces"
        raise MmfmError(f"{path}{place}: {problem}") from error
    except yaml.YAMLError as error:
        raise MmfmError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from error
    if not isinstance(data, dict):
        raise MmfmError(f"{path}: must be a mapping of keys, like 'name: my-federation'")
    return data


def _variable(path: Path, match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise MmfmError(f"{path}: the environment variable {name} is not set, and ${{{name}}} gives no default")
    return value


def _merge(base: dict[str, Any], amendment: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in amendment.items():
        if value is None:
            merged.pop(key, None)
        elif isinstance(value, dict) and isinstance(merged.get(key), dict):
            merged[key] = _merge(merged[key], value)
        else:
            merged[key] = value
    return merged


def _validate(
    model: type[Document], data: dict[str, Any], path: Path, where: str = "", context: dict[str, Any] | None = None
) -> Document:
    try:
        return model.model_validate(data, context=context)
    except ValidationError as error:
        raise MmfmError("\n".join(f"{path}: {line}" for line in _sentences(error, where))) from error


def _sentences(error: ValidationError, where: str) -> list[str]:
    sentences = []
    for problem in error.errors():
        context = problem.get("ctx", {})
        message = problem["msg"].removeprefix("Value error, ")
        if problem["type"] == "union_tag_invalid":
            known = [tag.strip(" '") for tag in context["expected_tags"].split(",")]
            message = f"unknown {context['discriminator']} '{context['tag']}'; {did_you_mean(context['tag'], known)}"
        elif problem["type"] == "missing":
            message = "is missing"
        elif problem["type"] in ("string_pattern_mismatch",):
            message = "must start with a letter and hold only letters, digits, '_' and '-'"
        field = ".".join([where] * bool(where) + [str(part) for part in problem["loc"]])
        sentences.append(f"{field}: {message[0].lower() + message[1:]}" if field else message)
    return list(dict.fromkeys(sentences))
