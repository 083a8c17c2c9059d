"""Retrieval: the contrastive losses, what counts as right, and whom they couple."""

import math

import pandas as pd
import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.site import Site
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import read_manifest
from mmfm_core.errors import MmfmError
from mmfm_core.models.heads.retrieval import Pairs, clip_loss, siglip_loss
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.text import open_tokenizer


def model_of(**changes: object) -> Model:
    head = {"type": "retrieval", "encoders": ["scan", "note"], "embed_dim": 16} | changes
    return Model.model_validate(
        {
            "dim": 24,
            "modalities": {
                "scan": {"kind": "image2d", "size": [16, 16], "optional": True},
                "note": {"kind": "text", "max_length": 8, "optional": True},
            },
            "encoders": {
                "scan": {"type": "vit", "patch_size": 8, "depth": 1},
                "note": {"type": "bert", "depth": 1},
            },
            "fusion": {"type": "gated"},
            "heads": {"match": head},
        }
    )


def pairs(texts: list[str], scan_present: list[bool] | None = None, note_present: list[bool] | None = None) -> Batch:
    """One random image per study, and its text."""
    generator = torch.Generator().manual_seed(0)
    present = {
        "scan": torch.tensor(scan_present or [True] * len(texts)),
        "note": torch.tensor(note_present or [True] * len(texts)),
    }
    model = model_of()
    inputs = {
        "scan": torch.randn(len(texts), 1, 16, 16, generator=generator),
        "note": open_tokenizer(model.tokenizer, None).ids(texts, 8)[0],
    }
    usable = model.heads["match"].usable(model, present, torch.zeros(len(texts), dtype=torch.bool))
    return Batch(inputs, present, {}, {"match": usable})


