"""A site's part in a federated round: plain training, and what FedProx, SCAFFOLD, FedRep or Ditto add to it."""

from collections.abc import Collection
from dataclasses import dataclass, field

import numpy as np
import torch

from client.loading import arrays, load
from mmfm_core.config.federation import Stage
from mmfm_core.data.dataset import Dataset
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel
from mmfm_core.models.parameters import CONTROL
from mmfm_core.privacy.step import Mechanism
from mmfm_core.storage import Tensors
from mmfm_core.training.steps import Rule, train

PERSONAL = "personal/"
"""Before the names of Ditto's own model, among what a site keeps."""


@dataclass(frozen=True)
class Learned:
    """What a round came to.

    Attributes:
        after: the whole state of the trained model.
        controls: the changes of the site's control variates, as they leave; none without SCAFFOLD.
        kept: what the site keeps beside its local parameters.
    """

    loss: float
    after: Tensors
    controls: Tensors = field(default_factory=dict)
    kept: Tensors = field(default_factory=dict)


def learn(
    model: MultimodalModel,
    dataset: Dataset,
    stage: Stage,
    trained: Collection[str],
    shared: Collection[str],
    received: Tensors,
    kept: Tensors,
    mechanism: Mechanism | None = None,
) -> Learned:
    """Train from the state that the model has, once for the federation and, with Ditto, once for the site.

    Args:
        trained: names of the state that this stage trains.
        shared: those of the whole state that the federation shares.
        received: shared tensors as they came, and `CONTROL` + name for the coordinator's control variates.
        kept: what the site kept from the round before.
        mechanism: makes every step private that the federation learns from. Ditto's model of the site alone is not:
            no later round begins from it.

    Raises:
        MmfmError: see `train`; or a private round changed a buffer, which has no noise.
    """
    before, device = arrays(model), model.device
    anchors = {name: torch.from_numpy(before[name]).to(device) for name in trained if name in shared}
    theirs = {name: received[CONTROL + name] for name in anchors if CONTROL + name in received}
    own = {name: kept.get(CONTROL + name, 0 * theirs[name]) for name in theirs}
    rule = Rule(
        anchors=anchors,
        strength=stage.proximal,
        correction={name: torch.from_numpy(theirs[name] - own[name]).to(device) for name in theirs},
        first=set(trained) - set(shared),
    )
    loss = train(model, dataset, stage, trained, rule, mechanism)
    after = arrays(model)
    if mechanism:
        check_buffers(model, before, after)
    # Karimireddy et al. 2020, equation 4, option II: the mean gradient of the steps just taken.
    size = stage.optimizer.lr * (stage.local_steps - stage.local_first)
    changes = {CONTROL + name: (before[name] - after[name]) / size - theirs[name] for name in theirs}
    keeps = {CONTROL + name: own[name] + changes[CONTROL + name] for name in theirs}
    if stage.personal:
        load(model, before | {name: kept[PERSONAL + name] for name in trained if PERSONAL + name in kept})
        train(model, dataset, stage, trained, Rule(anchors=anchors, strength=stage.personal))
        mine = arrays(model)
        keeps |= {PERSONAL + name: mine[name] for name in trained}
    return Learned(loss, after, changes, keeps)


def check_buffers(model: MultimodalModel, before: Tensors, after: Tensors) -> None:
    """Check that training changed no buffer: running statistics are of patients, and have no noise.

    Raises:
        MmfmError: one was changed.
    """
    for name, _ in model.named_buffers():
        if name in before and not np.array_equal(before[name], after[name]):
            raise MmfmError(
                f"privacy: '{name}' gathers statistics of patients without noise; freeze it, or use LayerNorm"
            )
