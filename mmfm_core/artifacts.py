"""Files that come with a document: named in it by their hash, found by it at every site, never downloaded."""

import hashlib
import os
import shutil
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from pydantic import BaseModel

from mmfm_core.config.model import Artifact, Model
from mmfm_core.errors import MmfmError


def sha256_of(path: Path) -> str:
    """The hash of a file, or of a folder: then of its files' names and hashes, in order."""
    if path.is_dir():
        files = sorted(p.relative_to(path).as_posix() for p in path.rglob("*") if p.is_file())
        return hashlib.sha256("".join(f"{sha256_of(path / file)}  {file}\n" for file in files).encode()).hexdigest()
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def artifacts_of(model: Model) -> list[Artifact]:
    """Every artifact that a document names."""
    return list(_inside(model))


def _inside(value: object) -> Iterator[Artifact]:
    if isinstance(value, Artifact):
        yield value
    elif isinstance(value, BaseModel):
        for name in type(value).model_fields:
            yield from _inside(getattr(value, name))
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _inside(inner)


def find(artifacts: Path, artifact: Artifact) -> Path:
    """The site's own copy of an artifact, `artifacts/<sha256>`, after checking that it is the very one.

    Raises:
        MmfmError: there is none, or it is another one.
    """
    path = artifacts / artifact.sha256
    if not path.exists():
        raise MmfmError(
            f"the federation needs '{artifact.path}' (sha256 {artifact.sha256}); put it at artifacts/{artifact.sha256} "
            "in the site's directory"
        )
    if _checked(path, _stamp(path)) != artifact.sha256:
        raise MmfmError(
            f"artifacts/{artifact.sha256} is not the '{artifact.path}' that the federation pins: its sha256 is another "
            "one; get it again from whoever proposed the federation"
        )
    return path


def collect(model: Model, folder: Path, destination: Path) -> None:
    """Bring a document's artifacts from their places beside it (`folder`) to `destination/<sha256>`.

    Raises:
        MmfmError: one does not exist, or is not the one that the document pins.
    """
    for artifact in artifacts_of(model):
        source, target = folder / artifact.path, destination / artifact.sha256
        if target.exists():
            continue
        if not source.exists():
            raise MmfmError(f"{source}: does not exist, and the document names it; its comments say how to get it")
        found = sha256_of(source)
        if found != artifact.sha256:
            raise MmfmError(
                f"{source}: its sha256 is {found}, and the document pins {artifact.sha256}; use the file "
                "that was meant, or correct the document if it is this one"
            )
        destination.mkdir(parents=True, exist_ok=True)
        partial = destination / f".partial-{os.getpid()}"
        if source.is_dir():
            shutil.copytree(source, partial, copy_function=_linked_or_copied)
        else:
            _linked_or_copied(source, partial)
        partial.replace(target)


def _linked_or_copied(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # another file system
        shutil.copyfile(source, target)


@lru_cache
def _checked(path: Path, stamp: tuple[tuple[int, int], ...]) -> str:
    return sha256_of(path)


def _stamp(path: Path) -> tuple[tuple[int, int], ...]:
    # A large checkpoint is hashed once, and again only after it was touched.
    files = sorted(path.rglob("*")) if path.is_dir() else [path]
    return tuple((file.stat().st_mtime_ns, file.stat().st_size) for file in files)
