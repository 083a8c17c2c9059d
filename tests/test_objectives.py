"""Pre-training objectives: what they hide, what they count, and whom they couple."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from per_study import assert_gradients_separate
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.data.dataset import Batch
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.objectives.masked_image import patches_of
from mmfm_core.models.tasks import Encoding
from mmfm_core.registry import ENCODERS
from mmfm_core.text import open_tokenizer

TEXTS = ["the heart is large", "a", "no effusion", "clear lungs"]


def model_of(
    objective: dict[str, Any], encoder: dict[str, Any] | None = None, fusion: str = "gated", **modalities: Any
) -> Model:
    modalities = modalities or {
        "scan": {"kind": "image2d", "size": [16, 24], "optional": True},
        "note": {"kind": "text", "max_length": 24, "optional": True},
    }
    encoders = {
        "scan": encoder or {"type": "vit", "patch_size": 4, "depth": 2},
        "note": {"type": "bert", "depth": 1},
    }
    return Model.model_validate(
        {
            "dim": 24,
            "modalities": modalities,
            "encoders": {
                name: config for name, config in encoders.items() if name in modalities or "channels" in config
            },
            "fusion": {"type": fusion, "modality_dropout": 0.3},
            "objectives": {"task": objective},
        }
    )


MASKED_IMAGE = {"type": "masked_image", "encoders": ["scan"], "decoder_dim": 24}
MASKED_TEXT = {"type": "masked_text", "encoders": ["note"]}
MATCHING = {"type": "matching", "encoders": ["scan", "note"]}
CENTRE = {"type": "centre"}
CONTRASTS = {name: {"kind": "image2d", "size": [16, 24], "optional": True} for name in ("t1", "t2")}


def batch_of(model: Model, **present: list[bool]) -> Batch:
    generator = torch.Generator().manual_seed(0)
    everyone = torch.ones(len(TEXTS), dtype=torch.bool)
    inputs = {
        name: open_tokenizer(model.tokenizer, None).ids(TEXTS, modality.max_length)[0]
        if modality.kind == "text"
        else torch.randn(len(TEXTS), getattr(modality, "channels", 1), *modality.size, generator=generator)
        for name, modality in model.modalities.items()
    }
    here = {name: torch.tensor(present[name]) if name in present else everyone for name in model.modalities}
    read = {name: torch.stack([here[m] for m in e.inputs(name)]).any(0) for name, e in model.encoders.items()}
    return Batch(inputs, here, {}, {"task": model.objectives["task"].usable(model, read)})


def trained(model: MultimodalModel, batch: Batch, steps: int) -> list[float]:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    history = []
    for _ in range(steps):
        loss = model.losses(batch, ["task"])["task"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        history.append(loss.item())
    return history


# Masked images


def test_patches_are_cut_in_the_order_in_which_the_encoder_embeds_them():
    """A convolution with an identity kernel is the encoder's own way of cutting."""
    image = torch.randn(2, 3, 8, 12)
    identity = torch.eye(3 * 16).reshape(48, 3, 4, 4)
    torch.testing.assert_close(patches_of(image, (4, 4)), F.conv2d(image, identity, stride=4).flatten(2).mT)
    volume = torch.randn(2, 1, 8, 4, 12)
    identity = torch.eye(64).reshape(64, 1, 4, 4, 4)
    torch.testing.assert_close(patches_of(volume, (4, 4, 4)), F.conv3d(volume, identity, stride=4).flatten(2).mT)


def test_the_mask_is_each_studys_own_and_keeps_a_quarter():
    model = full_model(model_of(MASKED_IMAGE).model_copy(), seed=0)
    torch.manual_seed(0)
    visible = model.objectives["task"].visible(50)
    assert visible.shape == (50, 6)  # of 4 x 6 patches
    assert all(len(set(row)) == 6 for row in visible.tolist())
    assert len({tuple(sorted(row)) for row in visible.tolist()}) > 40
    assert set(visible.flatten().tolist()) == set(range(24))


