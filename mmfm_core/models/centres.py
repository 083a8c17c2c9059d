"""Objects as points: what a map of centres is taught, and how objects are read from it.

CenterNet (Zhou et al., Objects as Points, 2019), with the boxes of TTFNet (Liu et al., Training-Time-Friendly Network,
AAAI 2020): sides are learned in a Gaussian around a centre, through IoU. Ours, because no library at hand has it.
Shapes: B studies, M boxes with padding, L cells of the map, C classes.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.models import _torchvision_ops  # noqa: F401

from torchvision.ops import generalized_box_iou_loss  # isort: skip

SPREAD = 0.54 / 6
"""Standard deviation of the Gaussian around a centre, in sides of its box (TTFNet's alpha)."""

FLOOR = 0.01
"""Score below which a peak is not kept."""


def closeness_of(cells: Tensor, corners: Tensor, real: Tensor, stride: int) -> Tensor:
    """How close each cell is to each box's centre, from 0 to 1 at the cell that holds it, [B, L, M]; 0 for padding.

    Args:
        cells: middles of the map's cells, [L, 2] as x, y in pixels.
        corners: x0, y0, x1, y1 in pixels, [B, M, 4].
        real: which boxes are no padding, [B, M] bool.
        stride: pixels per cell.
    """
    centres, sides = (corners[..., :2] + corners[..., 2:]) / 2, corners[..., 2:] - corners[..., :2]
    offset = cells[:, None] - centres[:, None]
    spread = (sides * SPREAD).clamp(min=stride / 4)[:, None]
    near = (-((offset / spread) ** 2).sum(-1) / 2).exp()
    holds = ((offset > -stride / 2) & (offset <= stride / 2)).all(-1)
    return torch.where(holds, 1.0, near) * real[:, None]


def heat_loss(logits: Tensor, closeness: Tensor, labels: Tensor) -> Tensor:
    """Focal loss of the classes' maps, less strict close to a centre, summed within each study, [B].

    CornerNet's (Law and Deng 2018, equation 1), with its exponents 2 and 4.

    Args:
        logits: [B, C, L].
        closeness: [B, L, M].
        labels: class of each box, [B, M].
    """
    of_class = [torch.where(labels[:, None] == c, closeness, 0.0).amax(2) for c in range(logits.shape[1])]
    target, p = torch.stack(of_class, 1), logits.sigmoid()
    found = (1 - p) ** 2 * F.logsigmoid(logits)
    nothing = (1 - target) ** 4 * p**2 * F.logsigmoid(-logits)
    return -torch.where(target == 1, found, nothing).sum((1, 2))


def box_loss(drawn: Tensor, closeness: Tensor, corners: Tensor) -> Tensor:
    """Generalised IoU loss of the boxes drawn around centres, every true box counted once, summed in each study, [B].

    Args:
        drawn: the box of each cell in pixels, [B, L, 4].
        closeness: [B, L, M].
        corners: true boxes in pixels, [B, M, 4].
    """
    weight, closest = closeness.max(2)
    of_box = torch.zeros_like(corners[..., 0]).scatter_add(1, closest, weight)
    weight = weight / of_box.gather(1, closest).clamp(min=1e-6)
    true = corners.gather(1, closest[..., None].expand(-1, -1, 4))
    return (weight * generalized_box_iou_loss(drawn, true)).sum(1)


def peaks(logits: Tensor, most: int) -> tuple[Tensor, Tensor, Tensor]:
    """Classes, cells and scores of at most `most` local maxima of one study's maps [C, H, W], surest first."""
    heat = logits.sigmoid()
    highest = F.max_pool2d(heat[None], 3, 1, 1)[0]
    scores = torch.where((heat == highest) & (heat >= FLOOR), heat, 0.0).flatten()
    scores, index = scores.topk(min(most, len(scores)))
    kept = scores > 0
    cells = logits[0].numel()
    return index[kept] // cells, index[kept] % cells, scores[kept]
