"""Fusion by attention. What every fusion must do is tested in `test_models.py`; this is what these two do of their own.

The truth of the attention is torch's MultiheadAttention with the same weights, which takes a mask of keys.
"""

import pytest
import torch
from test_models import MODALITIES, STUDIES, federation_with, random_batch, some_absent
from torch import Tensor, nn

from mmfm_core.config import Federation
from mmfm_core.data.dataset import Batch
from mmfm_core.models.fusion.attention import CrossAttention
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.models.tokens import Fused, Tokens

DIM = 12


def anchored(anchor: str, batch: Batch) -> tuple[MultimodalModel, Encoding, Fused]:
    model = full_model(federation_with({"type": "cross_attention", "anchor": anchor}).model, seed=0).eval()
    encoding = Encoding(model, batch)
    return model, encoding, encoding.fused()


def random_tokens(mask: Tensor, seed: int = 0) -> Tokens:
    return Tokens(torch.randn(*mask.shape, DIM, generator=torch.Generator().manual_seed(seed)), mask)


def test_cross_attention_is_torchs_with_the_same_weights_and_mask():
    torch.manual_seed(0)
    block = CrossAttention(DIM, heads=3)
    x = torch.randn(4, 5, DIM)
    context = random_tokens(torch.tensor([[1, 1, 1, 1], [1, 0, 0, 1], [0, 0, 1, 0], [0, 1, 1, 1]]).bool())
    peer = nn.MultiheadAttention(DIM, 3, batch_first=True)
    with torch.no_grad():
        peer.in_proj_weight.copy_(torch.cat([block.query.weight, block.key_value.weight]))
        peer.in_proj_bias.copy_(torch.cat([block.query.bias, block.key_value.bias]))
        peer.out_proj.load_state_dict(block.out.state_dict())
    keys = block.norm_context(context.x)
    expected = x + peer(block.norm_query(x), keys, keys, key_padding_mask=~context.mask)[0]
    expected = expected + block.mlp(block.norm_mlp(expected))
    torch.testing.assert_close(block(x, context), expected, rtol=1e-5, atol=1e-6)


def test_a_study_without_a_valid_key_gathers_nothing_and_has_finite_gradients():
    block = CrossAttention(DIM, heads=3)
    x = torch.randn(2, 5, DIM, requires_grad=True)
    context = random_tokens(torch.tensor([[True, True, False], [False, False, False]]))
    context.x[1] = 1e6
    out = block(x, context)
    torch.testing.assert_close(out[1], (x + block.mlp(block.norm_mlp(x)))[1])
    gradients = torch.autograd.grad(out.sum(), [x, *block.parameters()])
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize("fusion", ({"type": "cross_attention", "anchor": "note"}, {"type": "bottleneck"}))
def test_a_study_without_any_token_stays_finite(fusion):
    model = full_model(federation_with(fusion).model, seed=0)
    batch = random_batch({name: torch.arange(STUDIES) > 0 for name in MODALITIES})
    pooled = Encoding(model, batch).fused().pooled
    assert pooled.isfinite().all()
    gradients = torch.autograd.grad(pooled.square().sum(), list(model.fusion.parameters()))
    assert all(gradient.isfinite().all() for gradient in gradients)


@pytest.mark.parametrize(
    ("anchor", "stands_in"),
    (
        ("scan", ["scan", "note", "scan", "scan", "note", "scan"]),
        ("note", ["scan", "note", "note", "scan", "note", "note"]),
        ("labs", ["labs"] * 6),
    ),
)
def test_each_study_has_its_own_anchor_and_falls_back_in_the_documents_order(anchor, stands_in):
    """Only the anchor's own tokens are changed by fusion, so they say which it was."""
    batch = some_absent()
    _, encoding, fused = anchored(anchor, batch)
    for row, expected in enumerate(stands_in):
        for name, before in encoding.parts.items():
            changed = bool((fused.parts[name].x[row] != before.x[row]).any())
            assert changed == (name == expected), (row, name)
        own = fused.parts[expected]
        length = own.x.shape[1]
        torch.testing.assert_close(fused.tokens.x[row, :length], own.x[row])
        assert fused.tokens.mask[row].nonzero().flatten().tolist() == own.mask[row].nonzero().flatten().tolist()
        torch.testing.assert_close(fused.pooled[row], own.x[row][own.mask[row]].mean(0), rtol=1e-5, atol=1e-6)


