"""Average precision of detections, as a statistic of study weights.

Ours, because the classes of monai and torchmetrics take no weights and would match all boxes again for each resample.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from mmfm_core.metrics.binary import Bools
from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, macro, quotient

AP50 = (0.5,)
COCO = tuple(np.linspace(0.5, 0.95, 10).tolist())
MAX_DETECTIONS = 100
RECALLS = np.linspace(0, 1, 101)


@dataclass(frozen=True)
class Boxes:
    """The boxes of one study: corners [B, 4] as x1, y1, x2, y2 in pixels and class numbers [B]."""

    corners: Floats
    labels: NDArray[np.int64]


@dataclass(frozen=True)
class Detections(Boxes):
    """Predicted boxes of one study, with their scores [B]: higher is surer."""

    scores: Floats


def average_precision(
    detections: Sequence[Detections], targets: Sequence[Boxes], thresholds: Sequence[float] = COCO
) -> Statistic:
    """Mean over classes and IoU thresholds of the area under the precision-recall curve.

    By COCO's rules: the `MAX_DETECTIONS` surest of each study and class, each matched to the free true box it overlaps
    most, surest first; precision interpolated at 101 recalls. A class counts where it has a true box of any weight.

    Args:
        detections: N studies.
        targets: their true boxes, in the same order.
        thresholds: the IoU from which a box is found: `AP50`, or `COCO` for mAP over 0.5 to 0.95.

    Source: Lin et al., Microsoft COCO, ECCV 2014, and cocoeval.py of its API.
    """
    labels = np.unique(np.concatenate([np.zeros(0, np.int64), *(study.labels for study in targets)]))
    return macro([_of_class(detections, targets, int(label), thresholds) for label in labels])


def iou(boxes: Floats, others: Floats) -> Floats:
    """Intersection over union [A, B] of corner boxes [A, 4] and [B, 4]; 0 with a box of no area.

    Ours, because monai refuses, and torchvision counts negative, the inverted boxes that an untrained model predicts.
    """
    low = np.maximum(boxes[:, None, :2], others[None, :, :2])
    high = np.minimum(boxes[:, None, 2:], others[None, :, 2:])
    shared = np.prod(np.clip(high - low, 0, None), axis=2)
    areas = [np.prod(np.clip(each[:, 2:] - each[:, :2], 0, None), axis=1) for each in (boxes, others)]
    return np.nan_to_num(quotient(shared, areas[0][:, None] + areas[1][None, :] - shared))


def matches(overlaps: Floats, threshold: float) -> Bools:
    """Which detections [D] find a true box, from IoU [D, G]: in order of the rows, each box found once."""
    free = overlaps.copy()
    found = np.zeros(len(overlaps), dtype=bool)
    for row in np.flatnonzero((overlaps >= threshold).any(1)):
        best = len(free[row]) - 1 - int(np.argmax(free[row, ::-1]))  # the last of equals, as COCO has it
        found[row] = free[row, best] >= threshold
        if found[row]:
            free[:, best] = -1
    return found


def _of_class(
    detections: Sequence[Detections], targets: Sequence[Boxes], label: int, thresholds: Sequence[float]
) -> Statistic:
    """AP of one class, mean over thresholds."""
    scores, studies, found = [], [], []
    for study, (predicted, true) in enumerate(zip(detections, targets, strict=True)):
        order = np.flatnonzero(predicted.labels == label)
        order = order[np.argsort(-predicted.scores[order], kind="stable")][:MAX_DETECTIONS]
        overlaps = iou(predicted.corners[order], true.corners[true.labels == label])
        scores.append(predicted.scores[order])
        studies.append(np.full(len(order), study))
        found.append(np.array([matches(overlaps, threshold) for threshold in thresholds]))
    surest = np.argsort(-np.concatenate(scores), kind="stable")
    study_of, found_at = np.concatenate(studies)[surest], np.concatenate(found, axis=1)[:, surest]
    boxes = np.array([np.count_nonzero(true.labels == label) for true in targets], dtype=np.float64)
    return macro([_area(study_of, right, boxes) for right in found_at])


def _area(study_of: NDArray[np.int64], right: Bools, boxes: Floats) -> Statistic:
    """Area under the curve: detections [D] surest first, their study and whether right; true boxes [N] per study."""

    def statistic(weights: Floats) -> Floats:
        weight = weights[:, study_of]
        true, total = (weight * right).cumsum(1), weights @ boxes
        precision = np.nan_to_num(quotient(true, weight.cumsum(1)))
        envelope = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
        # A recall that is never reached has the precision 0.
        envelope = np.pad(envelope, ((0, 0), (0, 1)))
        recall = quotient(true, np.broadcast_to(total[:, None], true.shape))
        reached = [np.searchsorted(row, RECALLS) for row in recall]
        areas: Floats = np.array([row[at].mean() for row, at in zip(envelope, reached, strict=True)])
        return np.where(total > 0, areas, np.nan)

    return statistic
