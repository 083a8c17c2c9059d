"""Pinned files: found by hash, checked at every site, named in one sentence where they are missing or another one."""

import hashlib
import os
from pathlib import Path

import pytest
from tiny import tiny_federation
from typer.testing import CliRunner

from mmfm_core.artifacts import artifacts_of, collect, find, sha256_of
from mmfm_core.command import build
from mmfm_core.config.model import Artifact, Model
from mmfm_core.errors import MmfmError

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghijklmnopqrstuvwxyz", "lung", "##s"]


def with_vocabulary(folder: Path) -> Model:
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    pinned = {"path": "vocab.txt", "sha256": hashlib.sha256((folder / "vocab.txt").read_bytes()).hexdigest()}
    document = tiny_federation().model.model_dump(mode="json")
    return Model.model_validate(document | {"tokenizer": {"type": "wordpiece", "vocabulary": pinned}})


def test_a_file_is_pinned_by_the_hash_that_sha256sum_gives(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"some weights")
    assert sha256_of(tmp_path / "a") == hashlib.sha256(b"some weights").hexdigest()


def test_a_folder_is_pinned_with_the_names_and_contents_of_its_files(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    (folder / "deep").mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "deep" / "weights").write_text("1")
    before = sha256_of(folder)
    (folder / "deep" / "weights").write_text("2")
    changed = sha256_of(folder)
    (folder / "deep" / "weights").rename(folder / "deep" / "weight")
    assert len({before, changed, sha256_of(folder)}) == 3


def test_what_a_document_names_is_brought_to_the_sites_by_its_hash(tmp_path: Path) -> None:
    model = with_vocabulary(tmp_path)
    (artifact,) = artifacts_of(model)
    collect(model, tmp_path, tmp_path / "site" / "artifacts")
    found = find(tmp_path / "site" / "artifacts", artifact)
    assert found.name == artifact.sha256
    assert found.read_text().splitlines() == PIECES
    collect(model, tmp_path / "elsewhere", tmp_path / "site" / "artifacts")  # what is there is not looked for again


def test_another_file_than_the_pinned_one_is_refused_where_it_is_brought_and_where_it_is_used(tmp_path: Path) -> None:
    model = with_vocabulary(tmp_path)
    (artifact,) = artifacts_of(model)
    folder = tmp_path / "artifacts"
    collect(model, tmp_path, folder)
    path = find(folder, artifact)
    path.unlink()  # it may be the very file that it was brought from
    path.write_text("other pieces")
    os.utime(path, (1, 1))
    with pytest.raises(MmfmError, match=r"is not the 'vocab\.txt' that the federation pins"):
        find(folder, artifact)
    (tmp_path / "vocab.txt").write_text("other pieces")
    with pytest.raises(MmfmError, match=rf"vocab\.txt: its sha256 is \w+, and the document pins {artifact.sha256}"):
        collect(model, tmp_path, tmp_path / "anew")
    assert not list((tmp_path / "anew").glob("*"))


def test_a_missing_file_is_named_with_its_place(tmp_path: Path) -> None:
    artifact = Artifact(path="trunk.safetensors", sha256="0" * 64)
    with pytest.raises(MmfmError, match=r"needs 'trunk\.safetensors' \(sha256 0+\); put it at artifacts/0+ in"):
        find(tmp_path, artifact)


def test_the_commands_make_a_vocabulary_and_say_its_hash(tmp_path: Path) -> None:
    table = tmp_path / "notes.csv"
    table.write_text("report,split\n" + "the lungs are clear,train\n" * 6 + "secret words here,test\n" * 6)
    made = CliRunner().invoke(
        build(), ["vocabulary", str(table), "--where", "split=train", "--out", str(tmp_path / "v.txt")]
    )
    assert made.exit_code == 0, made.output
    assert {"lungs", "clear"} < set((tmp_path / "v.txt").read_text().split())
    assert "secret" not in (tmp_path / "v.txt").read_text()
    told = CliRunner().invoke(build(), ["sha256", str(tmp_path / "v.txt")])
    assert told.output.strip() == hashlib.sha256((tmp_path / "v.txt").read_bytes()).hexdigest()
    assert told.output.strip() in made.output
