"""Boxes: from a manifest's cell to fractions of an image, and back to text.

A cell holds a JSON list, `[{"label": "RBC", "xyxy": [x0, y0, x1, y1]}, ...]`, in pixels of the stored image, whose
left upper corner is (0, 0). Other keys than these two are left aside. An empty list says that nothing is there to find.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from pydantic import BaseModel, FiniteFloat, TypeAdapter, ValidationError
from torch import Tensor

from mmfm_core.config.modality import Axis
from mmfm_core.config.part import Repaired
from mmfm_core.config.site import Column
from mmfm_core.config.strict import Cell, did_you_mean
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.detection import Boxes, Detections

PADDING = -1.0
OVERHANG = 1.0
"""Pixels by which a box may reach over the border and is cut there: what rounding and counting from 1 explain."""


class _Stored(BaseModel):
    label: Cell
    xyxy: tuple[FiniteFloat, FiniteFloat, FiniteFloat, FiniteFloat]


_LIST = TypeAdapter(list[_Stored])


@dataclass(frozen=True)
class Box:
    """One true box: the index of its class, and x0, y0, x1, y1 in pixels of the stored image."""

    label: int
    corners: tuple[float, float, float, float]


def read_boxes(cell: str, classes: Sequence[str], values: Mapping[str, str]) -> list[Box]:
    """The boxes of a cell; `values` renames labels to `classes`.

    Raises:
        MmfmError: the cell is no such list, or has a label that is no class.
    """
    try:
        stored = _LIST.validate_json(cell)
    except ValidationError as error:
        raise MmfmError(
            'is no JSON list of boxes, [{"label": "...", "xyxy": [x0, y0, x1, y1]}, ...]; mend it'
        ) from error
    labels = [values.get(box.label, box.label) for box in stored]
    if any(label not in classes for label in labels):
        raise MmfmError(f"has a box whose label is none of {', '.join(classes)}; rename labels under 'values'")
    return [Box(classes.index(label), box.xyxy) for label, box in zip(labels, stored, strict=True)]


def read_column(table: Table, column: Column, field: str, classes: Sequence[str]) -> list[list[Box] | None]:
    """The boxes of each study of a manifest; None where the cell is empty.

    Raises:
        MmfmError: see `read_boxes`; or `values` name no class.
    """
    for label, name in column.values.items():
        if name not in classes:
            raise MmfmError(
                f"site '{table.site.name}': {field}.values.{label}: there is no class '{name}'; "
                f"{did_you_mean(name, classes)}"
            )
    # `values` speak of labels inside the cells, not of the cells.
    cells = table.cells(Column(column=column.column, missing=column.missing), field)
    studies: list[list[Box] | None] = []
    for index, cell in enumerate(cells):
        try:
            studies.append(None if cell is None else read_boxes(cell, classes, column.values))
        except MmfmError as error:
            raise table.error(index, f"column '{column.column}' {error}") from error
    return studies


def scaled(boxes: Sequence[Box], shape: Sequence[int], most: int) -> Tensor | Repaired:
    """Boxes as rows of class, x0, y0, x1, y1 in fractions of an image of `shape` (height, width); [most, 5].

    Rows beyond the last box are PADDING. A box that reaches over the border by up to OVERHANG is cut there: a repair.

    Raises:
        MmfmError: there are too many boxes, or one of them is outside the image, empty, or has its corners swapped.
    """
    if len(boxes) > most:
        raise MmfmError(f"has more boxes than the {most} of 'max_boxes'; raise it in the federation's document")
    rows = torch.full((most, 5), PADDING)
    limit, cut = np.array([shape[1], shape[0]] * 2, dtype=np.float64), False
    for row, box in enumerate(boxes):
        corners = np.array(box.corners)
        if (corners < -OVERHANG).any() or (corners > limit + OVERHANG).any():
            raise MmfmError("has a box outside its image; give boxes in pixels of the stored image")
        corners = np.clip(corners, 0, limit)
        cut |= not np.array_equal(corners, box.corners)
        if (corners[:2] >= corners[2:]).any():
            raise MmfmError("has a box without area; give boxes as x0, y0, x1, y1 with x0 < x1 and y0 < y1")
        rows[row] = torch.tensor([box.label, *corners / limit])
    return Repaired(rows, "boxes that reach over the image's border by a pixel were cut there") if cut else rows


def mirrored(rows: Tensor, axis: Axis) -> Tensor:
    """Rows [..., 5] of an image that is mirrored along an axis; padding stays."""
    low, high = {"x": (1, 3), "y": (2, 4)}[axis]
    turned = rows.clone()
    turned[..., low], turned[..., high] = 1 - rows[..., high], 1 - rows[..., low]
    return torch.where(rows[..., :1] == PADDING, rows, turned)


def as_text(labels: Tensor, corners: Tensor, classes: Sequence[str], scores: Tensor | None = None) -> str:
    """Boxes as the JSON of a manifest, in fractions of the image's width and height; with scores where given."""
    boxes: list[dict[str, object]] = [
        {"label": classes[label], "xyxy": [round(x, 4) for x in xyxy]}
        for label, xyxy in zip(labels.long().tolist(), corners.tolist(), strict=True)
    ]
    if scores is not None:
        boxes = [box | {"score": round(score, 5)} for box, score in zip(boxes, scores.tolist(), strict=True)]
    return json.dumps(boxes)


def true_boxes(text: str, classes: Sequence[str]) -> Boxes:
    """The boxes that `as_text` wrote."""
    boxes = json.loads(text)
    return Boxes(_corners(boxes), _labels(boxes, classes))


def detections(text: str, classes: Sequence[str]) -> Detections:
    """The boxes that `as_text` wrote with scores."""
    boxes = json.loads(text)
    return Detections(_corners(boxes), _labels(boxes, classes), np.array([box["score"] for box in boxes], np.float64))


def _corners(boxes: Sequence[Mapping[str, object]]) -> np.ndarray:
    return np.array([box["xyxy"] for box in boxes], np.float64).reshape(-1, 4)


def _labels(boxes: Sequence[Mapping[str, object]], classes: Sequence[str]) -> np.ndarray:
    return np.array([classes.index(str(box["label"])) for box in boxes], np.int64)
