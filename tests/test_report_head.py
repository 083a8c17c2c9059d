"""Report generation: what is taught, how it is written, and when it stops."""

import pytest
import torch
from per_study import assert_gradients_separate
from torch import Tensor
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import Repaired
from mmfm_core.config.site import Site
from mmfm_core.data.dataset import Batch, load_dataset
from mmfm_core.data.manifest import Study
from mmfm_core.errors import MmfmError
from mmfm_core.models.heads.report import NOTHING, Report, ReportHead, words
from mmfm_core.models.model import MultimodalModel, full_model
from mmfm_core.models.tasks import Encoding
from mmfm_core.text import Tokenizer, open_tokenizer
from mmfm_core.text.tokenizer import wordpiece_tokenizer
from mmfm_core.text.vocabulary import train_vocabulary

REPORTS = ["Clear.", "The heart is large", "no", "Small effusion, left."]
LENGTH = 26


def model_of(**changes: object) -> Model:
    head = {"type": "report", "max_length": LENGTH, "depth": 2, "encoders": ["scan", "note"]} | changes
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
            "fusion": {"type": "joint", "depth": 1},
            "heads": {"report": head},
        }
    )


def decoded(text: str, model: Model, tokenizer: Tokenizer) -> Tensor | Repaired:
    study = Study(row=2, study="s", patient="p", split="train", inputs={}, targets={"report": text})
    return model.heads["report"].decode("report", study, model, tokenizer)


