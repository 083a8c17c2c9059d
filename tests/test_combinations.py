"""Every head and objective with every fusion and every subset of modalities: one training step.

The tasks and fusions come from the registries, so a new one is tested here too, once it has an example below.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import chain, combinations
from typing import Any

import pytest
import torch
from per_study import assert_gradients_separate
from pydantic import ValidationError
from torch import Tensor

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch, usable
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.registry import FUSIONS, HEADS, OBJECTIVES

STUDIES = 3
SIDE = 16
LENGTH = 12
IMAGES, TEXT = ("front", "side"), "note"


@dataclass(frozen=True)
class Example:
    """A task in a small document.

    Attributes:
        options: what the document says of it beside its type.
        labelled: random targets in the form of those that `unlabelled` gives, [B, ...].
        needs: the encoders without which the document is refused.
        pair: whether it takes both images together, stacked and in every study.
        fusion: the only one it goes with, whatever is asked for; empty where it goes with any.
    """

    options: dict[str, Any] = field(default_factory=dict)
    labelled: Callable[[Tensor], Tensor] = lambda unlabelled: unlabelled
    needs: tuple[str, ...] = ()
    pair: bool = False
    fusion: str = ""


def some_findings(unlabelled: Tensor) -> Tensor:
    labels = torch.randint(0, 2, unlabelled.shape).float()
    labels[:, 1] = torch.nan
    return labels


def some_boxes(unlabelled: Tensor) -> Tensor:
    boxes = unlabelled.clone()
    boxes[0, 0] = torch.tensor([1, 0.1, 0.2, 0.6, 0.5])
    boxes[0, 1] = torch.tensor([0, 0.4, 0.4, 1.0, 0.9])
    return boxes  # nothing is to be found in the others


EXAMPLES = {
    "classification": Example(
        {"classes": ["none", "mild", "severe"]}, lambda unlabelled: torch.randint_like(unlabelled, 3)
    ),
    "findings": Example({"findings": ["effusion", "nodule", "oedema"]}, some_findings),
    "segmentation": Example(
        {"classes": ["background", "lesion"], "width": 2}, lambda unlabelled: torch.randint_like(unlabelled, 2)
    ),
    "detection": Example({"classes": ["cell", "clot"], "image": "front", "max_boxes": 3, "width": 32}, some_boxes),
    "registration": Example({"moving": "front", "fixed": "side", "width": 2}, pair=True),
    "report": Example({"max_length": 8, "depth": 1}, lambda unlabelled: torch.randint_like(unlabelled, 3, 259)),
    "retrieval": Example({"encoders": ["front", "note"], "embed_dim": 8}, needs=("front", "note")),
    "masked_image": Example({"encoders": ["front"], "mask_ratio": 0.5, "decoder_dim": 12}, needs=("front",)),
    "masked_text": Example({"encoders": ["note"]}, needs=("note",)),
    "matching": Example({"encoders": ["front", "note"]}, needs=("front", "note")),
    "centre": Example(fusion="sum"),
}
FUSION_OPTIONS: dict[str, dict[str, Any]] = {"cross_attention": {"anchor": "front"}, "bottleneck": {"latents": 4}}


def document(task: str, fusion: str) -> dict[str, Any]:
    """A model of two images and a text; of the images alone where fusion means that one encoder stacks everything."""
    if task not in EXAMPLES:
        pytest.fail(f"'{task}' is in the registry and has no example here; add one to EXAMPLES")
    example = EXAMPLES[task]
    fusion = example.fusion or fusion
    image = {"type": "vit", "patch_size": 4, "depth": 1}
    form = {"kind": "image2d", "size": [SIDE, SIDE], "optional": not example.pair}
    modalities: dict[str, Any] = dict.fromkeys(IMAGES, form)
    encoders: dict[str, Any] = dict.fromkeys(IMAGES, image)
    if example.pair or fusion == "channels":
        encoders = {"front": image | {"channels": list(IMAGES)}}
    if fusion != "channels":
        modalities[TEXT] = {"kind": "text", "max_length": LENGTH, "optional": True}
        encoders[TEXT] = {"type": "bert", "depth": 1}
    kind = "heads" if task in HEADS else "objectives"
    return {
        "dim": 12,
        "modalities": modalities,
        "encoders": encoders,
        "fusion": {"type": fusion, "modality_dropout": 0.3} | FUSION_OPTIONS.get(fusion, {}),
        kind: {"task": {"type": task} | example.options},
    }


def random_inputs(config: Model) -> dict[str, Tensor]:
    ids = torch.randint(3, 259, (STUDIES, LENGTH))
    ids[1, LENGTH // 2 :] = 0
    images = {name: torch.randn(STUDIES, 1, SIDE, SIDE) for name in IMAGES}
    return images | {TEXT: ids} if TEXT in config.modalities else images


def subsets(config: Model) -> list[tuple[str, ...]]:
    """Every set of modalities that a study may have: not none, and none of those left out that it must have."""
    names = tuple(config.modalities)
    required = {name for name, modality in config.modalities.items() if not modality.optional}
    sets = chain.from_iterable(combinations(names, n) for n in range(1, len(names) + 1))
    return [have for have in sets if required <= set(have)]


def random_batch(task: str, config: Model, held: tuple[str, ...], have: tuple[str, ...]) -> Batch:
    """Studies that have the modalities `have`, at a site that has `held`; the last one has no target."""
    inputs = {name: x for name, x in random_inputs(config).items() if name in held}
    present = {name: torch.full((STUDIES,), name in have) for name in inputs}
    targets, labelled = {}, {}
    for name, head in config.heads.items():
        unlabelled = head.unlabelled(config)
        targets[name] = unlabelled.repeat(STUDIES, *[1] * unlabelled.ndim)
        targets[name][:-1] = EXAMPLES[task].labelled(targets[name][:-1])
        labelled[name] = torch.arange(STUDIES) < STUDIES - 1
    return Batch(inputs, present, targets, usable(config, present, labelled))


def check_step(model: MultimodalModel, batch: Batch) -> bool:
    """Take a step, check what it was made of, and say whether the model learned anything from it."""
    losses = model.losses(batch, ["task"])["task"]
    assert losses.shape == (STUDIES,)
    assert losses.isfinite().all()
    assert not losses[~batch.usable["task"]].any()
    if not losses.requires_grad:  # nothing to learn from, and nothing was computed
        assert not batch.usable["task"].any()
        return False
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    losses.mean().backward()
    gradients = [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert all(gradient.isfinite().all() for gradient in gradients)
    learns = any(bool(gradient.any()) for gradient in gradients)
    assert learns == bool(batch.usable["task"].any())
    optimizer.step()
    optimizer.zero_grad()
    return learns


@pytest.mark.parametrize("fusion", FUSIONS)
@pytest.mark.parametrize("task", [*HEADS, *OBJECTIVES])
def test_a_step_of_any_task_with_any_fusion_and_any_subset_of_modalities(task, fusion):
    described = document(task, fusion)
    if not set(EXAMPLES[task].needs) <= set(described["encoders"]):
        with pytest.raises(ValidationError, match="encoders: there is no encoder"):
            Model.model_validate(described)
        return
    config = Model.model_validate(described)
    torch.manual_seed(0)
    model = full_model(config, seed=0).train()
    everything = tuple(config.modalities)
    learns = [check_step(model, random_batch(task, config, everything, have)) for have in subsets(config)]
    assert learns[-1]


@pytest.mark.parametrize("fusion", ["cross_attention", "bottleneck"])
@pytest.mark.parametrize("task", HEADS)
def test_hooks_see_the_gradient_of_every_study_for_each_head_that_says_so(task, fusion):
    """The first study has no image where it may lack one, the second no text, and the last no target."""
    config = Model.model_validate(document(task, fusion))
    if not config.heads["task"].PER_SAMPLE:
        pytest.skip("its loss compares studies")
    torch.manual_seed(0)
    model = full_model(config, seed=0)
    model.fusion.modality_dropout = 0.0
    batch = random_batch(task, config, tuple(config.modalities), tuple(config.modalities))
    for name, here in batch.present.items():
        here[0] &= not config.modalities[name].optional or name == TEXT
        here[1] &= name != TEXT
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["task"])["task"], STUDIES)


@pytest.mark.parametrize("task", [*HEADS, *OBJECTIVES])
def test_a_step_of_any_task_at_a_site_that_holds_any_subset_of_modalities(task):
    check_at_sites(task, document(task, "joint"))


@pytest.mark.parametrize("task", [t for t in HEADS if t not in EXAMPLES or "encoders" not in EXAMPLES[t].options])
def test_a_head_that_sees_one_encoder_at_a_site_that_holds_any_subset_of_modalities(task):
    described = document(task, "joint")
    described["heads"]["task"]["encoders"] = ["front"]
    check_at_sites(task, described)


def check_at_sites(task: str, described: dict[str, Any]) -> None:
    """Take a step with each site's own model, which lacks the encoders of what it does not hold."""
    config = Model.model_validate(described)
    for held in subsets(config):
        torch.manual_seed(0)
        model = MultimodalModel(config, held, list(config.heads), seed=0).train()
        if "task" in model.heads or "task" in model.objectives:
            check_step(model, random_batch(task, config, held, held))