def test_the_loss_is_the_error_of_hidden_patches_alone():
    config = model_of(MASKED_IMAGE)
    model, batch = full_model(config, seed=0).eval(), batch_of(config)
    objective, encoding = model.objectives["task"], Encoding(model, batch)
    visible = objective.visible(len(batch))
    drawn, losses = objective.redraw(encoding, visible), objective.loss(encoding, visible)
    for row in range(len(batch)):
        errors = []
        for index in set(range(24)) - set(visible[row].tolist()):
            top, left = 4 * (index // 6), 4 * (index % 6)
            patch = batch.inputs["scan"][row, 0, top : top + 4, left : left + 4].flatten()
            patch = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
            errors.append(((drawn[row, index] - patch) ** 2).mean())
        torch.testing.assert_close(losses[row], torch.stack(errors).mean(), rtol=1e-4, atol=1e-5)


def test_what_is_hidden_does_not_reach_the_drawing():
    config = model_of(MASKED_IMAGE)
    model, batch = full_model(config, seed=0).eval(), batch_of(config)
    objective = model.objectives["task"]
    visible = objective.visible(len(batch))
    before = objective.redraw(Encoding(model, batch), visible)
    shown = torch.zeros(len(batch), 24).scatter(1, visible, 1.0).reshape(-1, 1, 4, 6)
    hidden = ~shown.repeat_interleave(4, 2).repeat_interleave(4, 3).bool()
    batch.inputs["scan"][hidden] = 99.0
    torch.testing.assert_close(objective.redraw(Encoding(model, batch), visible), before)


def waves(count: int, size: tuple[int, ...]) -> Tensor:
    """Smooth pictures, each told by its few parameters, so that a part tells the rest."""
    generator = torch.Generator().manual_seed(1)
    axes = torch.meshgrid(*(torch.linspace(0, 6.3, side) for side in size), indexing="ij")
    shifts = torch.rand(count, len(size), generator=generator) * 6.3
    pictures = [sum(torch.sin(axis + shift) for axis, shift in zip(axes, row, strict=True)) for row in shifts]
    return torch.stack(pictures)[:, None]


def test_images_are_learned_that_their_parts_foretell():
    config = model_of(MASKED_IMAGE | {"mask_ratio": 0.5}, scan={"kind": "image2d", "size": [16, 24]})
    model, everyone = full_model(config, seed=0), torch.ones(32, dtype=torch.bool)
    batch = Batch({"scan": waves(32, (16, 24))}, {"scan": everyone}, {}, {"task": everyone})
    history = trained(model, batch, steps=150)
    # A patch is standardised: 1 is what drawing its mean alone costs.
    assert history[0] > 0.9
    assert sum(history[-10:]) / 10 < 0.4


@pytest.mark.skipif("vit3d" not in ENCODERS, reason="the encoder of volumes is not in the registry")
def test_volumes_are_masked_and_redrawn_too():
    config = model_of(
        MASKED_IMAGE | {"mask_ratio": 0.5},
        {"type": "vit3d", "patch_size": 4, "depth": 1},
        scan={"kind": "volume3d", "size": [8, 8, 12]},
    )
    model, everyone = full_model(config, seed=0), torch.ones(16, dtype=torch.bool)
    batch = Batch({"scan": waves(16, (8, 8, 12))}, {"scan": everyone}, {}, {"task": everyone})
    history = trained(model, batch, steps=120)
    assert history[0] > 0.9
    assert sum(history[-10:]) / 10 < 0.6


def test_a_missing_contrast_is_no_target_and_has_no_influence():
    config = model_of(MASKED_IMAGE, {"type": "vit", "patch_size": 4, "depth": 1, "channels": ["t1", "t2"]}, **CONTRASTS)
    model = full_model(config, seed=0).eval()
    batch = batch_of(config, t2=[True, False, True, False], t1=[True, True, True, False])
    assert batch.usable["task"].tolist() == [True, True, True, False]
    objective = model.objectives["task"]
    visible = objective.visible(len(batch))
    before = objective.loss(Encoding(model, batch), visible)
    for name in ("t1", "t2"):
        batch.inputs[name][~batch.present[name]] = 1000.0
    after = objective.loss(Encoding(model, batch), visible)
    torch.testing.assert_close(after[:3], before[:3])
    assert after.isfinite().all()
    only_t1 = Batch({"t1": batch.inputs["t1"]}, {"t1": batch.present["t1"]}, {}, batch.usable)
    without = objective.loss(Encoding(model, only_t1), visible)
    torch.testing.assert_close(without[1], after[1])


def test_every_studys_masked_image_gradient_is_its_own():
    config = model_of(MASKED_IMAGE, {"type": "vit", "patch_size": 4, "depth": 1, "channels": ["t1", "t2"]}, **CONTRASTS)
    config = config.model_copy(update={"fusion": config.fusion.model_copy(update={"modality_dropout": 0.0})})
    model, batch = full_model(config, seed=0), batch_of(config, t2=[True, False, True, True])
    assert config.objectives["task"].PER_SAMPLE
    objective = model.objectives["task"]
    visible = objective.visible(len(batch))
    assert_gradients_separate(
        model, lambda rows: objective.loss(Encoding(model, batch.rows(rows)), visible[rows]), len(batch)
    )


def test_an_encoder_without_patches_is_refused():
    with pytest.raises(ValueError, match="'note' has no patches to hide"):
        model_of(MASKED_IMAGE | {"encoders": ["note"]})


# Masked text


def test_a_text_has_at_least_one_hidden_token_and_never_a_special_one():
    config = model_of(MASKED_TEXT)
    model, batch = full_model(config, seed=0), batch_of(config)
    objective, ids = model.objectives["task"], batch.inputs["note"]
    special = torch.tensor(sorted(objective.tokenizer.special))
    torch.manual_seed(0)
    for _ in range(50):
        _, hidden = objective.mask(ids)
        assert hidden.any(1).all()
        assert not (hidden & torch.isin(ids, special)).any()


def test_hidden_tokens_become_the_mask_another_or_stay_as_in_bert():
    model = full_model(model_of(MASKED_TEXT), seed=0)
    objective = model.objectives["task"]
    ids = torch.randint(3, 250, (200, 200), generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    shown, hidden = objective.mask(ids)
    assert hidden.float().mean() == pytest.approx(0.15, abs=0.01)
    assert torch.equal(shown[~hidden], ids[~hidden])
    masked = shown[hidden] == objective.tokenizer.mask_id
    same = shown[hidden] == ids[hidden]
    assert masked.float().mean() == pytest.approx(0.8, abs=0.02)
    assert same.float().mean() == pytest.approx(0.1, abs=0.02)
    others = shown[hidden][~masked]
    assert not torch.isin(others, torch.tensor(sorted(objective.tokenizer.special))).any()


def test_the_loss_is_the_mean_over_a_texts_own_hidden_tokens():
    config = model_of(MASKED_TEXT)
    model, batch = full_model(config, seed=0).eval(), batch_of(config)
    objective, encoding = model.objectives["task"], Encoding(model, batch)
    torch.manual_seed(1)
    shown, hidden = objective.mask(batch.inputs["note"])
    losses = objective.loss(encoding, shown, hidden)
    states = encoding.encoder("note")(shown).x
    for row in range(len(batch)):
        places = hidden[row].nonzero()[:, 0]
        logits = objective.guess(states[row, places])
        torch.testing.assert_close(losses[row], F.cross_entropy(logits, batch.inputs["note"][row, places]))


def test_words_are_learned():
    config = model_of(MASKED_TEXT | {"mask_ratio": 0.3})
    history = trained(full_model(config, seed=0), batch_of(config), steps=150)
    assert history[0] > 5  # 260 tokens, evenly: 5.6
    assert sum(history[-10:]) / 10 < 1.5


def test_every_studys_masked_text_gradient_is_its_own():
    config = model_of(MASKED_TEXT)
    model, batch = full_model(config, seed=0), batch_of(config)
    assert config.objectives["task"].PER_SAMPLE
    objective = model.objectives["task"]
    shown, hidden = objective.mask(batch.inputs["note"])
    assert_gradients_separate(
        model, lambda rows: objective.loss(Encoding(model, batch.rows(rows)), shown[rows], hidden[rows]), len(batch)
    )


def test_a_text_with_nothing_to_hide_costs_nothing():
    config = model_of(MASKED_TEXT)
    model, batch = full_model(config, seed=0), batch_of(config).rows([0, 1])
    note = open_tokenizer(config.tokenizer, None).ids(["", "ab"], 24)[0]
    losses = model.losses(replace(batch, inputs={**batch.inputs, "note": note}), ["task"])["task"]
    assert losses[0] == 0
    assert losses[1] > 0


# Matching


def test_right_pairs_are_told_from_wrong_ones():
    config = model_of(MATCHING)
    history = trained(full_model(config, seed=0), batch_of(config), steps=150)
    assert history[0] == pytest.approx(0.69, abs=0.2)
    assert sum(history[-10:]) / 10 < 0.15


def test_a_studys_matching_loss_depends_on_its_neighbours_and_says_so():
    config = model_of(MATCHING)
    model, batch = full_model(config, seed=0).eval(), batch_of(config)
    assert not config.objectives["task"].PER_SAMPLE
    among_all = model.losses(batch, ["task"])["task"][0]
    beside_one = model.losses(batch.rows([0, 2]), ["task"])["task"][0]
    assert not torch.isclose(among_all, beside_one, rtol=1e-4)


def test_wrong_pairs_are_made_of_studies_that_have_both_alone():
    config = model_of(MATCHING)
    model = full_model(config, seed=0).eval()
    batch = batch_of(config, scan=[True, False, True, True], note=[True, True, True, False])
    assert batch.usable["task"].tolist() == [True, False, True, False]
    losses = model.losses(batch, ["task"])["task"]
    torch.testing.assert_close(losses[[0, 2]], model.losses(batch.rows([0, 2]), ["task"])["task"])
    assert losses[[1, 3]].tolist() == [0, 0]


def test_the_text_of_another_study_is_no_wrong_one_where_it_is_the_same():
    config = model_of(MATCHING)
    model, batch = full_model(config, seed=0).eval(), batch_of(config).rows([0, 2])
    batch.inputs["note"][1] = batch.inputs["note"][0]
    logits = model.objectives["task"]
    encoding = Encoding(model, batch)
    right = logits.linear(logits.norm(model.fusion(encoding.parts).pooled))
    expected = F.cross_entropy(right, torch.tensor([1, 1]), reduction="none")
    torch.testing.assert_close(model.losses(batch, ["task"])["task"], expected)


def test_a_site_with_one_of_the_two_has_nothing_to_match():
    config = model_of(MATCHING)
    model = MultimodalModel(config, ["scan"], [], seed=0)
    batch = batch_of(config)
    images = Batch(
        {"scan": batch.inputs["scan"]}, {"scan": batch.present["scan"]}, {}, {"task": torch.zeros(4, dtype=torch.bool)}
    )
    assert model.losses(images, ["task"])["task"].tolist() == [0, 0, 0, 0]


# Centres


def test_a_step_of_sgd_at_rate_one_moves_each_centre_to_the_mean_of_the_studies_that_have_the_modality():
    config = model_of(CENTRE, fusion="sum")
    here = [True, False, True, True]
    model, batch = full_model(config, seed=0).eval(), batch_of(config, scan=here)
    centre = model.fusion.centre.weight
    assert not centre.any()
    encoding = Encoding(model, batch)
    scan, note = (encoding.parts[name].mean() for name in ("scan", "note"))
    losses = model.losses(batch, ["task"])["task"]
    torch.testing.assert_close(losses[1], note[1].square().sum() / 2)
    torch.testing.assert_close(losses[0], (scan[0].square().sum() + note[0].square().sum()) / 2)
    (gradient,) = torch.autograd.grad(losses.sum(), [centre])
    torch.testing.assert_close(-gradient[0] / 3, scan[here].mean(0))
    torch.testing.assert_close(-gradient[1] / 4, note.mean(0))


def test_a_sum_of_centred_vectors_is_zero_on_average_and_lacks_nothing_where_a_modality_is_absent():
    config = model_of(CENTRE, fusion="sum")
    model, batch = full_model(config, seed=0).eval(), batch_of(config, scan=[True, False, True, True])
    encoding = Encoding(model, batch)
    scan, note = (encoding.parts[name].mean().detach() for name in ("scan", "note"))
    with torch.no_grad():
        model.fusion.centre.weight.copy_(torch.stack([scan[[0, 2, 3]].mean(0), note.mean(0)]))
    pooled = encoding.fused().pooled
    torch.testing.assert_close(pooled[1], note[1] - note.mean(0))
    torch.testing.assert_close(pooled.mean(0), torch.zeros(24), rtol=0, atol=1e-6)


def test_every_studys_gradient_of_a_centre_is_its_own():
    config = model_of(CENTRE, fusion="sum")
    model, batch = full_model(config, seed=0), batch_of(config, scan=[True, False, True, True])
    assert config.objectives["task"].PER_SAMPLE
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["task"])["task"], len(batch))


def test_centres_without_a_fusion_that_has_some_are_refused():
    with pytest.raises(ValueError, match="'centre' is for the fusion 'sum', and the document's is 'gated'"):
        model_of(CENTRE)
