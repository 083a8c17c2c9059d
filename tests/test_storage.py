"""Storage: whatever goes wrong while writing, what stood there before still stands, and nothing else does."""

import errno
import json
import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from mmfm_core.errors import MmfmError
from mmfm_core.storage import Tensors, read_tensors, whole_folder, write_json, write_tensors, write_text

Write = Callable[[Path], None]

LARGE = np.ones(100_000, np.float32)
WRITES: dict[str, Write] = {
    "text": lambda path: write_text(path, "x" * 400_000),
    "json": lambda path: write_json(path, ["x" * 400_000]),
    "tensors": lambda path: write_tensors(path, {"w": LARGE}),
}


@contextmanager
def full_disk() -> Iterator[None]:
    """Inside, no file grows beyond 100 kB: the system itself refuses, in the middle of a write."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@contextmanager
def failing(name: str) -> Iterator[None]:
    """Inside, a call of the system fails as a full disk makes it fail."""

    def fail(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, name, fail)
        yield


TROUBLES = {"full disk": full_disk, "no flush": lambda: failing("fsync"), "no rename": lambda: failing("replace")}


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("trouble", TROUBLES.values(), ids=TROUBLES.keys())
@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
@pytest.mark.parametrize("existing", [b"the old one", None], ids=["old", "new"])
def test_a_write_that_fails_leaves_the_old_file_and_no_other(
    tmp_path: Path, existing: bytes | None, write: Write, trouble: Callable[[], "contextmanager[None]"]
) -> None:
    path = tmp_path / "file"
    if existing is not None:
        path.write_bytes(existing)
    before = contents(tmp_path)
    with trouble(), pytest.raises(MmfmError) as error:
        write(path)
    assert str(error.value).startswith(f"{path}: cannot be written (")
    assert contents(tmp_path) == before
    write(path)  # once the trouble is over
    assert len(path.read_bytes()) > 100_000
    assert list(contents(tmp_path)) == ["file"]


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES.keys())
def test_a_folder_that_is_a_file_is_a_sentence(tmp_path: Path, write: Write) -> None:
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MmfmError, match="cannot be written"):
        write(tmp_path / "file" / "inside")
    with pytest.raises(MmfmError, match="cannot be written"), whole_folder(tmp_path / "file" / "inside" / "deeper"):
        pass
    assert contents(tmp_path) == {"file": b"in the way"}


class Interruption(BaseException):
    """Neither an OSError nor even an Exception."""


@pytest.mark.parametrize("trouble", ["full disk", "own error", "interruption"])
def test_a_folder_that_is_not_filled_leaves_the_old_one(tmp_path: Path, trouble: str) -> None:
    path = tmp_path / "folder"
    with whole_folder(path) as folder:
        write_text(folder / "a" / "old", "old")
    before = contents(tmp_path)
    expected = {"full disk": MmfmError, "own error": OSError, "interruption": Interruption}[trouble]
    with pytest.raises((expected, MmfmError)), whole_folder(path) as folder:
        write_text(folder / "new", "new")
        assert contents(path) == {"a/old": b"old"}, "until it is whole, the old one is what others see"
        if trouble == "full disk":
            with full_disk():
                write_tensors(folder / "large", {"w": LARGE})
        raise expected(errno.EIO, "text")
    assert contents(tmp_path) == before


def test_a_folder_replaces_the_old_one_as_a_whole(tmp_path: Path) -> None:
    for name in ("first", "second"):
        with whole_folder(tmp_path / "folder") as folder:
            write_text(folder / name, name)
    assert contents(tmp_path) == {"folder/second": b"second"}
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_what_a_killed_process_left_is_cleared_away(tmp_path: Path) -> None:
    for left in (".partial-folder", ".replaced-folder"):
        write_text(tmp_path / left / "half", "half")
    with whole_folder(tmp_path / "folder") as folder:
        write_text(folder / "whole", "whole")
    with whole_folder(tmp_path / "folder") as folder:
        write_text(folder / "again", "again")
    assert contents(tmp_path) == {"folder/again": b"again"}


kinds = st.sampled_from([np.float16, np.float32, np.float64, np.int64, np.int8, np.uint8, np.bool_])
tensors = st.dictionaries(
    st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=8).filter(
        lambda name: name != "__metadata__"
    ),
    arrays.arrays(kinds, arrays.array_shapes(min_dims=0, max_dims=3, min_side=0, max_side=3)),
    max_size=4,
)


@given(saved=tensors)
@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_tensors_are_read_as_they_were_written(tmp_path: Path, saved: Tensors) -> None:
    saved |= {f"{name}-turned": tensor.T for name, tensor in saved.items()}  # not in the order of memory
    write_tensors(tmp_path / "t.safetensors", saved)
    read = read_tensors(tmp_path / "t.safetensors")
    assert read.keys() == saved.keys()
    for name, tensor in saved.items():
        assert (read[name].dtype, read[name].shape) == (tensor.dtype, tensor.shape)
        np.testing.assert_array_equal(read[name], tensor)


def test_a_damaged_file_of_tensors_is_a_sentence(tmp_path: Path) -> None:
    path = tmp_path / "t.safetensors"
    write_tensors(path, {"w": np.arange(6, dtype=np.float32), "n": np.array(3)})
    whole = path.read_bytes()
    header = json.dumps({"w": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    damaged = [whole[:length] for length in range(0, len(whole), 7)]
    damaged += [b"\xff" * len(whole), whole + b"more", len(header).to_bytes(8, "little") + header, b"\x80\x04N."]
    for data in damaged:
        path.write_bytes(data)
        with pytest.raises(MmfmError) as error:
            read_tensors(path)
        assert str(error.value) == f"{path}: is not a whole safetensors file; restore it or remove it"


def test_an_absent_file_of_tensors_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(MmfmError, match=r"none\.safetensors: cannot be read \(No such file or directory\)"):
        read_tensors(tmp_path / "none.safetensors")


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_process_that_is_asked_to_end_while_it_writes_leaves_nothing_half(
    write: Write, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a worker ends: by an exception, out of a signal's handler."""
    path = tmp_path / "file"
    path.write_text("before")

    def asked_to_end(_: int) -> None:
        raise SystemExit(1)

    monkeypatch.setattr(os, "fsync", asked_to_end)
    with pytest.raises(SystemExit):
        write(path)
    assert [each.name for each in tmp_path.iterdir()] == ["file"]
    assert path.read_text() == "before"