def test_a_fallback_is_what_a_document_with_that_anchor_computes():
    without_note = random_batch({"note": torch.zeros(STUDIES, dtype=torch.bool)})
    _, _, fallen_back = anchored("note", without_note)
    _, _, meant = anchored("scan", without_note)
    torch.testing.assert_close(fallen_back.pooled, meant.pooled, rtol=0, atol=1e-6)
    assert [part.grid for part in fallen_back.parts.values()].count((2, 2)) == 1


def test_the_shape_does_not_depend_on_which_study_has_which_anchor():
    shapes = set()
    for subset in ({"scan"}, {"note"}, {"labs"}, set(MODALITIES)):
        batch = random_batch({name: torch.full((STUDIES,), name in subset) for name in MODALITIES})
        _, _, fused = anchored("note", batch)
        shapes.add((fused.tokens.x.shape, fused.tokens.mask.shape, fused.pooled.shape))
    assert len(shapes) == 1


def test_the_anchor_sees_every_other_modality_and_nothing_else_counts():
    """Each of the others moves the pooled state of exactly the studies that have it."""
    batch = some_absent()
    model, encoding, before = anchored("labs", batch)
    for name in ("scan", "note"):
        parts = dict(encoding.parts)
        parts[name] = Tokens(parts[name].x + torch.randn(DIM), parts[name].mask)
        moved = ((model.fusion(parts).pooled - before.pooled).abs() > 1e-6).any(1)
        assert moved.tolist() == batch.present[name].tolist()


def test_the_anchor_does_not_ask_itself():
    model, encoding, _ = anchored("note", random_batch({"scan": torch.arange(STUDIES) < 3}))
    alone = {
        name: part.only(torch.arange(STUDIES) < 3) if name == "labs" else part for name, part in encoding.parts.items()
    }
    without_others = model.fusion(alone).pooled
    with torch.no_grad():
        for block in model.fusion.blocks:
            block.key_value.weight.normal_()
    moved = ((model.fusion(alone).pooled - without_others).abs() > 1e-6).any(1)
    assert moved.tolist() == [True] * 3 + [False] * 3


def test_latents_replace_the_tokens_and_the_parts_are_as_they_came():
    model = full_model(federation_with({"type": "bottleneck", "latents": 5}).model, seed=0).eval()
    encoding = Encoding(model, some_absent())
    fused = encoding.fused()
    assert fused.tokens.x.shape == (STUDIES, 5, DIM)
    assert fused.tokens.mask.all()
    torch.testing.assert_close(fused.pooled, fused.tokens.x.mean(1))
    assert all(fused.parts[name] is part for name, part in encoding.parts.items())


def test_the_order_of_tokens_does_not_matter_to_the_latents():
    model = full_model(federation_with({"type": "bottleneck"}).model, seed=0).eval()
    parts = Encoding(model, some_absent()).parts
    shuffled = {name: Tokens(part.x.flip(1), part.mask.flip(1)) for name, part in parts.items()}
    torch.testing.assert_close(model.fusion(shuffled).pooled, model.fusion(parts).pooled, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("fusion", "sentence"),
    (
        ({"type": "cross_attention", "anchor": "nota"}, r"fusion\.anchor: .*'nota'; did you mean 'note'"),
        ({"type": "cross_attention", "anchor": "note", "heads": 5}, r"fusion\.heads: 5 does not divide dim 12"),
        ({"type": "bottleneck", "heads": 5}, r"fusion\.heads: 5 does not divide dim 12"),
        ({"type": "bottleneck", "latents": 0}, r"latents"),
    ),
)
def test_a_fusion_that_does_not_fit_is_refused_where_it_stands(fusion, sentence):
    document = federation_with({"type": "gated"}).model_dump(mode="json")
    document["model"]["fusion"] = fusion
    with pytest.raises(ValueError, match=sentence):
        Federation.model_validate(document)
