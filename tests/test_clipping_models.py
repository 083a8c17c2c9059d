"""Every head and objective that says it separates studies, by every clipping engine: equal to one patient at a time."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import Any

import pytest
import torch
from test_combinations import LENGTH, document, random_batch, subsets
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


OTHERS: dict[str, Callable[[], Tensor]] = {
    "comment": lambda: torch.randint(3, 259, (len(PATIENTS), LENGTH)),
    "ct": lambda: torch.randn(len(PATIENTS), 1, 8, 8, 8),
    "labs": lambda: torch.stack([torch.randn(len(PATIENTS)), torch.randint(2, (len(PATIENTS),)).float()], 1),
}
"""Modalities that `random_batch` does not know."""


def studies(task: str, config: Model) -> Batch:
    """Nine studies: three with everything, three each with fewer modalities; the last of each three has no target."""
    known = config.model_copy(update={"modalities": {n: m for n, m in config.modalities.items() if n not in OTHERS}})
    have = subsets(known)
    batch = joined([random_batch(task, known, tuple(known.modalities), have[i]) for i in (-1, 0, len(have) // 2)])
    for name in config.modalities.keys() & OTHERS:
        batch.inputs[name] = OTHERS[name]()
        batch.present[name] = torch.arange(len(batch)) % 3 > 0
    return batch


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


def check(
    task: str,
    described: Mapping[str, Any],
    frozen: Callable[[str], bool] = lambda name: False,
    engines: Sequence[str] = FAST,
) -> None:
    config = Model.model_validate(described)
    torch.manual_seed(0)
    model = full_model(config, seed=0)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not frozen(name))
        if ".lora_B" in name:  # adapters start as nothing, and hide the gradients of their first half
            nn.init.normal_(parameter, std=0.1)
    assert_equal(still(model), losses_of(model), studies(task, config), engines)


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


def test_a_map_drawn_without_tokens_though_encoders_are_trained():
    described = document("segmentation", "joint")
    described["heads"]["task"]["tokens"] = False
    check("segmentation", described)


def with_shared_trunks() -> dict[str, Any]:
    """One trunk for two images, and one for two texts."""
    described = document("findings", "joint")
    described["modalities"] |= {"comment": described["modalities"]["note"]}
    described["encoders"] |= {
        "side": {"type": "shared", "share_with": "front"},
        "comment": {"type": "shared", "share_with": "note"},
    }
    return described


def with_volume_and_table() -> dict[str, Any]:
    described = document("classification", "gated")
    described["modalities"] |= {
        "ct": {"kind": "volume3d", "size": [8, 8, 8], "optional": True},
        "labs": {"kind": "tabular", "features": {"age": {}, "sex": {"categories": ["f", "m"]}}, "optional": True},
    }
    described["encoders"] |= {"ct": {"type": "vit3d", "patch_size": 4, "depth": 1}, "labs": {"type": "feature_tokens"}}
    return described


def with_trunk(architecture: str) -> dict[str, Any]:
    described = document("classification", "gated")
    described["encoders"]["front"] = {"type": "timm", "architecture": architecture, "grid": 2}
    return described


def with_adapters() -> dict[str, Any]:
    targets = ["encoders.front.vit.blocks.*", "encoders.front.vit.patch_embed.proj", "encoders.note.*.query"]
    return document("findings", "joint") | {
        "adapters": {
            "shared": {"rank": 2, "targets": [*targets, "fusion.*"]},
            "local": {"rank": 3, "targets": targets[:1]},
        }
    }


@pytest.mark.parametrize("described", [with_shared_trunks, with_volume_and_table], ids=lambda each: each.__name__)
def test_trunks_used_twice_volumes_and_tables(described):
    check("findings" if described is with_shared_trunks else "classification", described())


def test_adapters_in_frozen_trunks():
    check("findings", with_adapters(), lambda name: name.startswith("encoders.") and ".lora_" not in name)


def test_adapters_beside_what_is_trained_itself():
    check("findings", with_adapters())


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_a_head_on_frozen_trunks(task):
    check(task, document(task, "bottleneck"), lambda name: name.startswith("encoders."))


def test_biases_alone():
    check("classification", document("classification", "joint"), lambda name: not name.endswith(".bias"))


TRUNKS: dict[str, Callable[[str], bool]] = {
    "test_vit": lambda name: name.endswith((".cls_token", ".pos_embed")),  # bare parameters beside layers
    "test_efficientnet_gn": lambda name: False,
    "test_resnet": lambda name: ".trunk." in name,  # BatchNorm
}


@pytest.mark.parametrize("architecture", TRUNKS)
def test_trunks_of_timm(architecture):
    # Torch forbids Opacus' hooks on layers whose output the next one writes over.
    engines = ["bookkeeping"] if architecture == "test_efficientnet_gn" else FAST
    check("classification", with_trunk(architecture), TRUNKS[architecture], engines)
