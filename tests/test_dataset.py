"""Datasets: what a file holds is what a model sees, and what a study lacks has no say."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from test_manifest import model, site, table
from tiny import tiny_federation, write_sites

from mmfm_core.config import Federation
from mmfm_core.config.modality import ImageModality
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Dataset, concatenate, load_dataset
from mmfm_core.data.readers import read_image
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel
from mmfm_core.text.tokenizer import byte_tokenizer
from mmfm_core.training.steps import train

RNG = np.random.default_rng(0)
GREY8 = RNG.integers(0, 256, (8, 6), np.uint8)
GREY16 = RNG.integers(0, 65536, (8, 6), np.uint16)
RGB = RNG.integers(0, 256, (8, 6, 3), np.uint8)
PALETTE = RNG.integers(0, 256, (4, 3), np.uint8)
INDEX = RNG.integers(0, 4, (8, 6), np.uint8)


def luma(rgb: np.ndarray) -> np.ndarray:
    """ITU-R 601, as PNG readers turn colour into grey."""
    return rgb.astype(float) @ [0.299, 0.587, 0.114]


def modality(channels: int = 1, size: Sequence[int] = (8, 6), normalize: Any = "site") -> ImageModality:
    return ImageModality(kind="image2d", channels=channels, size=tuple(size), normalize=normalize)


def palette_image() -> Image.Image:
    image = Image.fromarray(INDEX, "P")
    image.putpalette(PALETTE.tobytes())
    return image


@pytest.mark.parametrize(
    ("image", "channels", "expected", "tolerance"),
    [
        (Image.fromarray(GREY8), 1, GREY8[None] / 255, 1e-6),
        (Image.fromarray(GREY8), 3, np.stack([GREY8] * 3) / 255, 1e-6),
        (Image.fromarray(GREY16), 1, GREY16[None] / 65535, 1e-6),
        (Image.fromarray(GREY16), 3, np.stack([GREY16] * 3) / 65535, 1e-6),
        (Image.fromarray(RGB), 3, RGB.transpose(2, 0, 1) / 255, 1e-6),
        (Image.fromarray(RGB), 1, luma(RGB)[None] / 255, 1 / 255),
        (palette_image(), 3, PALETTE[INDEX].transpose(2, 0, 1) / 255, 1e-6),
        (palette_image(), 1, luma(PALETTE[INDEX])[None] / 255, 1 / 255),
        (Image.fromarray(GREY8 > 127), 1, (GREY8 > 127)[None].astype(float), 1e-6),
        (Image.fromarray(GREY8).convert("LA"), 1, GREY8[None] / 255, 1e-6),
        (Image.fromarray(RGB).convert("RGBA"), 3, RGB.transpose(2, 0, 1) / 255, 1e-6),
    ],
    ids=[
        "grey",
        "grey-as-3",
        "16-bit",
        "16-bit-as-3",
        "rgb",
        "rgb-as-1",
        "palette",
        "palette-as-1",
        "bits",
        "la",
        "rgba",
    ],
)
def test_a_png_is_read_in_parts_of_its_full_scale(
    tmp_path: Path, image: Image.Image, channels: int, expected: np.ndarray, tolerance: float
) -> None:
    image.save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", modality(channels))
    assert (read.dtype, read.shape) == (np.float32, (channels, 8, 6))
    np.testing.assert_allclose(read, expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(("pixels", "channels"), [(GREY8, 1), (RGB, 3)], ids=["grey", "rgb"])
def test_a_jpeg_is_read_as_its_own_pixels(tmp_path: Path, pixels: np.ndarray, channels: int) -> None:
    Image.fromarray(pixels).save(tmp_path / "a.jpg", quality=95)
    decoded = np.asarray(Image.open(tmp_path / "a.jpg")).astype(float)  # a JPEG is not what was saved
    expected = decoded[None] if channels == 1 else decoded.transpose(2, 0, 1)
    np.testing.assert_allclose(read_image(tmp_path / "a.jpg", modality(channels)), expected / 255, rtol=0, atol=1e-6)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_halving_an_image_takes_the_mean_of_each_neighbourhood(
    tmp_path: Path, dtype: type[np.unsignedinteger[Any]]
) -> None:
    """Antialiased: on a ramp, a linear filter gives the ramp at the new pixels' centres."""
    full_scale = np.iinfo(dtype).max
    ramp = np.broadcast_to(np.linspace(0, full_scale, 32).round().astype(dtype), (16, 32))
    Image.fromarray(np.ascontiguousarray(ramp)).save(tmp_path / "a.png")
    read = read_image(tmp_path / "a.png", modality(size=(8, 16)))[0]
    centres = ramp[0].reshape(16, 2).mean(1) / full_scale
    np.testing.assert_allclose(read[:, 1:-1], np.broadcast_to(centres[1:-1], (8, 14)), rtol=0, atol=1.01 / 255)
    assert read[:, 1:-1].std(0).max() < 1e-6