def trained(model: MultimodalModel, batch: Batch, steps: int) -> MultimodalModel:
    torch.manual_seed(0)
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model.losses(batch, ["match"])["match"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@torch.no_grad()
def table_of(model: MultimodalModel, batch: Batch) -> pd.DataFrame:
    columns = model.heads["match"].predict(Encoding(model, batch))
    return pd.DataFrame({"patient": [str(row) for row in range(len(batch))]} | columns)


def value(config: Model, metric: str, table: pd.DataFrame) -> float:
    statistic = config.heads["match"].statistic(metric, table)
    return statistic if isinstance(statistic, float) else float(statistic(torch.ones(1, len(table)).numpy())[0])


def test_clip_loss_of_orthogonal_pairs_is_its_closed_form():
    logits = 3.0 * torch.eye(4)
    expected = torch.full((4,), -math.log(math.exp(3) / (math.exp(3) + 3)))
    torch.testing.assert_close(clip_loss(logits, torch.eye(4).bool()), expected)


def test_clip_loss_is_torchs_cross_entropy_in_both_directions():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    both = (F.cross_entropy(logits, torch.arange(5)) + F.cross_entropy(logits.T, torch.arange(5))) / 2
    torch.testing.assert_close(clip_loss(logits, torch.eye(5).bool()).mean(), both)


def test_siglip_loss_is_the_papers_sum_over_all_pairs():
    logits = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
    labels = 2 * torch.eye(5) - 1  # +1 on the diagonal, -1 off it
    expected = -torch.log(1 / (1 + torch.exp(-labels * logits))).sum() / 5
    torch.testing.assert_close(siglip_loss(logits, torch.eye(5).bool()).mean(), expected)


def test_another_study_with_the_same_text_is_no_wrong_answer():
    logits = torch.randn(3, 3, generator=torch.Generator().manual_seed(0))
    same = torch.eye(3).bool()
    same[0, 1] = same[1, 0] = True
    # Study 2 sees all; of studies 0 and 1 each one's choice is between itself and study 2.
    first = (
        F.cross_entropy(logits[[0]][:, [0, 2]], torch.tensor([0]))
        + F.cross_entropy(logits.T[[0]][:, [0, 2]], torch.tensor([0]))
    ) / 2
    torch.testing.assert_close(clip_loss(logits, same)[0], first)
    expected = F.softplus(-logits[0, 0]) + F.softplus(-logits[0, 1]) + F.softplus(logits[0, 2])
    torch.testing.assert_close(siglip_loss(logits, same)[0], expected)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_planted_pairs_are_found_in_both_directions(loss):
    config = model_of(loss=loss)
    batch = pairs([chr(ord("a") + row) * 3 for row in range(24)])
    model = full_model(config, seed=0)
    untrained = table_of(model.eval(), batch)
    assert value(config, "recall_at_1", untrained) < 0.3
    table = table_of(trained(model, batch, steps=120), batch)
    for metric in ("recall_at_1", "recall_at_10", "image_to_text_at_10", "text_to_image_at_10", "mrr"):
        assert value(config, metric, table) > 0.9, metric
    for direction in ("image_to_text", "text_to_image"):
        assert value(config, f"{direction}_chance_at_10", table) == pytest.approx(10 / 24)


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_only_studies_with_both_take_part_and_the_others_change_nothing(loss):
    model = full_model(model_of(loss=loss), seed=0).eval()
    texts = ["aa", "bb", "cc", "dd", "ee"]
    batch = pairs(texts, [True, True, False, True, True], [True, True, True, False, True])
    assert batch.usable["match"].tolist() == [True, True, False, False, True]
    losses = model.losses(batch, ["match"])["match"]
    torch.testing.assert_close(losses[[0, 1, 4]], model.losses(batch.rows([0, 1, 4]), ["match"])["match"])
    assert losses[[2, 3]].tolist() == [0, 0]
    losses.sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_a_batch_in_which_nobody_has_both_has_a_loss_of_zero(loss):
    model = full_model(model_of(loss=loss), seed=0)
    batch = pairs(["aa", "bb"], [True, False], [False, True])
    losses = model.losses(batch, ["match"])["match"]
    assert losses.tolist() == [0, 0]
    losses.sum().backward()


@pytest.mark.parametrize("loss", ["clip", "siglip"])
def test_the_loss_does_not_separate_by_study_and_says_so(loss):
    config = model_of(loss=loss)
    model, batch = full_model(config, seed=0).eval(), pairs(["aa", "bb", "cc"])
    assert not config.heads["match"].PER_SAMPLE
    trained(model, batch, steps=5)  # away from SigLIP's first bias, which silences wrong pairs
    with_the_others = model.losses(batch, ["match"])["match"][0]
    alone = model.losses(batch.rows([0]), ["match"])["match"][0]
    assert not torch.isclose(with_the_others, alone, rtol=1e-3)


def test_the_embeddings_come_from_before_the_fusion():
    """The image's embedding must not know the text, or every image would find its own."""
    model = full_model(model_of(), seed=0).eval()
    one, other = pairs(["aa", "bb"]), pairs(["zz", "yy"])
    before, after = (model.heads["match"](Encoding(model, batch)) for batch in (one, other))
    assert isinstance(before, Pairs)
    torch.testing.assert_close(before.image, after.image)
    assert not torch.allclose(before.text, after.text, atol=1e-3)


def test_identical_texts_share_a_group_that_does_not_spell_them_and_survives_a_csv(tmp_path):
    config = model_of()
    model, batch = full_model(config, seed=0).eval(), pairs(["aa", "bb", "aa", "cc"])
    table = table_of(model, batch)
    assert table["group"][0] == table["group"][2]
    assert table["group"].nunique() == 3
    table.to_csv(tmp_path / "table.csv", index=False)
    again = pd.read_csv(tmp_path / "table.csv")
    for metric in config.heads["match"].METRICS:
        assert value(config, metric, again) == value(config, metric, table)
    assert value(config, "recall_at_10", table.assign(image=table["image"].iloc[0])) == 1.0  # all within the first 10
    # One embedding for all: every wrong candidate ties, and counts before the right one.
    collapsed = table.assign(image=table["image"].iloc[0], text=table["image"].iloc[0])
    assert value(config, "recall_at_1", collapsed) == 0.0


def test_the_order_of_the_encoders_is_checked():
    with pytest.raises(ValueError, match="name the encoder of the images first"):
        model_of(encoders=["note", "scan"])


def test_a_target_column_is_refused(tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("patient_id,split,note\n1,train,a\n")
    site = Site.model_validate(
        {"name": "north", "manifest": manifest, "modalities": {"note": "note"}, "targets": {"match": "note"}}
    )
    with pytest.raises(MmfmError, match="retrieval has no target column"):
        read_manifest(site, model_of())


@pytest.mark.parametrize(("held", "has"), [(["scan", "note"], True), (["scan"], False), (["note"], False)])
def test_a_site_has_the_head_where_it_has_both_encoders(held, has):
    assert (model_of().held(held, []).heads == ("match",)) is has


def test_the_scale_of_similarities_stays_below_a_hundred():
    model = full_model(model_of(), seed=0)
    temperature = model.heads["match"].temperature
    with torch.no_grad():
        temperature.log_scale.fill_(50.0)
    cosine: Tensor = torch.tensor([[0.5]])
    torch.testing.assert_close(temperature(cosine), torch.tensor([[50.0]]))
