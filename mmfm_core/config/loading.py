"""From YAML files to documents, with errors that name the file, the field and the remedy."""

import hashlib
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

from mmfm_core.config.federation import Federation
from mmfm_core.config.sentences import sentences
from mmfm_core.config.site import Site
from mmfm_core.config.strict import did_you_mean
from mmfm_core.config.text import read_yaml, to_yaml
from mmfm_core.errors import MmfmError

Document = TypeVar("Document", bound=BaseModel)


def load_federation(path: Path) -> Federation:
    """Read a federation's document.

    Raises:
        MmfmError: the file is missing, is not YAML, or breaks a rule of the document.
    """
    return _validate(Federation, read_yaml(path), path)


def load_site(path: Path) -> Site:
    """Read one site's file; relative paths in it are relative to the file."""
    return _validate(Site, read_yaml(path), path, context={"folder": path.parent})


def load_document(kind: type[Document], path: Path) -> Document:
    """Read a document of any other kind."""
    return _validate(kind, read_yaml(path), path)


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
    for field in ("device", "precision"):  # they share one model
        if len({getattr(site, field) for site in sites.values()}) > 1:
            raise MmfmError(
                f"{path}: the sites of a simulation compute with one {field}; write '{field}' once, under 'defaults'"
            )
    return sites


def dump(document: BaseModel) -> str:
    """The document as YAML with every default written out; the text whose hash a site approves."""
    return to_yaml(document.model_dump(mode="json"))


def sha256(document: BaseModel) -> str:
    """The hash of `dump(document)`: what a site approves and what every message carries."""
    return hashlib.sha256(dump(document).encode()).hexdigest()


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
        raise MmfmError("\n".join(f"{path}: {line}" for line in sentences(error, data, where))) from error
