"""Average precision, against monai's COCO metric and against studies written out as often as they weigh."""

from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmfm_core.metrics.detection import AP50, COCO, Boxes, Detections, average_precision, iou, matches
from mmfm_core.models import _torchvision_ops  # noqa: F401

from monai.apps.detection.metrics.coco import COCOMetric  # isort: skip
from monai.apps.detection.metrics.matching import matching_batch  # isort: skip
from monai.data.box_utils import box_iou  # isort: skip

CLASSES = 3


def random_corners(rng, count):
    low = rng.uniform(0, 80, (count, 2))
    return np.hstack([low, low + rng.uniform(5, 40, (count, 2))])


def random_studies(rng, studies, boxes=4):
    """True boxes, and detections that are those boxes moved (some twice, some of a wrong class) and boxes at random."""
    detections, targets = [], []
    for _ in range(studies):
        count = int(rng.integers(0, boxes + 1))
        corners, labels = random_corners(rng, count), rng.integers(0, CLASSES, count)
        again = rng.integers(0, count, int(rng.integers(0, 2 * count + 1))) if count else np.zeros(0, int)
        spurious = int(rng.integers(0, 4))
        moved = corners[again] + rng.uniform(-2, 2, (len(again), 4))  # monai refuses inverted boxes
        renamed = np.where(rng.random(len(again)) < 0.15, rng.integers(0, CLASSES, len(again)), labels[again])
        found = np.vstack([moved, random_corners(rng, spurious)])
        classes = np.concatenate([renamed, rng.integers(0, CLASSES, spurious)])
        detections.append(Detections(found, classes, rng.random(len(found))))
        targets.append(Boxes(corners, labels))
    return detections, targets


def by_monai(detections, targets, labels):
    # To monai a class without true boxes is -1, which COCO leaves out, so it is asked class by class.
    metric = COCOMetric([str(i) for i in range(CLASSES)], (0.5,), (0.5, 0.95, 0.05), (100,), verbose=False)
    matched = matching_batch(
        box_iou,
        metric.iou_thresholds,
        [study.corners for study in detections],
        [study.labels for study in detections],
        [study.scores for study in detections],
        [study.corners for study in targets],
        [study.labels for study in targets],
    )
    results, _ = metric(matched)
    ap50 = np.mean([results[f"{label}_AP_IoU_0.50_MaxDet_100"] for label in labels])
    coco = np.mean([results[f"{label}_mAP_IoU_0.50_0.95_0.05_MaxDet_100"] for label in labels])
    return ap50, coco


def boxes_of(targets, label):
    return sum(int((study.labels == label).sum()) for study in targets)


def drop_until_coprime(targets):
    """monai counts recall in single precision: k boxes of n land beside j / 100 unless n shares no factor with 100."""
    kept = [Boxes(study.corners.copy(), study.labels.copy()) for study in targets]
    for label in range(CLASSES):
        while boxes_of(kept, label) and gcd(boxes_of(kept, label), 100) > 1:
            study = next(i for i, each in enumerate(kept) if (each.labels == label).any())
            rest = np.delete(np.arange(len(kept[study].labels)), np.flatnonzero(kept[study].labels == label)[0])
            kept[study] = Boxes(kept[study].corners[rest], kept[study].labels[rest])
    return kept


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_average_precision_is_that_of_monai(seed):
    rng = np.random.default_rng(seed)
    detections, targets = random_studies(rng, studies=8)
    targets = drop_until_coprime(targets)
    labels = [label for label in range(CLASSES) if boxes_of(targets, label)]
    ones = np.ones((1, 8))
    if not labels:
        assert np.isnan(average_precision(detections, targets)(ones)).all()
        return
    ap50, coco = by_monai(detections, targets, labels)
    assert average_precision(detections, targets, AP50)(ones)[0] == pytest.approx(ap50, abs=1e-6)
    assert average_precision(detections, targets, COCO)(ones)[0] == pytest.approx(coco, abs=1e-6)


