"""Segmentation: a class for every pixel of an image, or voxel of a volume."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import pandas as pd
import torch
from pydantic import Field, PositiveInt
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config.modality import Axis
from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Column
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Choices, did_you_mean
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.table import Table, as_number
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.overlap import dice, hausdorff95, over_classes
from mmfm_core.metrics.statistic import Statistic
from mmfm_core.models import _torchvision_ops  # noqa: F401  (monai imports torchvision)
from mmfm_core.models.dense import WIDTH, DenseDecoder, check_dense, drawing, mirrored, moved_map, pixels_of, read_map
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer

from monai.losses import DiceLoss  # isort: skip

UNLABELLED = -1
NONZERO = "nonzero"


@dataclass(frozen=True)
class Mask:
    """A study's mask, and the site's words for the label ids in it."""

    path: Path
    mapping: Column


class Segmentation(HeadConfig):
    """One class per pixel. The site maps a column of mask files to the head's name under `targets`.

    The mapping's `values` rename label ids of the files to classes; the id 'nonzero' stands for every id but 0 (masks
    that number their objects). Without `values`, ids count the classes.

    Attributes:
        classes: the background first.
        width: channels of the decoder at full resolution.
        prior: the share of pixels that are none of the background, before any training, as in RetinaNet (Lin et al.
            2017). Where that is small, no step is spent on learning it, and none ends at an empty map.
        tokens: whether encoders have a part in the map, beside the images that it is drawn from. Where a few patients
            train, they learn by heart where these had their lesions; a map can be drawn without, by a U-Net.
    """

    METRICS = ("dice", "hd95")
    LOWER_IS_BETTER = ("hd95",)

    type: Literal["segmentation"]
    classes: Choices
    width: PositiveInt = WIDTH
    prior: float | None = Field(default=None, gt=0, lt=1)
    tokens: bool = True

    @property
    def labels(self) -> tuple[str, ...]:
        """Masks are counted, not the classes in them: that would mean reading them all."""
        return ("masks",)

    def check(self, model: Model) -> None:
        """Check that its encoders can draw a map."""
        check_dense(model, self)

    def held(self, model: Model, encoders: Collection[str], has_targets: bool) -> bool:
        """Only a site that has an image to draw on."""
        return has_targets and not set(drawing(model, self)).isdisjoint(encoders)

    def usable(self, model: Model, present: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """Studies with a mask, and an image to draw it on."""
        return labelled & torch.stack([present[name] for name in drawing(model, self) if name in present]).any(0)

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[Mask | None]:
        """The file of each study's mask."""
        if not isinstance(mapping, Column):
            raise MmfmError(f"site '{table.site.name}': {field}: a mask is mapped by 'column: NAME'")
        for label, name in mapping.values.items():
            where = f"site '{table.site.name}': {field}.values.{label}"
            if label != NONZERO and as_number(label) is None:
                raise MmfmError(f"{where}: a label id is a whole number, or '{NONZERO}' for all but 0")
            if name not in self.classes:
                raise MmfmError(f"{where}: there is no class '{name}'; {did_you_mean(name, self.classes)}")
        # `values` speak of what is in the files, not of the cells that name them.
        paths = table.paths(Column(column=mapping.column, missing=mapping.missing), field)
        return [None if path is None else Mask(path, mapping) for path in paths]

    def count(self, target: Any) -> Mapping[str, int]:
        """One mask."""
        return {"masks": 1}

    def unlabelled(self, model: Model) -> Tensor:
        """A map of no class, int16 [*size]."""
        return torch.full(pixels_of(model, drawing(model, self)[0]).size, UNLABELLED, dtype=torch.int16)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor:
        """The class of each pixel, int16 [*size], nearest neighbour at the pixels of the images.

        Raises:
            MmfmError: see `read_map`; or a label id beyond the classes.
        """
        mask: Mask = study.targets[name]
        modalities = [m for encoder in drawing(model, self) for m in model.encoders[encoder].inputs(encoder)]
        ids = read_map(mask.path, study, model, modalities)
        classes = self._classes(ids, mask.mapping.values)
        if ((classes < 0) | (classes >= len(self.classes))).any():
            hint = "add it under 'values'" if mask.mapping.values else "rename the file's ids under 'values'"
            raise MmfmError(f"has a label id that is none of the {len(self.classes)} classes; {hint}")
        return classes.to(torch.int16)

    def _classes(self, ids: Tensor, values: Mapping[str, str]) -> Tensor:
        if not values:
            return ids
        rest = self.classes.index(values[NONZERO]) if NONZERO in values else UNLABELLED
        classes = torch.where(ids == 0, 0 if NONZERO in values else UNLABELLED, rest)
        for label, name in values.items():
            if label != NONZERO:
                classes[ids == int(float(label))] = self.classes.index(name)
        return classes

    def mirrored(self, targets: Tensor, model: Model, axis: Axis) -> Tensor:
        """The maps, mirrored with their images."""
        return mirrored(targets, model, self, axis)

    def moved(self, targets: Tensor, model: Model, drawn: Tensor) -> Tensor:
        """The maps, moved with their images."""
        return moved_map(targets, model, self, drawn)

    def build(self, model: Model, name: str, artifacts: Path) -> "SegmentationHead":
        """The head, with random weights."""
        return SegmentationHead(name, model, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic:
        """Mean over foreground classes of the mean over studies; see `mmfm_core.metrics.overlap`."""
        return over_classes(table[[f"{metric}_{name}" for name in self.classes[1:]]].to_numpy(float))

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """Studies in whose mask each foreground class occurs."""
        return {"studies": len(table)} | {n: int((table[f"voxels_{n}"] > 0).sum()) for n in self.classes[1:]}


class SegmentationHead(Head):
    """A decoder to one logit per class and pixel."""

    def __init__(self, name: str, model: Model, config: Segmentation) -> None:
        super().__init__()
        self.name, self.classes = name, config.classes
        self.spacing = getattr(pixels_of(model, drawing(model, config)[0]), "spacing", None)
        self.decoder = DenseDecoder(model, config, len(config.classes), config.width, config.tokens)
        if config.prior is not None:
            foreground = config.prior / (len(config.classes) - 1)
            start = torch.tensor([1 - config.prior, *[foreground] * (len(config.classes) - 1)]).log()
            self.decoder.starts_at(start)
        self.dice = DiceLoss(include_background=False, to_onehot_y=True, softmax=True, reduction="none")

    def forward(self, encoding: Encoding) -> Tensor:
        """Logits [B, classes, *size]."""
        logits: Tensor = self.decoder(encoding)
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Soft Dice of the foreground plus cross-entropy, each within a study, [B]; zero where it has no mask.

        Isensee et al. 2021 (nnU-Net). Not monai's DiceCELoss: unreduced it adds [B, C, 1, 1] to [B, *size].
        """
        target = batch.targets[self.name].long()
        labelled = target.flatten(1).amin(1) >= 0
        target = target.clamp(min=0)
        overlap = self.dice(outputs, target[:, None]).flatten(1).mean(1)
        entropy = F.cross_entropy(outputs, target, reduction="none").flatten(1).mean(1)
        return torch.where(labelled, overlap + entropy, 0.0)

    def predict(self, encoding: Encoding) -> dict[str, list[float]]:
        """Dice, 95 % Hausdorff distance (mm where the modality has a spacing, else pixels) and size of each class.

        All at the model's resolution. The maps themselves are not kept.
        """
        found, truth = self(encoding).argmax(1).cpu(), encoding.batch.targets[self.name].long().cpu()
        number, spacings = len(self.classes), [self.spacing] * len(truth) if self.spacing else None
        overlap, distance = dice(found, truth, number), hausdorff95(found, truth, number, spacings)
        columns: dict[str, list[float]] = {}
        for index, name in enumerate(self.classes[1:]):
            columns[f"dice_{name}"] = overlap[:, index].tolist()
            columns[f"hd95_{name}"] = distance[:, index].tolist()
            columns[f"voxels_{name}"] = (truth == index + 1).flatten(1).sum(1).tolist()
        return columns
