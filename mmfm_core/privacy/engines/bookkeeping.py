"""One pass for all patients, without the gradient of any weight in it: book-keeping (Bu et al. 2022, 2210.00038).

What goes into each layer and the gradient of what comes out give every patient's norm, and then one weighted sum.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from mmfm_core.data.dataset import Batch
from mmfm_core.privacy.engines.base import Clipped, Losses, scales, zeros
from mmfm_core.privacy.engines.booking import booked, refused
from mmfm_core.privacy.engines.layer import Scale
from mmfm_core.privacy.engines.layers import layer_of
from mmfm_core.privacy.engines.rows import rows_of
from mmfm_core.privacy.engines.support import layers_of, missed


def clipped_sum(
    model: nn.Module,
    losses: Losses,
    batch: Batch,
    patients: Tensor,
    parameters: Mapping[str, nn.Parameter],
    max_norm: float,
) -> Clipped:
    """See `Engine`.

    Raises:
        MmfmError: see `unsupported` and `booked`; use `loop`.
    """
    layers = layers_of(model, parameters)
    if reason := missed(model, layers, parameters):
        raise refused(reason)
    if not len(batch):
        return Clipped(zeros(parameters), 0.0, 0)
    rows = rows_of(patients)
    weight = 1 / rows.studies
    each, uses = booked(
        {name: layer.module for name, layer in layers.items()},
        lambda: losses(batch.rows(rows.order.tolist())),
        weight,
        parameters,
    )
    parts = {name: layer_of(layers[name].module, layers[name].trained, uses.pop(name), rows) for name in list(uses)}
    of_patients = rows.summed(each * weight)
    squares = of_patients.new_zeros(rows.patients)
    total = {}
    with torch.no_grad():
        for part in parts.values():
            squares += part.squares()
        factors = scales(squares.clamp(min=0).sqrt(), of_patients, max_norm)
        scale = Scale.of(factors)
        for name in list(parts):
            for own, gradient in parts.pop(name).weighted(scale).items():
                total[layers[name].trained[own]] = gradient
    kept = factors > 0
    total |= zeros({name: each for name, each in parameters.items() if name not in total})
    return Clipped({name: total[name] for name in parameters}, float(of_patients[kept].sum()), int((~kept).sum()))
