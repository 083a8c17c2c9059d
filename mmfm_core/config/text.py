"""YAML as people mean it: strict about keys, sparing with types, with variables of the environment."""

import os
import re
from pathlib import Path
from typing import Any

import yaml

from mmfm_core.errors import MmfmError

_TAG = "tag:yaml.org,2002:"
_VARIABLE = re.compile(r"\$\{(\w+)(?::-([^}]*))?\}")


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error (PyYAML silently keeps the last one), and little is not text.

    In a hospital's file `no` is an answer or a country, 010 a code, 12:30 and 2001-02-03 are cells: only what follows
    this class is read as anything but text. Each pattern is part of YAML 1.1's, so that `dump` quotes what it matches.
    """

    yaml_implicit_resolvers = {}

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: dict[Any, int] = {}
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise yaml.MarkedYAMLError(problem="a key must be a word", problem_mark=key_node.start_mark)
            if key_node.tag == _TAG + "merge":
                continue
            key = self.construct_object(key_node, deep=True)
            if key in seen:
                message = f"'{key}' is written twice (first in line {seen[key]}); keep one"
                raise yaml.MarkedYAMLError(problem=message, problem_mark=key_node.start_mark)
            seen[key] = key_node.start_mark.line + 1
        return super().construct_mapping(node, deep)


for _kind, _pattern, _first in (
    ("null", "~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", "true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", "[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"([-+]?[0-9]+\.[0-9]*|\.[0-9]+)([eE][-+][0-9]+)?", list("-+.0123456789")),
    ("merge", "<<", ["<"]),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(f"^({_pattern})$"), _first)


class _Dumper(yaml.SafeDumper):
    """YAML in which every text comes back as it was: PyYAML writes an exotic line break as one, and reads a blank."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """A text, in double quotes where it has line breaks, which are escaped there."""
        return self.represent_scalar(_TAG + "str", data, style=None if data.splitlines() in ([], [data]) else '"')


_Dumper.add_representer(str, _Dumper.represent_str)


def to_yaml(data: dict[str, Any]) -> str:
    """Data as YAML that `read_yaml` reads back."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


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
    text = _VARIABLE.sub(lambda match: _variable(path, match), text)
    try:
        loader = _Loader(text)
        loader.deep_construct = True  # a document that holds itself by an alias is an error, not an endless one
        data = loader.get_single_data()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f", line {mark.line + 1}, column {mark.column + 1}" if mark else ""
        problem = error.problem or error.context or "is not YAML"
        if "\\t" in problem:
            problem = "there is a tab; YAML indents with spaces"
        elif problem.startswith("but "):
            problem = f"{error.context}, {problem}"
        raise MmfmError(f"{path}{place}: {problem}") from error
    except yaml.YAMLError as error:
        raise MmfmError(f"{path}: is not YAML ({str(error).splitlines()[0]})") from error
    except Exception as error:  # `!!int x`, [[[[...: what PyYAML's own conversions raise comes through as it is
        raise MmfmError(f"{path}: holds something that YAML cannot hold ({type(error).__name__})") from error
    if not isinstance(data, dict):
        raise MmfmError(f"{path}: must be a mapping of keys, like 'name: my-federation'")
    return data


def _variable(path: Path, match: re.Match[str]) -> str:
    name, default = match.groups()
    value = os.environ.get(name, default)
    if value is None:
        raise MmfmError(f"{path}: the environment variable {name} is not set, and ${{{name}}} gives no default")
    return value
