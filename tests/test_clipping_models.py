"""Every head and objective that says it separates studies, by every clipping engine: equal to one patient at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import pytest
import torch
from test_combinations import EXAMPLES, document, random_batch, subsets
from torch import Tensor, nn

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.objectives.masked_image import MaskedAutoencoder
from mmfm_core.models.objectives.masked_text import MaskedLanguage
from mmfm_core.privacy.engines import ENGINES, choose
from mmfm_core.registry import FUSIONS, HEADS, OBJECTIVES

PATIENTS = torch.tensor([3, 0, 1, 3, 2, 1, 3, 3, 4])
"""One patient of four studies, one of two, three of one."""

FAST = [name for name in ENGINES if name != "loop"]


def joined(batches: Sequence[Batch]) -> Batch:
    return Batch(
        *(
            {name: torch.cat([getattr(batch, part.name)[name] for batch in batches]) for name in first}
            for part in fields(Batch)
            for first in [getattr(batches[0], part.name)]
        )
    )


def studies(task: str, config: Model) -> Batch:
    """Nine studies: three with everything, three each with fewer modalities; the last of each three has no target."""
    everything = tuple(config.modalities)
    have = subsets(config)
    return joined([random_batch(task, config, everything, each) for each in (have[-1], have[0], have[len(have) // 2])])


def still(model: MultimodalModel) -> MultimodalModel:
    """Without any randomness, so that each study passes alike alone and among others."""
    model.fusion.modality_dropout = 0.0
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model.train()


@pytest.fixture(autouse=True)
def masks_by_content(monkeypatch: pytest.MonkeyPatch) -> None:
    """Masks that depend on the study, not on its place in the batch."""

    def image(self: MaskedAutoencoder, encoding: Any) -> Tensor:
        pixels = encoding.input(self.encoder).flatten(1)[:, : self.position.num_embeddings]
        return self.loss(encoding, pixels.argsort(1)[:, : self.kept])

    def text(self: MaskedLanguage, encoding: Any) -> Tensor:
        ids = encoding.input(self.encoder)
        hidden = (ids % 3 == 0) & (ids > 2)
        return self.loss(encoding, torch.where(hidden, self.tokenizer.mask_id, ids), hidden)

    monkeypatch.setattr(MaskedAutoencoder, "forward", image)
    monkeypatch.setattr(MaskedLanguage, "forward", text)


def assert_equal(
    model: nn.Module,
    losses: Callable[[Batch], Tensor],
    batch: Batch,
    engines: Sequence[str] = FAST,
    patients: Tensor = PATIENTS,
) -> None:
    """Compare with the loop, where the bound clips some patients and where it clips none."""
    parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
    assert choose(model, parameters) == "bookkeeping"
    whole = ENGINES["loop"](model, losses, batch, patients, parameters, 1e9)
    bound = float(flat(whole.total).norm()) / 8
    assert bound > 0
    for max_norm in (bound, 1e9):
        truth = ENGINES["loop"](model, losses, batch, patients, parameters, max_norm)
        for engine in engines:
            found = ENGINES[engine](model, losses, batch, patients, parameters, max_norm)
            error = float((flat(found.total) - flat(truth.total)).norm() / flat(truth.total).norm())
            assert error < 1e-5, (engine, error)
            assert found.loss == pytest.approx(truth.loss, rel=1e-5)
            assert found.dropped == truth.dropped == 0
            assert found.total.keys() == parameters.keys()


def flat(total: Mapping[str, Tensor]) -> Tensor:
    return torch.cat([each.flatten() for each in total.values()])


def losses_of(model: MultimodalModel) -> Callable[[Batch], Tensor]:
    return lambda batch: model.losses(batch, ["task"])["task"]


def check(task: str, described: Mapping[str, Any]) -> None:
    config = Model.model_validate(described)
    torch.manual_seed(0)
    model = still(full_model(config, seed=0))
    assert_equal(model, losses_of(model), studies(task, config))


@pytest.mark.parametrize("fusion", ["cross_attention", "bottleneck"])
@pytest.mark.parametrize("task", [*HEADS, *OBJECTIVES])
def test_each_task_that_separates_studies(task, fusion):
    described = document(task, fusion)
    config = Model.model_validate(described)
    if not (config.heads | config.objectives)["task"].PER_SAMPLE:
        pytest.skip("its loss compares studies")
    check(task, described)


@pytest.mark.parametrize("fusion", FUSIONS)
def test_each_fusion(fusion):
    check("classification", document("classification", fusion))
