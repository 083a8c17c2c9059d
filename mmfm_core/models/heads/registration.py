"""Registration: a displacement field that brings a moving image onto a fixed one."""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pandas as pd
import torch
from pydantic import NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor, nn

from mmfm_core.config.modality import Axis
from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Columns
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Name, did_you_mean
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.deformation import folding, jacobian_determinant, warped_dice
from mmfm_core.metrics.statistic import Statistic, mean_of
from mmfm_core.models.dense import WIDTH, DenseDecoder, check_dense, drawing, mirrored, moved_map, pixels_of, read_map
from mmfm_core.models.displacement import (
    Displacement,
    Motion,
    bending_energy,
    curve_error,
    halved,
    linear_warp,
    refined,
    unit,
)
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer

from monai.losses import (  # isort: skip  (after the import that makes torchvision importable)
    DiceLoss,
    GlobalMutualInformationLoss,
    LocalNormalizedCrossCorrelationLoss,
)

UNLABELLED = -1


class Registration(HeadConfig):
    """A moving image brought onto a fixed one. It learns from the images alone; label maps serve to measure it.

    The site may map columns of label maps to it: `columns: {moving: ..., fixed: ...}`. A pair is measured by them where
    it has both.

    Attributes:
        moving, fixed: the two modalities, which one encoder stacks as `channels: [moving, fixed]`.
        similarity: 'ncc' (squared, in windows of 9) within a contrast; 'mi' (mutual information) across contrasts.
        smoothness: weight of the field's bending energy, which leaves affine maps free (Rueckert et al. 1999).
        transform: 'affine', or 'dense' for a field before an affine map.
        diffeomorphic: whether the field is integrated from a velocity, and so hardly folds.
        refine: steps of descent on each pair's own images when it is predicted; see `refined`.
        structures: label ids 1 to `structures` of the label maps, which 0 fills up.
        landmarks: whether they are points or curves, measured by distance and not by overlap alone.
        supervision: weight in training of the soft Dice of the warped label maps, where a pair has them.
        width: channels of the decoder at full resolution.
    """

    METRICS = ("dice", "dice_before", "tre", "tre_before", "folding", "similarity", "similarity_before")
    LOWER_IS_BETTER = ("tre", "tre_before", "folding")

    type: Literal["registration"]
    moving: Name
    fixed: Name
    similarity: Literal["ncc", "mi"] = "ncc"
    smoothness: NonNegativeFloat = 1.0
    transform: Literal["affine", "dense"] = "dense"
    diffeomorphic: bool = True
    refine: NonNegativeInt = 0
    structures: NonNegativeInt = 0
    landmarks: bool = False
    supervision: NonNegativeFloat = 0.0
    width: PositiveInt = WIDTH

    @property
    def labels(self) -> tuple[str, ...]:
        """Pairs with label maps are counted."""
        return ("label maps",)

    @property
    def pair(self) -> tuple[str, str]:
        """The two modalities."""
        return self.moving, self.fixed

    def check(self, model: Model) -> None:
        """Check that one encoder stacks the pair, and that no study lacks either image of it."""
        for field, name in zip(("moving", "fixed"), self.pair, strict=True):
            if name not in model.modalities:
                raise ValueError(f"{field}: there is no modality '{name}'; {did_you_mean(name, model.modalities)}")
            if model.modalities[name].optional:
                raise ValueError(f"{field}: '{name}' cannot be optional; a pair has two images")
        if not any(set(self.pair) <= set(model.encoders[e].inputs(e)) for e in self.sees(model)):
            raise ValueError(f"moving: no encoder stacks the pair; give one 'channels: [{self.moving}, {self.fixed}]'")
        if self.moving == self.fixed:
            raise ValueError("fixed: is the moving image too; name another modality")
        if self.supervision and not self.structures:
            raise ValueError("supervision: needs 'structures', the number of label ids in the label maps")
        check_dense(model, self)

    def held(self, model: Model, encoders: Collection[str], has_targets: bool) -> bool:
        """Every site with pairs; label maps are not needed."""
        return set(drawing(model, self)) <= set(encoders)

    def usable(self, model: Model, present: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """All studies whose pair is there."""
        return torch.stack([present[name] for name in drawing(model, self) if name in present]).all(0)

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[tuple[Path, Path] | None]:
        """The files of each pair's label maps, the moving one's first."""
        if not isinstance(mapping, Columns) or set(mapping.columns) != {"moving", "fixed"}:
            wanted = "'columns: {moving: NAME, fixed: NAME}'"
            raise MmfmError(f"site '{table.site.name}': {field}: label maps of a pair are mapped by {wanted}")
        moving, fixed = (table.paths(mapping.columns[n], f"{field}.columns.{n}") for n in ("moving", "fixed"))
        return [None if a is None or b is None else (a, b) for a, b in zip(moving, fixed, strict=True)]

    def count(self, target: Any) -> Mapping[str, int]:
        """One pair of them."""
        return {"label maps": 1}

    def unlabelled(self, model: Model) -> Tensor:
        """Two maps of no label, int16 [2, *size]."""
        return torch.full((2, *pixels_of(model, drawing(model, self)[0]).size), UNLABELLED, dtype=torch.int16)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor:
        """The label maps of the moving and the fixed image, int16 [2, *size].

        Raises:
            MmfmError: see `read_map`; or a label id beyond `structures`.
        """
        maps = [read_map(p, study, model, [m]) for p, m in zip(study.targets[name], self.pair, strict=True)]
        labels = torch.stack(maps)
        if ((labels < 0) | (labels > self.structures)).any():
            raise MmfmError(f"has a label id beyond the {self.structures} 'structures' that the document declares")
        return labels.to(torch.int16)

    def mirrored(self, targets: Tensor, model: Model, axis: Axis) -> Tensor:
        """The maps, mirrored with their images."""
        return mirrored(targets, model, self, axis)

    def moved(self, targets: Tensor, model: Model, drawn: Tensor) -> Tensor:
        """The maps, moved with their images."""
        return moved_map(targets, model, self, drawn)

    def build(self, model: Model, name: str, artifacts: Path) -> "RegistrationHead":
        """The head; it starts from the identity."""
        return RegistrationHead(name, model, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic:
        """Mean over pairs of what `RegistrationHead.predict` measured of each."""
        return mean_of(table[metric].to_numpy(float))

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """Pairs, and those with label maps."""
        return {"studies": len(table), "label maps": int(table["dice"].notna().sum())}


class RegistrationHead(Head):
    """A velocity for each pixel from the decoder, and an affine map from the pooled state."""

    def __init__(self, name: str, model: Model, config: Registration) -> None:
        super().__init__()
        self.name, self.config = name, config
        form = pixels_of(model, drawing(model, config)[0])
        dimensions = len(form.size)
        self.size, self.spacing = form.size, getattr(form, "spacing", None) or [1.0] * dimensions
        self.affine = zeroed(nn.Linear(model.dim, dimensions * (dimensions + 1)))
        if config.transform == "dense":
            self.decoder = DenseDecoder(model, config, dimensions, config.width)
            zeroed(self.decoder.out.conv.conv)
        self.displacement, self.warp = Displacement(config.diffeomorphic), linear_warp()
        self.overlap = DiceLoss(include_background=False, reduction="none")
        self.similarity = (
            # In windows of one grey the quotient is of rounding errors, which this denominator silences.
            LocalNormalizedCrossCorrelationLoss(dimensions, kernel_size=9, reduction="none", smooth_dr=1e-3)
            if config.similarity == "ncc"
            else GlobalMutualInformationLoss(reduction="none")
        )

    def forward(self, encoding: Encoding) -> Motion:
        """The transform of each pair."""
        pooled = encoding.fused(self.config.encoders).pooled
        dimensions = len(self.size)
        # Coordinates run over [-1, 1]; a tenth keeps early steps of an affine map small beside those of the field.
        affine = 0.1 * self.affine(pooled).reshape(-1, dimensions, dimensions + 1)
        return Motion(affine, halved(self.decoder(encoding)) if self.config.transform == "dense" else None)

    def loss(self, outputs: Motion, batch: Batch) -> Tensor:
        """Dissimilarity after warping, roughness, and supervision where asked, of each pair, [B]."""
        return self.cost(outputs, *self.images(batch)) + self._supervised(outputs, batch)

    def images(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The moving and the fixed image, [B, C, *size] in [0, 1]."""
        return unit(batch.inputs[self.config.moving]), unit(batch.inputs[self.config.fixed])

    def cost(self, motion: Motion, moving: Tensor, fixed: Tensor) -> Tensor:
        """What can be said of a transform without labels, [B]."""
        field = self.displacement(motion, self.size)
        return self.unlike(self.warp(moving, field), fixed) + self.config.smoothness * bending_energy(field)

    def unlike(self, image: Tensor, fixed: Tensor) -> Tensor:
        """Minus the similarity, [B]."""
        return within(self.similarity(image, fixed))

    def _supervised(self, motion: Motion, batch: Batch) -> Tensor:
        if not self.config.supervision or self.name not in batch.targets:
            return motion.affine.new_zeros(len(motion.affine))
        maps = batch.targets[self.name].long()
        labelled = maps.flatten(1).amin(1) >= 0
        each = nn.functional.one_hot(maps.clamp(min=0), self.config.structures + 1).movedim(-1, 2).float()
        warped = self.warp(each[:, 0].contiguous(), self.displacement(motion, self.size))
        return self.config.supervision * torch.where(labelled, within(self.overlap(warped, each[:, 1])), 0.0)

    def predict(self, encoding: Encoding) -> dict[str, list[float]]:
        """Each pair before (identity) and after: overlap and distance of its label maps, similarity, folding.

        Dice is the mean over structures, by nearest neighbour. Distances are in mm where the modality has a spacing,
        else in pixels. All at the model's resolution.
        """
        batch = encoding.batch
        motion, (moving, fixed) = self(encoding), self.images(batch)
        if self.config.refine:
            motion = refined(motion, self.cost, (moving, fixed), self.config.refine)
        field = self.displacement(motion, self.size)
        similarity = -self.unlike(self.warp(moving, field), fixed)
        field = field.cpu()
        columns = {
            "similarity_before": (-self.unlike(moving, fixed)).tolist(),
            "similarity": similarity.tolist(),
            "folding": [folding(jacobian_determinant(one)) for one in field],
        }
        maps = batch.targets.get(self.name, torch.full((len(field), 2, 1), UNLABELLED)).long().cpu()
        still = torch.zeros_like(field)
        for suffix, displacement in (("_before", still), ("", field)):
            measured = [self._measured(one, *pair) for one, pair in zip(displacement, maps, strict=True)]
            columns[f"dice{suffix}"], columns[f"tre{suffix}"] = (list(each) for each in zip(*measured, strict=True))
        return columns

    def _measured(self, field: Tensor, moving: Tensor, fixed: Tensor) -> tuple[float, float]:
        if fixed.min() < 0 or not (moving.any() or fixed.any()):
            return float("nan"), float("nan")
        overlap = warped_dice([field], [moving], [fixed], self.config.structures + 1)[0]
        distance = curve_error(field, moving, fixed, self.spacing) if self.config.landmarks else float("nan")
        return float(overlap[np.isfinite(overlap)].mean()), distance


def within(loss: Tensor) -> Tensor:
    """The mean within each study, [B]."""
    return loss.flatten(1).mean(1) if loss.ndim > 1 else loss


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer, giving zero: a registration starts from the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer
