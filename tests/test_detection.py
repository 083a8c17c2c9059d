"""Detection: boxes read, taught, found again, and refused."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from per_study import assert_gradients_separate
from PIL import Image, ImageDraw
from pydantic import ValidationError
from torch import Tensor

from mmfm_core.config import Site
from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch, Dataset, load_dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.centres import box_loss, closeness_of, heat_loss, peaks
from mmfm_core.models.heads.detection import Maps
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding

SIDE = 48
CLASSES = ("square", "disc")
LATENT = ({"type": "concat"}, {"type": "gated"}, {"type": "cross_attention", "anchor": "scan"}, {"type": "bottleneck"})


def model_with(fusion: dict[str, Any] | None = None, **head: Any) -> Model:
    """A model that finds squares and discs in a scan, beside which there may be a note."""
    note = fusion is not None
    return Model.model_validate(
        {
            "dim": 24,
            "modalities": {"scan": {"kind": "image2d", "size": [SIDE, SIDE], "optional": note}}
            | ({"note": {"kind": "text", "max_length": 12, "optional": True}} if note else {}),
            "encoders": {"scan": {"type": "vit", "patch_size": 16, "depth": 1}}
            | ({"note": {"type": "bert", "depth": 1}} if note else {}),
            "fusion": fusion or {"type": "channels"},
            "heads": {"shapes": {"type": "detection", "classes": CLASSES, "max_boxes": 8, "width": 32} | head},
        }
    )


def site(folder: Path, cells: list[str], size: tuple[int, int] = (SIDE, SIDE), **target: Any) -> Site:
    """A site whose studies all have one grey image of `size` (width, height) and a cell of boxes each."""
    if not (folder / "scan-of-mary.png").exists():
        Image.new("L", size, 90).save(folder / "scan-of-mary.png")
    rows = {"patient_id": [f"p{row}" for row in range(len(cells))], "split": "train", "scan": "scan-of-mary.png"}
    pd.DataFrame(rows | {"boxes": cells}).to_csv(folder / "manifest.csv", index=False)
    mapping = {"column": "boxes", "values": {"SQ": "square", "DI": "disc"}} | target
    return Site.model_validate(
        {
            "name": "north",
            "manifest": folder / "manifest.csv",
            "modalities": {"scan": "scan"},
            "targets": {"shapes": mapping},
        }
    )


def cell(*boxes: tuple[str, float, float, float, float]) -> str:
    return json.dumps([{"label": label, "xyxy": corners} for label, *corners in boxes])


def rows_of(*boxes: tuple[float, ...], size: int = 8) -> Tensor:
    return torch.tensor([*boxes, *[(-1.0,) * 5] * (size - len(boxes))], dtype=torch.float32)


def batch_of(targets: list[Tensor], **inputs: Tensor) -> Batch:
    generator = torch.Generator().manual_seed(0)
    studies = len(targets)
    scan = torch.randn(studies, 1, SIDE, SIDE, generator=generator)
    everyone = torch.ones(studies, dtype=torch.bool)
    inputs = {"scan": scan} | inputs
    return Batch(inputs, dict.fromkeys(inputs, everyone), {"shapes": torch.stack(targets)}, {"shapes": everyone})


def random_boxes(number: int, seed: int = 0) -> Tensor:
    rng = np.random.default_rng(seed)
    corners = [np.concatenate([(low := rng.uniform(0, 0.6, 2)), low + rng.uniform(0.1, 0.4, 2)]) for _ in range(number)]
    return rows_of(*[(float(rng.integers(2)), *corner) for corner in corners])


# What a manifest says


def test_boxes_are_scaled_from_the_stored_image_whatever_the_size_of_the_models(tmp_path):
    stored = cell(("SQ", 10, 20, 50, 30), ("disc", 0, 0, 200, 100))
    data = load_dataset(site(tmp_path, [stored], size=(200, 100)), model_with())
    expected = rows_of((0, 0.05, 0.2, 0.25, 0.3), (1, 0, 0, 1, 1))
    torch.testing.assert_close(data.everything.targets["shapes"][0], expected)


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_boxes_may_be_lists_where_the_manifest_can_hold_them(tmp_path, kind):
    there = site(tmp_path, [cell(("SQ", 12, 0, 24, 48))])
    frame = pd.read_csv(there.manifest)
    frame["boxes"] = frame["boxes"].map(json.loads)
    stored = tmp_path / f"manifest.{kind}"
    frame.to_parquet(stored) if kind == "parquet" else frame.to_json(stored, orient="records", lines=True)
    data = load_dataset(there.model_copy(update={"manifest": stored}), model_with())
    torch.testing.assert_close(data.everything.targets["shapes"][0], rows_of((0, 0.25, 0, 0.5, 1)))


def test_an_empty_list_is_a_negative_and_an_empty_cell_is_unlabelled(tmp_path):
    data = load_dataset(site(tmp_path, ["[]", "", cell(("SQ", 1, 1, 9, 9))]), model_with())
    assert data.everything.usable["shapes"].tolist() == [True, False, True]
    assert (data.everything.targets["shapes"][:2] == -1).all()
    head = model_with().heads["shapes"]
    counts = [head.count(study.targets["shapes"]) for study in data.studies if "shapes" in study.targets]
    assert counts == [{"square": 0, "disc": 0}, {"square": 1, "disc": 0}]


def test_a_box_that_reaches_over_the_border_by_a_pixel_is_cut_there(tmp_path):
    data = load_dataset(site(tmp_path, [cell(("SQ", -1, -0.5, 24, SIDE + 1))]), model_with())
    torch.testing.assert_close(data.everything.targets["shapes"][0], rows_of((0, 0, 0, 0.5, 1)))
    cut = "1 of 1 targets of 'shapes': boxes that reach over the image's border by a pixel were cut there"
    assert [str(note) for note in data.notes] == [cut]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (cell(("SQ", -1.5, 0, 9, 9)), "outside its image"),
        (cell(("SQ", 0, 0, 9, SIDE + 2)), "outside its image"),
        (cell(("SQ", 5, 5, 5, 9)), "without area"),
        (cell(("SQ", 9, 0, 5, 9)), "without area"),
        (cell(("SQ", -1, 0, -0.5, 9)), "without area"),
        (cell(*[("SQ", 0, 0, 9, 9)] * 9), "'max_boxes'"),
        (cell(("LUMP", 0, 0, 9, 9)), "label is none of square, disc"),
        (cell(("SQ", 0, 0, 9, float("nan"))), "no JSON list of boxes"),
        ('[{"label": "SQ", "xyxy": [0, 0, 9]}]', "no JSON list of boxes"),
        ('[{"xyxy": [0, 0, 9, 9]}]', "no JSON list of boxes"),
        ('{"label": "SQ", "xyxy": [0, 0, 9, 9]}', "no JSON list of boxes"),
        ('[{"label": "SQ"', "no JSON list of boxes"),
        ('[{"label": "SQ", "xyxy": [0, 0, 9, 1' + "0" * 400 + "]}]", "no JSON list of boxes"),
    ],
)
def test_a_cell_that_cannot_be_used_is_refused_with_its_row_and_never_its_content(tmp_path, content, reason):
    with pytest.raises(MmfmError, match=reason) as refused:
        load_dataset(site(tmp_path, ["[]", content]), model_with())
    assert "row 3" in str(refused.value)
    assert not any(secret in str(refused.value) for secret in ("LUMP", "mary", "SQ"))


def test_a_mapping_to_a_class_that_is_none_or_of_several_columns_is_refused(tmp_path):
    with pytest.raises(MmfmError, match=r"targets\.shapes\.values\.SQ: there is no class 'sqare'; did you mean"):
        load_dataset(site(tmp_path, ["[]"], values={"SQ": "sqare"}), model_with())
    two = site(tmp_path, ["[]"]).model_dump(mode="json") | {"targets": {"shapes": {"columns": {"square": "boxes"}}}}
    with pytest.raises(MmfmError, match="'column: NAME'"):
        load_dataset(Site.model_validate(two), model_with())


def test_a_study_without_its_image_cannot_serve_the_head(tmp_path):
    described = site(tmp_path, [cell(("SQ", 1, 1, 9, 9))] * 2)
    table = pd.read_csv(tmp_path / "manifest.csv")
    table.assign(scan=["scan-of-mary.png", ""], note="seen").to_csv(tmp_path / "manifest.csv", index=False)
    both = Site.model_validate(described.model_dump() | {"modalities": {"scan": "scan", "note": "note"}})
    data = load_dataset(both, model_with({"type": "gated"}))
    assert data.everything.usable["shapes"].tolist() == [True, False]


def test_a_site_without_the_image_that_is_named_has_no_such_head():
    for named in ({"image": "scan"}, {"encoders": ["scan"]}):
        model = model_with({"type": "gated"}, **named)
        assert model.held(["note"], ["shapes"]).heads == ()
        assert model.held(["scan"], ["shapes"]).heads == ("shapes",)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"classes": ["square", "square"]}, "classes: 'square' is named twice"),
        ({"encoders": ["note"]}, "encoders: none of them reads 2D images"),
        ({"image": "note"}, "image: 'note' is no encoder of 2D images"),
        ({"width": 40}, "multiple of 32"),
    ],
)
def test_a_head_that_cannot_work_is_refused_in_the_document(changes, reason):
    with pytest.raises(ValidationError, match=reason):
        model_with({"type": "gated"}, **changes)


def test_of_several_images_the_one_with_the_boxes_must_be_named():
    document = model_with({"type": "gated"}).model_dump(mode="json")
    for part in ("modalities", "encoders"):
        document[part]["other"] = document[part]["scan"]
    with pytest.raises(ValidationError, match="image: say in which image the boxes lie: scan or other"):
        Model.model_validate(document)
    document["heads"]["shapes"]["image"] = "other"
    assert Model.model_validate(document).heads["shapes"].image == "other"


# What is taught


def test_closeness_is_one_in_the_cell_that_holds_a_centre_and_a_gaussian_around_it():
    cells = torch.tensor([[x + 0.5, y + 0.5] for y in range(6) for x in range(6)]) * 8
    corners = torch.tensor([[[0.0, 0, 48, 48], [3, 11, 9, 15], [0, 0, 8, 8]]])  # centres (24, 24) and (6, 13)
    seen = closeness_of(cells, corners, torch.tensor([[True, True, False]]), stride=8)[0]
    for index, (x, y) in enumerate(cells.tolist()):
        for box, (cx, cy, spread) in enumerate([(24, 24, 48 * 0.09), (6, 13, 2.0)]):
            holds = (x // 8, y // 8) == (cx // 8, cy // 8)
            expected = 1.0 if holds else np.exp(-((x - cx) ** 2 + (y - cy) ** 2) / (2 * spread**2))
            assert seen[index, box].item() == pytest.approx(expected, abs=1e-6), (x, y, box)
    assert not seen[:, 2].any()


def test_the_loss_of_centres_is_that_of_cornernet():
    closeness = torch.tensor([[[1.0, 0.0], [0.5, 0.1], [0.0, 1.0]]])  # 3 cells, 2 boxes of classes 1 and 1
    logits = torch.tensor([[[0.3, -1.0, 2.0], [0.7, 0.1, -0.4]]])
    p = logits.sigmoid()[0]
    expected = -sum(p[0, cell] ** 2 * (1 - p[0, cell]).log() for cell in range(3))
    expected -= (1 - p[1, 0]) ** 2 * p[1, 0].log() + (1 - p[1, 2]) ** 2 * p[1, 2].log()
    expected -= (1 - 0.5) ** 4 * p[1, 1] ** 2 * (1 - p[1, 1]).log()
    torch.testing.assert_close(heat_loss(logits, closeness, torch.tensor([[1.0, 1.0]]))[0], expected)


def test_the_loss_of_boxes_counts_every_true_box_once_and_is_zero_on_them():
    corners = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 40, 40], [-1, -1, -1, -1]]])
    closeness = torch.tensor([[[1.0, 0.0, 0.0], [0.2, 1.0, 0.0], [0.0, 0.5, 0.0], [0.0, 0.5, 0.0]]])
    drawn = torch.tensor([[[0.0, 0, 10, 10], [0, 0, 40, 40], [0, 0, 40, 40], [0, 0, 40, 40]]])
    torch.testing.assert_close(box_loss(drawn, closeness, corners), torch.zeros(1))
    drawn[0, 0] = torch.tensor([0.0, 0, 10, 5])  # half of the first box: IoU 0.5
    drawn[0, 2] = torch.tensor([0.0, 0, 40, 20])  # half of the second, at a quarter of its weight
    torch.testing.assert_close(box_loss(drawn, closeness, corners), torch.tensor([0.5 + 0.5 / 4]))


def test_peaks_are_the_local_maxima_surest_first():
    heat = torch.full((2, 5, 6), -9.0)
    heat[1, 1, 1], heat[1, 1, 2], heat[0, 4, 5], heat[0, 2, 1] = 3.0, 2.0, 1.0, -1.0
    labels, cells, scores = peaks(heat, most=10)
    assert list(zip(labels.tolist(), cells.tolist(), strict=True)) == [(1, 7), (0, 29), (0, 13)]
    torch.testing.assert_close(scores, torch.tensor([3.0, 1.0, -1.0]).sigmoid())
    assert len(peaks(heat, most=2)[0]) == 2
    assert not len(peaks(torch.full((2, 5, 6), torch.nan), most=10)[0])


def test_a_study_does_not_depend_on_the_others_in_its_batch_nor_on_the_order_of_its_boxes():
    model = full_model(model_with(), seed=0).eval()
    batch = batch_of([random_boxes(n, seed=n) for n in (0, 7, 1)])
    together = model.losses(batch, ["shapes"])["shapes"]
    for row in range(3):
        alone = model.losses(batch.rows([row]), ["shapes"])["shapes"]
        torch.testing.assert_close(alone, together[row : row + 1], rtol=1e-5, atol=1e-5)
    batch.targets["shapes"][1, :7] = batch.targets["shapes"][1, :7].flip(0)
    torch.testing.assert_close(model.losses(batch, ["shapes"])["shapes"], together, rtol=1e-5, atol=1e-5)


def test_gradients_of_studies_with_different_numbers_of_boxes_can_be_told_apart():
    """DETR's set loss died here (`_forward_counter` in Opacus): see the design notes on per-patient gradients."""
    model = full_model(model_with(LATENT[1]), seed=0)
    note = torch.randint(3, 259, (3, 12), generator=torch.Generator().manual_seed(0))
    batch = batch_of([random_boxes(n, seed=n) for n in (0, 1, 7)], note=note)
    batch.present["note"] = torch.tensor([True, False, True])
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["shapes"])["shapes"], studies=3)


