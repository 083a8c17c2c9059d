"""Images in a file: the same as in memory, decoded once, whole or absent, and no part of the process' memory."""

import ctypes
import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from mmfm_core.config import Site
from mmfm_core.config.model import Model
from mmfm_core.data import images
from mmfm_core.data.cache import sweep
from mmfm_core.data.dataset import Dataset, load_dataset
from mmfm_core.errors import MmfmError

STUDIES = 9
SIDE = 12


@pytest.fixture
def site(tmp_path: Path) -> Site:
    """Nine films, the last study without one, two studies for testing."""
    random = np.random.default_rng(0)
    rows = ["study,patient,split,film,age,label"]
    for number in range(STUDIES):
        film = "" if number == STUDIES - 1 else f"{number}.png"
        if film:
            Image.fromarray(random.integers(0, 255, (SIDE, SIDE), dtype=np.uint8)).save(tmp_path / film)
        rows.append(f"s{number},p{number},{'test' if number in (2, 5) else 'train'},{film},{50 + number},{number % 2}")
    (tmp_path / "manifest.csv").write_text("\n".join(rows) + "\n")
    return Site.model_validate(
        {
            "name": "here",
            "manifest": str(tmp_path / "manifest.csv"),
            "study": "study",
            "patient": "patient",
            "split": {"column": "split"},
            "modalities": {"film": "film", "labs": {"features": {"age": "age"}}},
            "targets": {"task": {"column": "label", "values": {"0": "no", "1": "yes"}}},
        }
    )


def model(**film: object) -> Model:
    return Model.model_validate(
        {
            "dim": 12,
            "modalities": {
                "film": {"kind": "image2d", "size": [SIDE, SIDE], "optional": True} | film,
                "labs": {"kind": "tabular", "features": ["age"]},
            },
            "encoders": {
                "film": {"type": "vit", "patch_size": 4, "depth": 1, "heads": 3},
                "labs": {"type": "feature_tokens"},
            },
            "fusion": {"type": "concat"},
            "heads": {"task": {"type": "classification", "classes": ["no", "yes"]}},
        }
    )


@pytest.fixture
def mapped(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Dataset]:
    """A dataset whose images do not count as few."""
    monkeypatch.setattr(images, "IN_MEMORY", 0)
    return lambda **film: load_dataset(site, model(**film), cache=tmp_path / "cache")


def kept(folder: Path) -> list[Path]:
    return sorted((folder / "cache" / "images").glob("[!.]*.npy"))


@pytest.mark.parametrize("normalize", ["site", "study", "foreground", {"mean": 0.3, "std": 0.2}], ids=str)
def test_in_a_file_they_are_what_they_are_in_memory(site: Site, mapped: Callable[..., Dataset], normalize: object):
    in_memory = load_dataset(site, model(normalize=normalize)).everything
    for _ in range(2):  # decoded, and found
        assert torch.equal(mapped(normalize=normalize).everything.inputs["film"], in_memory.inputs["film"])


@pytest.mark.parametrize("margin", [2, 4])
def test_how_much_air_is_around_a_head_does_not_move_its_foreground(site: Site, tmp_path: Path, margin: int):
    head = np.random.default_rng(1).integers(150, 250, (SIDE, SIDE), dtype=np.uint8)
    head[:margin] = head[-margin:] = 0
    Image.fromarray(head).save(tmp_path / "0.png")
    film = load_dataset(site, model(normalize="foreground")).everything.inputs["film"][0, 0]
    assert abs(film[margin:-margin].mean()) < 1e-5
    assert film[margin:-margin].std() == pytest.approx(1, abs=1e-5)
    assert film[0].max() < -3


def test_an_image_of_one_colour_has_no_foreground_and_is_zero(site: Site, tmp_path: Path):
    Image.fromarray(np.full((SIDE, SIDE), 77, dtype=np.uint8)).save(tmp_path / "0.png")
    film = load_dataset(site, model(normalize="foreground")).everything.inputs["film"][0]
    assert film.abs().max() < 0.1


def test_few_images_stay_in_memory(site: Site, tmp_path: Path):
    load_dataset(site, model(), cache=tmp_path / "cache")
    assert not (tmp_path / "cache").exists()


def test_a_restarted_agent_decodes_nothing(
    mapped: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    first = mapped().everything.inputs["film"].clone()
    monkeypatch.setattr(images, "read_image", lambda *_: pytest.fail("decoded again"))
    assert torch.equal(mapped().everything.inputs["film"], first)
    assert torch.equal(mapped(augment={"mirror": ["x"]}).everything.inputs["film"], first)
    assert len(kept(tmp_path)) == 1


def test_a_file_that_is_mapped_counts_as_used_and_stays(mapped: Callable[..., Dataset], tmp_path: Path):
    mapped()
    mapped(normalize="study")
    for path in kept(tmp_path):
        os.utime(path, (0, 0))
    mapped()
    sweep(tmp_path / "cache")
    assert len(kept(tmp_path)) == 1


def replace_a_film(folder: Path) -> None:
    Image.fromarray(np.zeros((SIDE, SIDE), np.uint8)).save(folder / "0.png")


def replace_it_by_one_as_large(folder: Path) -> None:
    before, data = (folder / "0.png").stat(), (folder / "1.png").read_bytes()
    (folder / "0.png").write_bytes(data[: before.st_size].ljust(before.st_size, b"\0"))
    os.utime(folder / "0.png", ns=(before.st_atime_ns, before.st_mtime_ns + 1))


def move_a_study_to_testing(folder: Path) -> None:
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("s0,p0,train", "s0,p0,test"))


