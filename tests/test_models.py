"""Models: missing modalities are first-class, and every patient's gradient can be told apart."""

from itertools import chain, combinations

import pytest
import torch
from opacus import GradSampleModule
from tiny import tiny_federation
from torch import Tensor, nn

from mmfm_core.config import Federation
from mmfm_core.data.dataset import Batch
from mmfm_core.errors import MmfmError
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tokens import Tokens

FUSIONS: tuple[dict[str, object], ...] = (
    {"type": "gated"},
    {"type": "concat"},
    {"type": "joint", "depth": 1},
    {"type": "cross_attention", "anchor": "note", "depth": 2},
    {"type": "bottleneck", "latents": 3, "depth": 2},
    {"type": "sum"},
)
STUDIES = 6
MODALITIES = ("scan", "note", "labs")
SUBSETS = list(chain.from_iterable(combinations(MODALITIES, n) for n in (1, 2, 3)))


def federation_with(fusion: dict[str, object]) -> Federation:
    document = tiny_federation().model_dump(mode="json")
    document["model"]["fusion"] = fusion
    return Federation.model_validate(document)


def random_batch(present: dict[str, Tensor] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.tensor([24, 9, 17, 3, 24, 12])
    ids = torch.randint(3, 259, (STUDIES, 24), generator=generator)
    inputs = {
        "scan": torch.randn(STUDIES, 1, 16, 16, generator=generator),
        "note": ids.masked_fill(torch.arange(24) >= lengths[:, None], 0),
        "labs": torch.randn(STUDIES, 2, generator=generator),
    }
    inputs["labs"][1, 0] = torch.nan
    everything = {name: torch.ones(STUDIES, dtype=torch.bool) for name in MODALITIES}
    disease = torch.tensor([0, 1, 1, 0, 1, -1])
    return Batch(inputs, everything | (present or {}), {"disease": disease}, {"disease": disease >= 0})


def some_absent() -> Batch:
    return random_batch(
        {"scan": torch.tensor([1, 0, 1, 1, 0, 1]).bool(), "note": torch.tensor([0, 1, 1, 0, 1, 1]).bool()}
    )


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["type"])
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_any_subset_of_modalities_is_the_same_whether_masked_or_not_passed(fusion, subset):
    model = full_model(federation_with(fusion).model, seed=0).eval()
    masked = random_batch({name: torch.full((STUDIES,), name in subset) for name in MODALITIES})
    passed = Batch({name: masked.inputs[name] for name in subset}, {n: masked.present[n] for n in subset}, {}, {})
    expected = model(masked, ["disease"])["disease"]
    assert expected.isfinite().all()
    torch.testing.assert_close(model(passed, ["disease"])["disease"], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["type"])
def test_what_stands_in_for_an_absent_modality_has_no_influence(fusion):
    model = full_model(federation_with(fusion).model, seed=0).eval()
    batch = some_absent()
    before = model(batch, ["disease"])["disease"]
    gradient = torch.autograd.grad(model.losses(batch, ["disease"])["disease"].sum(), list(model.parameters()))
    batch.inputs["scan"][~batch.present["scan"]] = 1000.0
    batch.inputs["note"][~batch.present["note"]] = 77
    torch.testing.assert_close(model(batch, ["disease"])["disease"], before, rtol=0, atol=1e-6)
    after = torch.autograd.grad(model.losses(batch, ["disease"])["disease"].sum(), list(model.parameters()))
    for name_and_value, (old, new) in zip(model.named_parameters(), zip(gradient, after, strict=True), strict=True):
        torch.testing.assert_close(new, old, rtol=1e-4, atol=1e-6, msg=name_and_value[0])


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["type"])
def test_a_study_does_not_depend_on_the_others_in_its_batch(fusion):
    model = full_model(federation_with(fusion).model, seed=0).eval()
    batch = some_absent()
    together = model(batch, ["disease"])["disease"]
    for row in range(STUDIES):
        torch.testing.assert_close(model(one(batch, row), ["disease"])["disease"][0], together[row], rtol=0, atol=1e-5)


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["type"])
def test_hooks_see_the_gradient_of_every_study_as_autograd_does_one_at_a_time(fusion):
    """The six rules of private-trainable models, checked on every parameter, absent modalities and labels included."""
    model = full_model(federation_with(fusion).model, seed=0).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # hooks look only at a model in training
    batch = some_absent()
    expected = []
    for row in range(STUDIES):
        loss = model.losses(one(batch, row), ["disease"])["disease"].sum()
        expected.append(torch.autograd.grad(loss, list(model.parameters()), allow_unused=True))

    class Loss(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, batch: Batch) -> Tensor:
            return model.losses(batch, ["disease"])["disease"]

    hooked = GradSampleModule(Loss(), loss_reduction="sum", strict=False)
    hooked(batch).sum().backward()
    for index, (name, parameter) in enumerate(model.named_parameters()):
        seen = getattr(parameter, "grad_sample", None)
        assert seen is not None, f"{name} has no gradient per study"
        assert seen.shape == (STUDIES, *parameter.shape), name
        for row in range(STUDIES):
            truth = expected[row][index]
            truth = torch.zeros_like(parameter) if truth is None else truth
            torch.testing.assert_close(seen[row], truth, rtol=1e-3, atol=1e-6, msg=f"{name}, study {row}")