@pytest.mark.parametrize("fusion", LATENT, ids=lambda fusion: fusion["type"])
def test_what_the_fusion_makes_of_other_modalities_moves_every_cell(fusion):
    model = full_model(model_with(fusion), seed=0).eval()
    batch = batch_of([random_boxes(1)], note=torch.tensor([[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]))
    with_note = model(batch, ["shapes"])["shapes"]
    batch.present["note"] = torch.tensor([False])
    without = model(batch, ["shapes"])["shapes"]
    assert ((with_note.heat - without.heat).abs().amax(1) > 1e-6).all()
    batch.inputs["note"] += 50
    torch.testing.assert_close(model(batch, ["shapes"])["shapes"].heat, without.heat, rtol=0, atol=0)


def test_what_stands_in_for_an_absent_image_has_no_influence_and_nothing_is_needed_there():
    model = full_model(model_with(LATENT[1]), seed=0).eval()
    batch = batch_of([random_boxes(1), random_boxes(2)], note=torch.randint(3, 259, (2, 12)))
    batch.present["scan"] = torch.tensor([True, False])
    before = model(batch, ["shapes"])["shapes"].heat
    batch.inputs["scan"][1] = torch.nan
    torch.testing.assert_close(model(batch, ["shapes"])["shapes"].heat, before, rtol=0, atol=0)
    no_scan = Batch({"note": batch.inputs["note"]}, {"note": batch.present["note"]}, batch.targets, batch.usable)
    torch.testing.assert_close(model(no_scan, ["shapes"])["shapes"].heat[1], before[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fusion", LATENT[:2], ids=lambda fusion: fusion["type"])
def test_the_same_image_is_read_differently_beside_different_notes(fusion):
    """What the note says, and the image does not, is learned."""
    model = full_model(model_with(fusion), seed=0).train()
    image = torch.zeros(2, 1, SIDE, SIDE)
    image[:, :, 8:32, 10:34] = 1
    box = (10 / SIDE, 8 / SIDE, 34 / SIDE, 32 / SIDE)
    batch = batch_of(
        [rows_of((0, *box)), rows_of((1, *box))], scan=image, note=torch.tensor([[70, 71, 72], [90, 91, 92]])
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(200):
        loss = model.losses(batch, ["shapes"])["shapes"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table = model.eval().heads["shapes"].predict(Encoding(model, batch))
    assert [json.loads(found)[0]["label"] for found in table["detections"]] == list(CLASSES)


def test_where_a_token_lies_matters():
    model = full_model(model_with(), seed=0).eval()
    straight, turned = (Encoding(model, batch_of([random_boxes(1)])) for _ in range(2))
    part = turned.parts["scan"]
    turned.parts["scan"] = replace(part, x=part.x.flip(1))  # their mean, all that the fusion takes of them, is the same
    head = model.heads["shapes"]
    assert (head(straight).heat - head(turned).heat).abs().max() > 1e-3


def wide_model() -> Model:
    document = model_with().model_dump(mode="json")
    document["modalities"]["scan"]["size"] = [SIDE, 2 * SIDE]
    return Model.model_validate(document)


def test_maps_that_show_the_true_boxes_of_a_wide_image_cost_nothing():
    head = full_model(wide_model(), seed=0).heads["shapes"]
    target = rows_of((1, 0.5, 0.25, 0.75, 0.75))  # of 96 × 48 pixels: x 48 to 72, y 12 to 36, centre in cell (7, 3)
    heat = torch.full((1, 2, 6, 12), -20.0)
    heat[0, 1, 3, 7] = 20.0
    corners = torch.tensor([48.0, 12, 72, 36]).expand(1, 72, 4)
    assert head.loss(Maps(heat, corners), batch_of([target])).item() == pytest.approx(0, abs=1e-4)


def test_the_map_covers_images_whose_sides_are_no_multiples_of_its_stride():
    document = model_with().model_dump(mode="json")
    document["modalities"]["scan"]["size"], document["encoders"]["scan"]["patch_size"] = [20, 36], 4
    model = full_model(Model.model_validate(document), seed=0)
    batch = batch_of([random_boxes(7)])
    batch.inputs["scan"] = batch.inputs["scan"][:, :, :20, :36]
    maps = model(batch, ["shapes"])["shapes"]
    assert maps.heat.shape == (1, 2, 3, 5)
    assert maps.corners.shape == (1, 15, 4)
    middles = (maps.corners[..., :2] + maps.corners[..., 2:]) / 2
    assert (middles[0, -1] - torch.tensor([36, 20])).abs().max() < 8
    assert model.losses(batch, ["shapes"])["shapes"].isfinite().all()


# What is found


def shapes_on_disk(folder: Path) -> Dataset:
    """Two wide images of squares and discs, the second one without any, at twice the size of the model's."""
    image = Image.new("L", (4 * SIDE, 2 * SIDE), 60)
    draw = ImageDraw.Draw(image)
    boxes = [
        ("SQ", 6, 8, 34, 36),
        ("SQ", 58, 50, 92, 84),
        ("DI", 50, 6, 86, 42),
        ("DI", 10, 60, 34, 84),
        ("SQ", 150, 20, 180, 50),
    ]
    for label, *corners in boxes:
        (draw.rectangle if label == "SQ" else draw.ellipse)([v - (i > 1) for i, v in enumerate(corners)], fill=220)
    image.save(folder / "shapes.png")
    described = site(folder, [cell(*boxes), "[]"])
    table = pd.read_csv(folder / "manifest.csv")
    table.assign(scan=["shapes.png", "scan-of-mary.png"]).to_csv(folder / "manifest.csv", index=False)
    return load_dataset(described, wide_model())


def predictions(model: MultimodalModel, data: Dataset) -> pd.DataFrame:
    with torch.inference_mode():
        return pd.DataFrame(model.eval().heads["shapes"].predict(Encoding(model, data.everything)))


def test_a_few_steps_find_the_squares_and_discs_of_an_image_and_nothing_in_an_empty_one(tmp_path):
    data, config = shapes_on_disk(tmp_path), model_with().heads["shapes"]
    model = full_model(wide_model(), seed=0).train()
    everyone = np.ones((1, 2))
    before = config.statistic("map50", predictions(model, data))(everyone)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(100):
        loss = model.losses(data.everything, ["shapes"])["shapes"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    table = predictions(model, data)
    assert before < 0.5
    assert config.statistic("map50", table)(everyone) > 0.9
    assert config.counts(table) == {"studies": 2, "square": 3, "disc": 2}
    assert not [box for box in json.loads(table["detections"][1]) if box["score"] > 0.3]


def test_a_table_of_the_true_boxes_as_detections_is_perfect_and_one_of_shifted_boxes_is_not():
    config = model_with().heads["shapes"]
    true = [{"label": "square", "xyxy": [0.1, 0.1, 0.3, 0.3]}, {"label": "disc", "xyxy": [0.5, 0.5, 1.0, 1.0]}]
    found = [box | {"score": 0.9} for box in true]
    table = pd.DataFrame({"boxes": [json.dumps(true), "[]"], "detections": [json.dumps(found), "[]"]})
    assert config.statistic("map", table)(np.ones((1, 2)))[0] == pytest.approx(1)
    found[0]["xyxy"] = [0.15, 0.1, 0.35, 0.3]  # IoU 0.15 / 0.25 = 0.6: right at 3 of COCO's 10 thresholds
    table["detections"] = [json.dumps(found), "[]"]
    assert config.statistic("map50", table)(np.ones((1, 2)))[0] == pytest.approx(1)
    assert config.statistic("map", table)(np.ones((1, 2)))[0] == pytest.approx((1 + 0.3) / 2, abs=0.06)
