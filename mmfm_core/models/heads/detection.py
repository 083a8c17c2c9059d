"""Detection: where the objects of an image are, and what they are."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, cast

import pandas as pd
import torch
from pydantic import Field, PositiveInt
from torch import Tensor

from mmfm_core.config.modality import Axis
from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig, Repaired
from mmfm_core.config.site import Column
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Cell, Name, did_you_mean
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.readers.sources import read_pixels
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.detection import AP50, COCO, MAX_DETECTIONS, average_precision
from mmfm_core.metrics.statistic import Statistic
from mmfm_core.models import boxes as box
from mmfm_core.models.augmentation import moves_of
from mmfm_core.models.centres import box_loss, closeness_of, heat_loss, peaks
from mmfm_core.models.pyramid import STRIDE, FeatureMap, branch
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer


class Detection(HeadConfig):
    """Boxes with classes in one 2D image. The site maps a column of boxes to the head's name under `targets`.

    The mapping's `values` rename the labels inside the boxes; see `mmfm_core.models.boxes` for a cell's form. An empty
    list is a labelled study with nothing to find; an empty cell is an unlabelled study.

    Attributes:
        image: the encoder in whose image the boxes lie; needed only where the head sees several encoders of 2D images.
        max_boxes: the most boxes that a study may have.
        width: channels of the map that boxes are read from.
    """

    METRICS = ("map50", "map")
    PER_STUDY = False

    type: Literal["detection"]
    classes: Annotated[tuple[Cell, ...], Field(min_length=1)]
    image: Name | None = None
    max_boxes: PositiveInt = 100
    width: int = Field(default=64, multiple_of=32, gt=0)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes."""
        return self.classes

    def within(self, model: Model) -> str:
        """The encoder in whose image the boxes lie."""
        return self.image or self._images(model)[0]

    def check(self, model: Model) -> None:
        """Check that the classes differ, and that one encoder of 2D images is meant."""
        for name in self.classes:
            if self.classes.count(name) > 1:
                raise ValueError(f"classes: '{name}' is named twice")
        images = self._images(model)
        if not images:
            raise ValueError("encoders: none of them reads 2D images, in which boxes could lie")
        if self.image is None and len(images) > 1:
            raise ValueError(f"image: say in which image the boxes lie: {' or '.join(images)}")
        if self.image is not None and self.image not in images:
            raise ValueError(
                f"image: '{self.image}' is no encoder of 2D images here; {did_you_mean(self.image, images)}"
            )
        if moves_of(model, [self.within(model)]).moves:
            raise ValueError(
                "encoders: boxes are mirrored with their image, but not turned, scaled or shifted; leave "
                "'rotate', 'scale' and 'shift' out of its 'augment'"
            )

    def held(self, model: Model, encoders: Collection[str], has_targets: bool) -> bool:
        """Only a site that can read the image."""
        return has_targets and self.within(model) in encoders

    def usable(self, model: Model, present: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """Studies with boxes, be it none, and the image that they lie in."""
        return labelled & present.get(self.within(model), torch.zeros_like(labelled))

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[list[box.Box] | None]:
        """The boxes of each study, in pixels of the stored image."""
        if not isinstance(mapping, Column):
            raise MmfmError(f"site '{table.site.name}': {field}: boxes are mapped by 'column: NAME'")
        return box.read_column(table, mapping, field, self.classes)

    def count(self, target: Any) -> Mapping[str, int]:
        """How many boxes there are of each class."""
        return {name: sum(b.label == index for b in target) for index, name in enumerate(self.classes)}

    def unlabelled(self, model: Model) -> Tensor:
        """Padding alone, [max_boxes, 5]."""
        return torch.full((self.max_boxes, 5), box.PADDING)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor | Repaired:
        """Class, x0, y0, x1, y1 of each box in fractions of the image, and padding, [max_boxes, 5].

        Raises:
            MmfmError: see `mmfm_core.models.boxes.scaled`; or stacked images differ in size.
        """
        encoder = self.within(model)
        paths = [study.inputs[m] for m in model.encoders[encoder].inputs(encoder) if m in study.inputs]
        shapes = {read_pixels(cast(Path, path))[0].shape[:2] for path in paths}
        if len(shapes) > 1:
            raise MmfmError("lies in images that differ in size; save the images that are stacked on one grid")
        # Without its image a study cannot serve the head, and nothing says how large the image was.
        return box.scaled(study.targets[name], shapes.pop(), self.max_boxes) if shapes else self.unlabelled(model)

    def mirrored(self, targets: Tensor, model: Model, axis: Axis) -> Tensor:
        """The boxes, mirrored with their image."""
        return box.mirrored(targets, axis) if axis in moves_of(model, [self.within(model)]).mirror else targets

    def build(self, model: Model, name: str, artifacts: Path) -> "DetectionHead":
        """The head, with random weights."""
        return DetectionHead(name, model, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic:
        """Average precision at an IoU of 0.5, or over 0.5 to 0.95; see `mmfm_core.metrics.detection`."""
        found = [box.detections(text, self.classes) for text in table["detections"]]
        true = [box.true_boxes(text, self.classes) for text in table["boxes"]]
        return average_precision(found, true, AP50 if metric == "map50" else COCO)

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """Studies, and true boxes of each class."""
        labels = [box.true_boxes(text, self.classes).labels for text in table["boxes"]]
        boxes = {name: sum(int((each == index).sum()) for each in labels) for index, name in enumerate(self.classes)}
        return {"studies": len(table)} | boxes

    def _images(self, model: Model) -> list[str]:
        return [
            name
            for name in self.sees(model)
            if all(model.modalities[m].kind == "image2d" for m in model.encoders[name].inputs(name))
        ]


class Maps(NamedTuple):
    """What the head draws: logits of each class [B, C, H, W], and a box around every cell [B, H * W, 4] in pixels."""

    heat: Tensor
    corners: Tensor


class DetectionHead(Head):
    """Objects as points (CenterNet, Zhou et al. 2019): a map of centres for each class, and a box at every cell.

    A dense head learns from every cell of every image, and so from a few hundred images; DETR's queries take thousands
    of steps. Its peaks need no non-maximum suppression, which torchvision lacks beside a CPU build of torch; and a
    study's loss has one shape whatever the number of its boxes, so that gradients per study are exact.
    """

    cells: Tensor
    size: Tensor

    def __init__(self, name: str, model: Model, config: Detection) -> None:
        super().__init__()
        self.name, self.classes = name, config.classes
        self.map = FeatureMap(model, config.within(model), config.encoders, config.width)
        self.heat = branch(config.width, len(config.classes), bias=-4.6)  # a first guess of 1 % (Lin et al. 2017)
        self.sides = branch(config.width, 4, bias=0.7)  # exp(0.7) cells from the centre to each side
        rows, columns = torch.meshgrid(*(torch.arange(n) + 0.5 for n in self.map.grid), indexing="ij")
        self.register_buffer("cells", torch.stack([columns, rows], -1).flatten(0, 1) * STRIDE, persistent=False)
        self.register_buffer("size", torch.tensor([*self.map.size[::-1]] * 2), persistent=False)

    def forward(self, encoding: Encoding) -> Maps:
        """See `Maps`."""
        features = self.map(encoding)
        sides = self.sides(features).flatten(2).transpose(1, 2).clamp(max=6).exp() * STRIDE  # finite after any step
        corners = torch.cat([self.cells - sides[..., :2], self.cells + sides[..., 2:]], -1)
        return Maps(self.heat(features), corners)

    def loss(self, outputs: Maps, batch: Batch) -> Tensor:
        """Focal loss of centres plus generalised IoU of boxes, each divided by the study's own number of boxes, [B]."""
        target = batch.targets[self.name]
        target = target[:, : max(1, int((target[..., 0] >= 0).sum(1).max()))]
        labels, corners = target[..., 0], target[..., 1:] * self.size
        closeness = closeness_of(self.cells, corners, labels >= 0, STRIDE)
        number = (labels >= 0).sum(1).clamp(min=1)
        heat = heat_loss(outputs.heat.flatten(2), closeness, labels)
        return (heat + 5 * box_loss(outputs.corners, closeness, corners)) / number  # 5: TTFNet's weight

    def predict(self, encoding: Encoding) -> dict[str, list[str]]:
        """True boxes and detections of each study as JSON, in fractions of the image."""
        maps, target = self(encoding), encoding.batch.targets[self.name]
        detections = []
        for heat, corners in zip(maps.heat, maps.corners, strict=True):
            labels, cells, scores = peaks(heat, MAX_DETECTIONS)
            found = (corners[cells] / self.size).clamp(0, 1)
            detections.append(box.as_text(labels, found, self.classes, scores))
        true = [rows[rows[:, 0] >= 0] for rows in target]
        return {
            "boxes": [box.as_text(rows[:, 0], rows[:, 1:], self.classes) for rows in true],
            "detections": detections,
        }
