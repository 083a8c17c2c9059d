"""Overlap and surface distance of segmentations, through monai, one study at a time to bound memory."""

import warnings
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from mmfm_core.metrics.ranking import Floats
from mmfm_core.metrics.statistic import Statistic, macro, mean_of
from mmfm_core.models import _torchvision_ops  # noqa: F401  (monai imports torchvision)

from monai.metrics import compute_dice, compute_hausdorff_distance  # isort: skip


def dice(predictions: Iterable[Tensor], targets: Iterable[Tensor], classes: int) -> Floats:
    """Dice coefficient of each study and foreground class.

    Args:
        predictions: label maps [*size], integer, 2D or 3D, sizes may differ between studies; an iterator will do.
        targets: the true label maps, of the same sizes and in the same order.
        classes: number of classes, the background (0) included.

    Returns:
        [N, classes - 1]; NaN where a class is in neither map, 0 where it is in one only.

    Source: Dice, Ecology 26(3), 1945.
    """
    return _each(lambda predicted, target: _dice_of_study(predicted, target, classes), predictions, targets, classes)


def hausdorff95(
    predictions: Iterable[Tensor],
    targets: Iterable[Tensor],
    classes: int,
    spacings: Iterable[Sequence[float]] | None = None,
) -> Floats:
    """95th percentile of the distance between the surfaces, of each study and foreground class.

    Args:
        predictions: label maps [*size], integer, 2D or 3D, sizes may differ between studies; an iterator will do.
        targets: the true label maps, of the same sizes and in the same order.
        classes: number of classes, the background (0) included.
        spacings: of each study, the size of a voxel along each axis in mm; None measures in pixels.

    Returns:
        [N, classes - 1] in mm or pixels: the larger of the two directed percentiles. NaN where a class is in neither
        map; the image's diagonal where it is in one only, as in the BraTS challenges, so that a miss costs something.

    Source: Huttenlocher et al., IEEE TPAMI 15(9), 1993; the penalty: Bakas et al., arXiv 1811.02629.
    """
    if spacings is None:
        return _each(lambda p, t: _hausdorff_of_study(p, t, classes, [1.0] * t.ndim), predictions, targets, classes)
    sized = iter(spacings)
    return _each(lambda p, t: _hausdorff_of_study(p, t, classes, next(sized)), predictions, targets, classes)


def over_classes(per_study: Floats) -> Statistic:
    """Mean over foreground classes of the mean over studies, of a quantity [N, classes - 1], NaN where undefined."""
    return macro([mean_of(of_class) for of_class in per_study.T])


def _each(
    measure: Callable[[Tensor, Tensor], Tensor], predictions: Iterable[Tensor], targets: Iterable[Tensor], classes: int
) -> Floats:
    rows = [measure(*pair).double().numpy() for pair in zip(predictions, targets, strict=True)]
    return np.array(rows, dtype=np.float64).reshape(len(rows), classes - 1)


def _dice_of_study(predicted: Tensor, target: Tensor, classes: int) -> Tensor:
    found = compute_dice(
        predicted[None, None], target[None, None], include_background=False, ignore_empty=False, num_classes=classes
    )[0]
    return torch.where(_present(predicted, classes) | _present(target, classes), found, torch.nan)


def _hausdorff_of_study(predicted: Tensor, target: Tensor, classes: int, spacing: Sequence[float]) -> Tensor:
    of_predicted, of_target = _present(predicted, classes), _present(target, classes)
    diagonal = torch.tensor([size * step for size, step in zip(target.shape, spacing, strict=True)]).norm()
    result = torch.where(of_predicted ^ of_target, diagonal, torch.nan)
    for label in torch.nonzero(of_predicted & of_target).flatten().tolist():
        result[label] = _hausdorff(predicted == label + 1, target == label + 1, spacing)
    return result


def _hausdorff(predicted: Tensor, target: Tensor, spacing: Sequence[float]) -> Tensor:
    with warnings.catch_warnings():
        # monai 1.6 calls its own function with an argument that it has deprecated.
        warnings.filterwarnings("ignore", message=".*always_return_as_numpy", category=FutureWarning)
        return compute_hausdorff_distance(
            predicted[None, None].float(),
            target[None, None].float(),
            include_background=True,
            percentile=95,
            spacing=list(spacing),
        ).squeeze()


def _present(labels: Tensor, classes: int) -> Tensor:
    """Which foreground classes a map holds, [classes - 1]."""
    return torch.stack([(labels == label).any() for label in range(1, classes)])