def test_only_the_hundred_surest_of_a_study_and_class_count():
    rng = np.random.default_rng(0)
    corners = random_corners(rng, 7)
    # 120 of one class, right at 99, 100 and 101; another class does not use up the hundred.
    elsewhere = random_corners(rng, 117) + 200
    found = np.vstack([elsewhere[:98], corners[:3], elsewhere[98:], corners[3:]])
    classes = np.concatenate([np.zeros(120, int), np.ones(4, int)])
    detections = [Detections(found, classes, np.linspace(0.9, 0.1, 124))]
    targets = [Boxes(corners, np.array([0, 0, 0, 1, 1, 1, 1]))]
    value = average_precision(detections, targets, AP50)(np.ones((1, 1)))[0]
    reached = 67 * 2 / 100 / 101  # recalls 0 to 0.66, where 2 of 100 are right at best
    assert value == pytest.approx((reached + 1) / 2)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_weight_counts_a_study_that_many_times(seed):
    rng = np.random.default_rng(seed)
    detections, targets = random_studies(rng, studies=6)
    weights = rng.integers(0, 4, (4, 6))
    found = average_precision(detections, targets)(weights.astype(float))
    for row, value in zip(weights, found, strict=True):
        again = np.repeat(np.arange(6), row)
        written_out = average_precision([detections[i] for i in again], [targets[i] for i in again])
        expected = written_out(np.ones((1, len(again))))[0]
        assert value == pytest.approx(expected, abs=1e-12, nan_ok=True)


def test_iou_counts_pixels_of_whole_boxes():
    rng = np.random.default_rng(0)
    low = rng.integers(0, 12, (20, 2))
    boxes = np.hstack([low, low + rng.integers(1, 8, (20, 2))])
    grid = np.zeros((20, 20, 20), dtype=bool)
    for mask, (x1, y1, x2, y2) in zip(grid, boxes, strict=True):
        mask[y1:y2, x1:x2] = True
    shared, either = (grid[:, None] & grid[None]).sum((2, 3)), (grid[:, None] | grid[None]).sum((2, 3))
    np.testing.assert_allclose(iou(boxes.astype(float), boxes.astype(float)), shared / either)


@pytest.mark.filterwarnings("error")
def test_boxes_without_area_find_nothing():
    whole, inverted, point = [0, 0, 9, 9], [5, 5, 2, 2], [3, 3, 3, 3]
    boxes = np.array([whole, inverted, point], dtype=float)
    np.testing.assert_array_equal(iou(boxes, boxes), [[1, 0, 0], [0, 0, 0], [0, 0, 0]])


def test_a_true_box_is_found_once_by_the_surest():
    overlaps = np.array([[0.6, 0.7], [0.2, 0.9], [0.55, 0.1], [0.8, 0.8]])
    np.testing.assert_array_equal(matches(overlaps, 0.5), [True, False, True, False])
    np.testing.assert_array_equal(matches(overlaps, 0.65), [True, False, False, True])
    # Of boxes that overlap alike, COCO gives away the last, which leaves the first to the next detection.
    np.testing.assert_array_equal(matches(np.array([[0.6, 0.6], [0.7, 0.0]]), 0.5), [True, True])
    assert matches(np.zeros((3, 0)), 0.5).tolist() == [False] * 3
    assert matches(np.zeros((0, 3)), 0.5).shape == (0,)


@pytest.mark.filterwarnings("error")
def test_what_is_missed_is_zero_and_what_is_nowhere_is_undefined():
    nothing = Detections(np.zeros((0, 4)), np.zeros(0, int), np.zeros(0))
    one = Boxes(np.array([[0.0, 0, 5, 5]]), np.array([1]))
    empty = Boxes(np.zeros((0, 4)), np.zeros(0, int))
    weights = np.array([[1.0, 1], [0, 1]])
    np.testing.assert_array_equal(average_precision([nothing, nothing], [one, empty])(weights), [0, np.nan])
    np.testing.assert_array_equal(average_precision([nothing] * 2, [empty] * 2)(weights), [np.nan, np.nan])