@pytest.mark.parametrize("fusion", FUSIONS, ids=lambda fusion: fusion["type"])
def test_modality_dropout_never_takes_the_last_modality(fusion):
    model = full_model(federation_with(fusion | {"modality_dropout": 0.9}).model, seed=0).train()
    seen: list[dict[str, Tokens]] = []
    fuse = model.fusion.fuse
    model.fusion.fuse = lambda parts: (seen.append(parts), fuse(parts))[1]  # type: ignore[method-assign]
    batch = some_absent()
    dropped = 0
    for _ in range(50):
        model(batch, ["disease"])
        kept = {name: part.mask.any(1) for name, part in seen[-1].items()}
        assert torch.stack(list(kept.values())).any(0).all()
        for name, rows in kept.items():
            assert not (rows & ~batch.present[name]).any()
            dropped += int((batch.present[name] & ~rows).sum())
    assert dropped > 0


def test_the_fusion_uses_several_modalities_at_once():
    """A label that is the exclusive or of two modalities is learned by each fusion, which no single modality can."""
    for fusion in FUSIONS:
        federation = federation_with(fusion)
        torch.manual_seed(0)
        model = MultimodalModel(federation.model, MODALITIES, ["disease"], seed=0)
        bits = torch.randint(0, 2, (128, 2))
        scan = torch.randn(128, 1, 16, 16) * 0.1 + bits[:, 0, None, None, None]
        labs = torch.stack([bits[:, 1] * 2.0 - 1, torch.full((128,), torch.nan)], 1)
        everyone = torch.ones(128, dtype=torch.bool)
        batch = Batch(
            {"scan": scan, "labs": labs},
            {"scan": everyone, "labs": everyone},
            {"disease": bits.sum(1) % 2},
            {"disease": everyone},
        )
        optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
        for _ in range(150):
            loss = model.losses(batch, ["disease"])["disease"].mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        model.eval()
        right = (model(batch, ["disease"])["disease"].argmax(1) == batch.targets["disease"]).float().mean()
        assert right > 0.95, fusion


def test_every_part_starts_the_same_wherever_it_is_built():
    federation = tiny_federation()
    full = full_model(federation.model, federation.seed).state_dict()
    torch.manual_seed(123)
    partial = MultimodalModel(federation.model, ["note"], ["disease"], federation.seed).state_dict()
    assert set(partial) < set(full)
    for name, tensor in partial.items():
        torch.testing.assert_close(tensor, full[name], rtol=0, atol=0)


def one(batch: Batch, row: int) -> Batch:
    inputs, present, targets, usable = (
        {name: value[row : row + 1] for name, value in part.items()}
        for part in (batch.inputs, batch.present, batch.targets, batch.usable)
    )
    return Batch(inputs, present, targets, usable)


def test_a_name_that_torch_reserves_is_refused_in_a_sentence():
    document = tiny_federation().model_dump(mode="json")
    for part in ("modalities", "encoders"):
        document["model"][part]["type"] = document["model"][part].pop("labs")
    with pytest.raises(MmfmError, match="'type' is a word that torch keeps for itself"):
        full_model(Federation.model_validate(document).model, seed=0)


@pytest.mark.parametrize("fusion", FUSIONS[:2], ids=lambda fusion: fusion["type"])
def test_a_learned_vector_stands_for_an_absent_modality_and_for_nothing_else(fusion):
    model = full_model(federation_with(fusion).model, seed=0).eval()
    batch = some_absent()
    before = model(batch, ["disease"])["disease"]
    with torch.no_grad():
        model.fusion.missing.weight.normal_(generator=torch.Generator().manual_seed(1))
    changed = ((model(batch, ["disease"])["disease"] - before).abs() > 1e-6).any(1)
    complete = torch.stack(list(batch.present.values())).all(0)
    assert not changed[complete].any()
    assert changed[~complete].all()