def batch_of(model: Model, reports: list[str], note_present: list[bool] | None = None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    tokenizer = open_tokenizer(model.tokenizer, None)
    everyone = torch.ones(len(reports), dtype=torch.bool)
    return Batch(
        {
            "scan": torch.randn(len(reports), 1, 16, 16, generator=generator),
            "note": tokenizer.ids(["ab"] * len(reports), 8)[0],
        },
        {"scan": everyone, "note": torch.tensor(note_present) if note_present else everyone},
        {"report": torch.stack([decoded(text, model, tokenizer) for text in reports])},
        {"report": everyone},
    )


def overfitted(config: Model, batch: Batch, steps: int = 120) -> MultimodalModel:
    torch.manual_seed(0)
    model = full_model(config, seed=0).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    for _ in range(steps):
        loss = model.losses(batch, ["report"])["report"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return model.eval()


@pytest.fixture(scope="module")
def learned() -> tuple[MultimodalModel, Batch]:
    config = model_of()
    batch = batch_of(config, REPORTS)
    return overfitted(config, batch), batch


def test_one_batch_is_learned_by_heart_and_written_again(learned):
    model, batch = learned
    predicted = model.heads["report"].predict(Encoding(model, batch))
    assert predicted["generated"] == REPORTS
    assert predicted["reference"] == REPORTS


@torch.no_grad()
def test_each_study_stops_at_its_own_end(learned):
    model, batch = learned
    head = model.heads["report"]
    together = head.generate(Encoding(model, batch))
    for row, report in enumerate(REPORTS):
        own = together[row].tolist()
        end = own.index(head.tokenizer.end_id)
        assert end == len(report) + 1  # start, one byte a letter, end
        assert set(own[end + 1 :]) <= {head.tokenizer.pad_id, head.tokenizer.end_id}
        alone = head.generate(Encoding(model, batch.rows([row])))[0].tolist()
        assert alone == own[: len(alone)]
        assert len(alone) == end + 1, "the search went on after every beam had ended"


@torch.no_grad()
def test_generation_with_a_cache_equals_decoding_from_the_start_at_every_step():
    model = full_model(model_of(beams=1), seed=0).eval()  # untrained: it never stops, and every step counts
    batch = batch_of(model_of(), REPORTS, note_present=[True, False, True, False])
    head, encoding = model.heads["report"], Encoding(model, batch)
    ids = torch.full((len(batch), 1), head.tokenizer.start_id)
    banned = sorted(head.tokenizer.special - {head.tokenizer.end_id})
    going = torch.ones(len(batch), dtype=torch.bool)
    for _ in range(LENGTH - 1):
        tokens = encoding.fused(head.encoders).tokens
        logits = head.decoder(
            ids, encoder_hidden_states=tokens.x, encoder_attention_mask=tokens.mask, use_cache=False
        ).logits[:, -1]
        logits[:, banned] = -torch.inf
        following = logits.argmax(-1).masked_fill(~going, head.tokenizer.pad_id)
        going &= following != head.tokenizer.end_id
        ids = torch.cat([ids, following[:, None]], 1)
    cached = head.generate(encoding)
    assert torch.equal(cached, ids[:, : cached.shape[1]])


def test_beam_search_finds_likelier_reports_than_the_likeliest_token_at_each_step():
    batch = batch_of(model_of(), REPORTS)

    @torch.no_grad()
    def log_likelihood(model: MultimodalModel, beams: int) -> float:
        head = model.heads["report"]
        head.search.num_beams = beams
        ids = head.generate(Encoding(model, batch))
        ids = F.pad(ids, (0, LENGTH - ids.shape[1]), value=head.tokenizer.pad_id)
        end = ids == head.tokenizer.end_id
        ids = ids.masked_fill((ids == head.tokenizer.pad_id) | (end.cumsum(1) - end.int() > 0), NOTHING)
        written = Batch(batch.inputs, batch.present, {"report": ids}, batch.usable)
        # beam search ranks by the mean log-likelihood of a report's tokens, which the loss is
        return -float(model.losses(written, ["report"])["report"].mean())

    # More or less unsure of what they say; of a sure one both find the same.
    models = [overfitted(model_of(), batch, steps) for steps in (15, 30, 45, 60)]
    gains = [log_likelihood(model, beams=4) - log_likelihood(model, beams=1) for model in models]
    assert max(gains) > 0.01
    assert sum(gains) > 0.01


def test_smoothing_is_of_the_loss_that_trains_and_not_of_the_one_that_validates():
    config = model_of(label_smoothing=0.2, dropout=0.0)
    model, batch = full_model(config, seed=0), batch_of(config, REPORTS)
    head = model.heads["report"]
    logits = head(Encoding(model, batch))
    smoothed, plain = head.train().loss(logits, batch), head.eval().loss(logits, batch)
    for row, report in enumerate(REPORTS):
        ids = [byte + 3 for byte in report.encode()] + [head.tokenizer.end_id]
        log = logits[row, : len(ids)].log_softmax(-1)
        chosen = log[torch.arange(len(ids)), ids]
        torch.testing.assert_close(plain[row], -chosen.mean())
        torch.testing.assert_close(smoothed[row], -(0.8 * chosen + 0.2 * log.mean(-1)).mean())


def test_without_dropout_training_sees_the_whole_decoder():
    batch = batch_of(model_of(), REPORTS)

    def outputs(dropout: float) -> tuple[Tensor, Tensor]:
        model = full_model(model_of(dropout=dropout), seed=0).train()
        head, encoding = model.heads["report"], Encoding(model, batch)  # which is computed once
        return head(encoding), head(encoding)

    assert torch.equal(*outputs(0.0))
    assert not torch.equal(*outputs(0.3))


@torch.no_grad()
def test_no_run_of_tokens_is_written_twice_where_that_is_asked():
    batch = batch_of(model_of(), REPORTS)
    repeats = []
    for rule in (0, 3):
        model = full_model(model_of(beams=1, no_repeat_ngram=rule), seed=0).eval()  # untrained, it repeats itself
        rows = model.heads["report"].generate(Encoding(model, batch)).tolist()
        runs = [[tuple(row[i : i + 3]) for i in range(len(row) - 2)] for row in rows]
        repeats.append(sum(len(each) - len(set(each)) for each in runs))
    assert repeats[0] > 0
    assert repeats[1] == 0


@torch.no_grad()
def test_draws_differ_between_studies_that_look_alike_and_are_the_same_again():
    config = model_of(beams=1, temperature=1.0)
    model, batch = full_model(config, seed=0).eval(), batch_of(config, REPORTS).rows([0, 0, 0])
    head = model.heads["report"]
    before = torch.random.get_rng_state()
    first = head.generate(Encoding(model, batch))
    assert torch.equal(torch.random.get_rng_state(), before), "training that follows must not depend on it"
    assert len({tuple(row) for row in first.tolist()}) == 3
    assert torch.equal(head.generate(Encoding(model, batch)), first)


@torch.no_grad()
def test_tokens_are_drawn_as_often_as_the_tempered_decoder_thinks_them_likely():
    config = model_of(beams=1, temperature=0.5)
    model = full_model(config, seed=0).eval()
    batch = batch_of(config, REPORTS[:1]).rows([0] * 4000)
    head, encoding = model.heads["report"], Encoding(model, batch)
    head.decoder.lm_head.weight.mul_(40)  # untrained, all are nearly alike
    logits = head(encoding)[0, 0].clone()
    logits[sorted(head.tokenizer.special - {head.tokenizer.end_id})] = -torch.inf
    expected = (logits / 0.5).softmax(-1)
    head.search.max_length = 2
    drawn = torch.bincount(head.generate(encoding)[:, 1], minlength=len(expected)) / 4000
    assert expected.max() < 0.9
    assert (drawn - expected).abs().max() < 4 * 0.5 / 4000**0.5


def test_a_length_penalty_makes_beam_search_prefer_longer_reports():
    batch = batch_of(model_of(), REPORTS)
    model = overfitted(model_of(beams=4), batch, 45)  # unsure of what it says
    lengths = []
    for penalty in (-4.0, 4.0):
        head = ReportHead(
            "report", 24, model_of(beams=4, length_penalty=penalty).heads["report"], model.heads["report"].tokenizer
        )
        head.load_state_dict(model.heads["report"].state_dict())
        with torch.no_grad():
            written = head.eval().generate(Encoding(model, batch))
        lengths.append(int((written != head.tokenizer.pad_id).sum()))
    assert lengths[0] < lengths[1]


def test_the_loss_is_the_mean_over_a_reports_own_tokens():
    config = model_of()
    model, batch = full_model(config, seed=0).eval(), batch_of(config, REPORTS)
    head, encoding = model.heads["report"], Encoding(model, batch)
    logits = head(encoding)
    losses = head.loss(logits, batch)
    for row, report in enumerate(REPORTS):
        ids = [byte + 3 for byte in report.encode()] + [head.tokenizer.end_id]
        chosen = logits[row, : len(ids)].log_softmax(-1)[torch.arange(len(ids)), ids]
        torch.testing.assert_close(losses[row], -chosen.mean())


def test_every_studys_gradient_is_its_own():
    config = model_of()
    batch = batch_of(config, REPORTS, note_present=[True, True, False, True])
    batch.usable["report"][2] = False
    batch.targets["report"][2] = NOTHING
    model = full_model(config, seed=0)
    assert config.heads["report"].PER_SAMPLE
    assert_gradients_separate(model, lambda rows: model.losses(batch.rows(rows), ["report"])["report"], len(batch))


def test_a_study_with_nothing_to_see_and_no_report_leaves_gradients_finite():
    config = model_of()
    batch = batch_of(config, REPORTS)
    for here in batch.present.values():
        here[0] = False
    batch.usable["report"][0] = False
    model = full_model(config, seed=0)
    model.losses(batch, ["report"])["report"].sum().backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in model.parameters())


def test_special_tokens_are_never_written():
    config = model_of(beams=1)
    model, batch = full_model(config, seed=0).eval(), batch_of(config, REPORTS)
    head = model.heads["report"]
    forbidden = head.tokenizer.special - {head.tokenizer.end_id}
    with torch.no_grad():
        head.decoder.lm_head.weight.zero_()
        head.decoder.lm_head.weight[sorted(forbidden)] = 1.0  # whatever it sees, it would write these
        head.decoder.transformer.ln_f.weight.fill_(0.0)
        head.decoder.transformer.ln_f.bias.fill_(1.0)
        written = head.generate(Encoding(model, batch))[:, 1:]
    assert not (set(written.flatten().tolist()) & forbidden)


def test_wordpiece_reports_start_once_and_a_longer_one_is_cut_with_its_end(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text(train_vocabulary(["the heart is large", "the lungs are clear"] * 3, size=200, min_frequency=2))
    tokenizer, config = wordpiece_tokenizer(path), model_of(max_length=5)
    ids = decoded("the heart", config, tokenizer)
    expected = [tokenizer.start_id, *tokenizer.encode("the heart"), tokenizer.end_id]
    assert ids.tolist() == expected + [NOTHING] * (5 - len(expected))
    cut = decoded("the heart is large the lungs", config, tokenizer)
    assert isinstance(cut, Repaired), "or nobody would count it"
    assert cut.repair == "reports longer than 5 tokens were cut"
    assert cut.target.tolist() == [tokenizer.start_id, *tokenizer.encode("the heart is"), tokenizer.end_id]


@pytest.mark.parametrize("text", ["心臓", "\N{ZERO WIDTH SPACE}"])
def test_a_report_without_any_word_the_tokenizer_knows_is_refused(tmp_path, text):
    path = tmp_path / "vocab.txt"
    path.write_text(train_vocabulary(["the heart is large"] * 3, size=200, min_frequency=2))
    with pytest.raises(MmfmError, match="holds no word that the tokenizer knows") as refused:
        decoded(text, model_of(), wordpiece_tokenizer(path))
    assert text not in str(refused.value)


def test_an_empty_cell_is_a_study_without_report(tmp_path):
    manifest = tmp_path / "manifest.csv"
    manifest.write_text("patient_id,split,text,note\n1,train,Clear.,a\n2,train,,b\n3,train,Large heart.,c\n")
    site = Site.model_validate(
        {"name": "north", "manifest": manifest, "modalities": {"note": "note"}, "targets": {"report": "text"}}
    )
    config = model_of()
    dataset = load_dataset(site, config)
    assert dataset.everything.usable["report"].tolist() == [True, False, True]
    assert set(dataset.everything.targets["report"][1].tolist()) == {NOTHING}


def test_metrics_compare_words_whatever_the_case_and_the_blanks_beside_marks():
    import pandas as pd

    head = model_of().heads["report"]
    assert isinstance(head, Report)
    assert words("No X-ray; PLEURAL effusion.") == words("no x - ray ; pleural effusion .")
    table = pd.DataFrame(
        {
            "patient": ["a", "b"],
            "generated": ["no pleural effusion . the heart is enlarged .", None],  # an empty cell, as pandas reads it
            "reference": ["No pleural effusion. The heart is enlarged.", "Large effusion."],
        }
    )
    value = {metric: head.statistic(metric, table) for metric in head.METRICS}
    ones = torch.ones(1, 2).numpy()
    # Every word that was written is right, so only the brevity penalty is left.
    lengths = [len(words(text).split()) for text in table["reference"]]
    assert float(value["bleu4"](ones)[0]) == pytest.approx(
        float(torch.exp(torch.tensor(1 - sum(lengths) / lengths[0]))), rel=1e-6
    )
    assert float(value["rouge_l"](ones)[0]) == pytest.approx(0.5)
    # stated: cardiomegaly / nothing, so 'normal'; true: cardiomegaly / effusion. One of 2 + 2 is right.
    assert float(value["finding_f1"](ones)[0]) == pytest.approx(2 * 1 / (2 + 2))
    assert value["distinct"] == 1.0