def test_bytes_that_are_no_image_are_always_a_sentence(tmp_path: Path) -> None:
    whole = []
    for suffix, pixels in (("png", GREY16), ("png", RGB), ("jpeg", RGB)):
        Image.fromarray(pixels).save(tmp_path / f"a.{suffix}")
        whole.append((tmp_path / f"a.{suffix}").read_bytes())
    refused = 0
    for number in range(600):
        data = np.frombuffer(whole[number % 3], np.uint8).copy()
        data[RNG.integers(0, len(data), 3)] = RNG.integers(0, 256, 3)
        (tmp_path / "b").write_bytes(data[: RNG.integers(0, len(data))] if number % 5 == 0 else data)
        try:
            assert np.isfinite(read_image(tmp_path / "b", modality())).all()
        except MmfmError:
            refused += 1
    assert refused > 100


@pytest.mark.parametrize("kind", ["tiff", "bmp", "gif", "text", "folder"])
def test_what_is_no_png_or_jpeg_is_refused(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "CANARY-PHI.png"
    if kind == "folder":
        path.mkdir()
    elif kind == "text":
        path.write_text("CANARY-PHI")
    else:
        Image.fromarray(GREY8).save(path, kind)
    with pytest.raises(MmfmError, match="cannot be read as a PNG or JPEG") as error:
        read_image(path, modality())
    assert "CANARY" not in str(error.value)


def test_an_unreadable_image_is_named_by_its_row(tmp_path: Path) -> None:
    Image.fromarray(GREY8).save(tmp_path / "good.png")
    (tmp_path / "PATIENT-NAME.png").write_bytes((tmp_path / "good.png").read_bytes()[:60])
    manifest = table(tmp_path, {"scan": "good.png"}, {"scan": "PATIENT-NAME.png"})
    with pytest.raises(MmfmError) as error:
        load_dataset(site(manifest, modalities={"scan": "scan"}), model())
    assert str(error.value).startswith(f"{manifest}, row 3: the image of 'scan' cannot be read as a PNG or JPEG (")
    assert "PATIENT-NAME" not in str(error.value)


def with_scan(wanted: Model, **changes: Any) -> Model:
    document = wanted.model_dump(mode="json")
    document["modalities"]["scan"] |= changes
    return Model.model_validate(document)


def scans(folder: Path) -> tuple[Path, np.ndarray]:
    """A manifest of five studies with images, three of them for training, and one without; and the images in [0, 1]."""
    images = RNG.integers(0, 256, (5, 8, 8), np.uint8)
    for number, image in enumerate(images):
        Image.fromarray(image).save(folder / f"{number}.png")
    rows = [{"scan": f"{number}.png", "split": split} for number, split in enumerate(["train"] * 3 + ["val", "test"])]
    return table(folder, *rows, {"scan": ""}), images / 255


def test_a_site_normalises_images_by_its_training_studies(tmp_path: Path) -> None:
    manifest, images = scans(tmp_path)
    data = load_dataset(site(manifest, modalities={"scan": "scan", "note": "note"}), model())
    read = data.everything.inputs["scan"][:, 0].numpy()
    np.testing.assert_allclose([read[:3].mean(), read[:3].std(ddof=1)], [0, 1], rtol=0, atol=1e-5)
    expected = (images - images[:3].mean()) / images[:3].std(ddof=1)
    np.testing.assert_allclose(read[:5], expected, rtol=0, atol=1e-4)
    assert data.everything.present["scan"].tolist() == [True] * 5 + [False]


def test_images_are_normalised_as_declared(tmp_path: Path) -> None:
    manifest, images = scans(tmp_path)
    wanted = with_scan(model(), normalize={"mean": 0.25, "std": 0.5})
    data = load_dataset(site(manifest, modalities={"scan": "scan"}), wanted)
    np.testing.assert_allclose(data.everything.inputs["scan"][:, 0], (images - 0.25) / 0.5, rtol=0, atol=1e-5)


def features(folder: Path, rows: Sequence[dict[str, Any]], **specs: Any) -> torch.Tensor:
    """The features that a site's table gives, one column for each of `specs`."""
    document = model().model_dump(mode="json")
    document["modalities"]["labs"]["features"] = specs
    mapping = {"labs": {"features": {name: name for name in specs}}, "note": "note"}
    data = load_dataset(site(table(folder, *rows), modalities=mapping), Model.model_validate(document))
    return data.everything.inputs["labs"]


def test_a_site_normalises_numbers_by_its_training_studies(tmp_path: Path) -> None:
    crp = [1.0, 4.0, None, 7.0, 1000.0, -3.0]
    rows = [{"crp": value, "split": split} for value, split in zip(crp, ["train"] * 4 + ["val", "test"], strict=True)]
    read = features(tmp_path, rows, crp={})[:, 0].numpy()
    known = np.array([1.0, 4.0, 7.0])
    expected = (np.array(crp, dtype=float) - known.mean()) / known.std(ddof=1)
    np.testing.assert_allclose(read, expected, rtol=1e-6, atol=1e-6)
    assert np.isnan(read[2])


def test_numbers_far_from_zero_keep_their_differences(tmp_path: Path) -> None:
    seconds = 1.7e9 + np.arange(6)
    read = features(tmp_path, [{"crp": f"{value:.1f}"} for value in seconds], crp={})[:, 0].numpy()
    np.testing.assert_allclose(read, (np.arange(6) - 2.5) / np.arange(6).std(ddof=1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("constant", [0.0, 173.3, 1e-9, 1e12])
def test_what_never_varies_in_training_is_not_blown_up(tmp_path: Path, constant: float) -> None:
    rows = [{"crp": repr(constant)}] * 7 + [{"crp": repr(constant + 2), "split": "val"}, {"crp": "", "split": "test"}]
    read = features(tmp_path, [row | {"study": i} for i, row in enumerate(rows)], crp={})[:, 0].numpy()
    np.testing.assert_allclose(read[:7], 0, atol=1e-3)
    np.testing.assert_allclose(read[7], 2, atol=1e-3)
    assert np.isnan(read[8])


def test_a_small_unit_is_no_smaller_feature(tmp_path: Path) -> None:
    rows = [{"crp": value * 1e-9, "sex": "f"} for value in (1, 2, 3)]
    assert features(tmp_path, rows, crp={})[:, 0].tolist() == pytest.approx([-1, 0, 1], abs=1e-5)


def test_declared_numbers_and_categories(tmp_path: Path) -> None:
    rows = [{"crp": 5, "sex": "m"}, {"crp": 9, "sex": ""}, {"crp": "", "sex": "f"}]
    declared = {"normalize": {"mean": 5, "std": 2}}
    read = features(tmp_path, rows, crp=declared, sex={"categories": ["f", "m"]})
    np.testing.assert_allclose(read, [[0, 1], [2, np.nan], [np.nan, 0]])
    unmapped = model().model_dump(mode="json")
    unmapped["modalities"]["labs"]["features"]["age"] = {}
    data = load_dataset(site(tmp_path / "m.csv"), Model.model_validate(unmapped))
    assert data.everything.inputs["labs"].isnan()[:, 2].all(), "a feature that a site does not map is missing"


def test_presence_and_labels_follow_the_manifest(tmp_path: Path) -> None:
    rows = [{"note": "", "disease": 1}, {"crp": "", "sex": "", "disease": ""}, {"disease": 0, "split": "test"}, {}]
    data = load_dataset(site(table(tmp_path, *rows)), model())
    assert {name: mask.tolist() for name, mask in data.everything.present.items()} == {
        "note": [False, True, True, True],
        "labs": [True, False, True, True],
    }
    assert data.everything.targets["disease"].tolist() == [1, -1, 0, 0]
    assert data.rows("train", ["disease"]) == [0, 3]
    assert data.rows("test", ["disease"]) == [2]
    assert data.rows("val", ["disease"]) == []
    batch = data.batch([2, 0])
    assert (batch.targets["disease"].tolist(), batch.present["note"].tolist()) == ([0, 1], [True, False])
    assert len(batch) == 2


def test_texts_are_their_bytes_whatever_they_spell() -> None:
    texts = ["", "abc", "Fieber, später", "<pad>a</s>b<unk><extra_id_0>", "x" * 40]
    ids, cut = byte_tokenizer().ids(texts, 30)
    for text, row in zip(texts, ids.tolist(), strict=True):
        expected = [byte + 3 for byte in text.encode()]
        expected = [*expected[:29], 1]
        assert row == expected + [byte_tokenizer().pad_id] * (30 - len(expected))
    assert cut == 1


def test_cut_texts_are_counted_among_those_that_are_there(tmp_path: Path) -> None:
    document = model().model_dump(mode="json")
    document["modalities"]["note"]["max_length"] = 5
    rows = [{"note": "1234"}, {"note": "12345"}, {"note": ""}, {"note": "é" * 3}]
    data = load_dataset(site(table(tmp_path, *rows)), Model.model_validate(document))
    assert [str(note) for note in data.notes] == ["2 of 3 texts of 'note' are longer than 5 tokens and were cut"]


@pytest.fixture(scope="module")
def together(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[Dataset], Dataset]:
    """Two hospitals' datasets, of which only one holds the note and only one the scan, and both as one."""
    wanted = tiny_federation().model
    hospitals = {"north": ("scan", "labs"), "south": ("note", "labs")}
    sites = write_sites(tmp_path_factory.mktemp("hospitals"), hospitals, patients=12)
    parts = [load_dataset(site, wanted) for site in sites.values()]
    return parts, concatenate(parts, wanted)


def test_pooled_studies_are_those_of_the_sites(together: tuple[list[Dataset], Dataset]) -> None:
    (north, south), pooled = together
    assert len(pooled) == len(north) + len(south)
    assert pooled.everything.present["scan"].tolist() == north.everything.present["scan"].tolist() + [False] * len(
        south
    )
    assert (
        pooled.everything.present["note"].tolist() == [False] * len(north) + south.everything.present["note"].tolist()
    )
    for part, rows in ((north, range(len(north))), (south, range(len(north), len(pooled)))):
        batch = pooled.batch(list(rows))
        for name, tensor in part.everything.inputs.items():
            torch.testing.assert_close(batch.inputs[name], tensor, equal_nan=True)
        torch.testing.assert_close(batch.targets, part.everything.targets)


def test_pooled_patients_with_one_number_stay_two(tmp_path: Path) -> None:
    data = load_dataset(site(table(tmp_path, {"patient": 1}, {"patient": 1}, {"patient": 2})), model())
    pooled = concatenate([data, data], model())
    assert [len({s.patient for s in d.studies}) for d in (data, pooled)] == [2, 4]


def with_fusion(kind: str) -> Federation:
    document = tiny_federation().model_dump(mode="json")
    document["model"]["fusion"] = {"type": kind}
    return Federation.model_validate(document)


FILLERS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "scan": lambda values: torch.full_like(values, 123.0),
    "note": lambda ids: torch.full_like(ids, 200),
    "labs": lambda values: torch.full_like(values, -77.0),
}


@pytest.mark.parametrize("kind", ["gated", "concat", "joint"])
def test_nothing_depends_on_what_fills_the_gaps(kind: str, together: tuple[list[Dataset], Dataset]) -> None:
    data, config = together[1], with_fusion(kind).model
    built = MultimodalModel(config, data.everything.inputs, ["disease"], seed=1).eval()
    batch = data.batch(range(len(data)))
    with torch.inference_mode():
        before = built(batch, ["disease"])["disease"]
        for name, filler in FILLERS.items():
            absent = ~batch.present[name]
            assert absent.any()
            batch.inputs[name][absent] = filler(batch.inputs[name][absent])
        after = built(batch, ["disease"])["disease"]
        # How long the others' texts are is no information either.
        alone = [built(data.batch([row]), ["disease"])["disease"] for row in range(len(data))]
    assert before.isfinite().all()
    torch.testing.assert_close(after, before, rtol=0, atol=1e-5)
    torch.testing.assert_close(torch.cat(alone), before, rtol=0, atol=1e-5)
    assert before.std(0).min() > 1e-3, "it must depend on something"


@pytest.mark.parametrize("kind", ["gated", "concat", "joint"])
def test_pooled_training_meets_batches_without_a_modality(kind: str, together: tuple[list[Dataset], Dataset]) -> None:
    data, federation = together[1], with_fusion(kind)
    built = MultimodalModel(federation.model, data.everything.inputs, ["disease"], seed=1)
    stage = federation.stages[0].model_copy(update={"batch_size": 1, "local_steps": 12})
    torch.manual_seed(0)
    assert np.isfinite(train(built, data, stage, [name for name, _ in built.named_parameters()]))
    assert all(parameter.isfinite().all() for parameter in built.parameters())