def swap_two_films(folder: Path) -> None:
    manifest = folder / "manifest.csv"
    manifest.write_text(manifest.read_text().replace("0.png", "x").replace("1.png", "0.png").replace("x", "1.png"))


CHANGES = (replace_a_film, replace_it_by_one_as_large, move_a_study_to_testing, swap_two_films)


@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_what_changed_is_decoded_anew(
    site: Site, mapped: Callable[..., Dataset], tmp_path: Path, change: Callable[[Path], None]
):
    before = mapped().everything.inputs["film"].clone()
    change(tmp_path)
    after = mapped().everything.inputs["film"]
    assert not torch.equal(after, before)
    assert torch.equal(after, load_dataset(site, model()).everything.inputs["film"])


def test_an_image_that_cannot_be_read_leaves_no_file(mapped: Callable[..., Dataset], tmp_path: Path):
    (tmp_path / "3.png").write_bytes(b"no image")
    with pytest.raises(MmfmError, match=r"manifest.csv, row 5: the image of 'film'"):
        mapped()
    assert [path.name for path in (tmp_path / "cache" / "images").iterdir()] == ["lock"]
    (tmp_path / "3.png").unlink()
    with pytest.raises(MmfmError, match=r"manifest.csv, row 5"):
        mapped()


def test_a_full_disk_is_a_sentence_and_not_a_killed_process(
    mapped: Callable[..., Dataset], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", full)
        with pytest.raises(MmfmError, match=r"cannot be written \(No space left on device\)"):
            mapped()
    assert not kept(tmp_path)
    mapped()


def test_a_cache_that_cannot_be_written_is_a_sentence(mapped: Callable[..., Dataset], tmp_path: Path):
    (tmp_path / "cache").write_text("no folder")
    with pytest.raises(MmfmError, match=r"cache/images: cannot be written \(.*\); mend the permissions"):
        mapped()


def test_a_file_that_was_cut_off_is_told_from_a_whole_one(mapped: Callable[..., Dataset], tmp_path: Path):
    mapped()
    (path,) = kept(tmp_path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MmfmError, match="is damaged; remove it"):
        mapped()
    path.unlink()
    mapped()


KILLED = """
import os, signal, sys
from pathlib import Path
from mmfm_core.config import load_site
from mmfm_core.data import images
from mmfm_core.data.dataset import load_dataset
sys.path.insert(0, sys.argv[2])
from test_images import model
images.IN_MEMORY, read, count = 0, images.read_image, 0
def stopping(*given):
    global count
    count += 1
    if count == 4:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(*given)
images.read_image = stopping
load_dataset(load_site(Path(sys.argv[1]) / "site.yaml"), model(), cache=Path(sys.argv[1]) / "cache")
"""


def test_an_agent_killed_while_decoding_decodes_all_of_it_next_time(
    site: Site, mapped: Callable[..., Dataset], tmp_path: Path
):
    (tmp_path / "site.yaml").write_text(site.model_dump_json())
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(Path(__file__).parent)], check=False)
    assert killed.returncode == -9
    assert not kept(tmp_path)
    assert torch.equal(mapped().everything.inputs["film"], load_dataset(site, model()).everything.inputs["film"])
    assert sorted(path.suffix for path in (tmp_path / "cache" / "images").iterdir()) == ["", ".npy"]


def test_mapped_images_are_no_memory_of_the_process(mapped: Callable[..., Dataset], tmp_path: Path):
    """A site limits that memory: what may not be written to does not count, here or at the system."""
    film = mapped().everything.inputs["film"]
    (line,) = (each for each in Path("/proc/self/maps").read_text().splitlines() if str(kept(tmp_path)[0]) in each)
    assert line.split()[1].startswith("r-")
    assert film.shape == (STUDIES, 1, SIDE, SIDE)


def in_memory(images: torch.Tensor, row: int) -> bool:
    """Whether the system holds a whole row of a mapped file, mincore(2)."""
    each = images.nbytes // len(images)
    start = images.data_ptr() + row * each
    page = start - start % mmap.PAGESIZE
    resident = (ctypes.c_ubyte * -(-(start + each - page) // mmap.PAGESIZE))()
    assert ctypes.CDLL(None).mincore(ctypes.c_void_p(page), ctypes.c_size_t(start + each - page), resident) == 0
    return all(flags & 1 for flags in resident)


def test_the_next_batch_is_read_while_this_one_is_used(mapped: Callable[..., Dataset], tmp_path: Path):
    mapped(size=[768, 768])
    with kept(tmp_path)[0].open() as file:
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    dataset = mapped(size=[768, 768])
    film = dataset.everything.inputs["film"]
    dataset.batch([0]).inputs["film"].sum()
    if in_memory(film, 7):
        pytest.skip("this file system keeps all it has in memory")
    batch = dataset.batch([0], next_rows=[7])
    assert not in_memory(film, 7)  # nobody may want these images at all: features may stand for them
    assert torch.equal(batch.inputs["film"], film[:1])
    given_up = time.monotonic() + 20
    while not in_memory(film, 7) and time.monotonic() < given_up:
        time.sleep(0.01)
    assert in_memory(film, 7)


def test_rows_of_what_is_in_memory_are_no_matter(site: Site):
    """Advice about memory of another kind is none."""
    dataset = load_dataset(site, model())
    assert torch.equal(
        dataset.batch([1, 2], next_rows=[8]).inputs["film"], dataset.everything.inputs["film"][torch.tensor([1, 2])]
    )
