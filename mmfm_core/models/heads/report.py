"""Report generation: a text column, written from what the encoders saw. Trained first, it is captioning."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import pandas as pd
import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt
from torch import Tensor
from torch.nn import functional as F
from transformers import DynamicCache, EncoderDecoderCache, GenerationConfig, GPT2Config, GPT2LMHeadModel

from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig, Repaired
from mmfm_core.config.site import Column
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics import reports
from mmfm_core.metrics.binary import Bools, f1
from mmfm_core.metrics.statistic import Statistic, mean_of
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.model import seeded
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer, open_tokenizer
from mmfm_core.text.findings import label_findings

NOTHING = -1
"""Stands behind a report's end, and in every place of a study without one. (The padding's id is the vocabulary's.)"""


class Report(HeadConfig):
    """A report in words. The site maps a text column to the head's name under `targets`.

    Attributes:
        max_length: tokens of a report, its start and end included; a longer one is cut, as reference too.
        depth: layers of the decoder.
        heads: attention heads of each.
        dropout: share of embeddings, attention weights and layer outputs that the decoder does not see in training.
        label_smoothing: share of the target that goes to all tokens alike in training (Szegedy et al. 2016), so that
            a decoder of few reports stays unsure; the loss that it is trained by then never reaches zero.
        beams: beams of the search; 1 takes the likeliest token at each step.
        temperature: 0 searches for the likeliest report, which of few studies is soon the commonest one's. Above it,
            tokens are drawn, from what the decoder thinks of them sharpened (below 1) or flattened; the draws are the
            same whenever the same batch is written.
        length_penalty: beams are ranked by their log-likelihood divided by their length to this power: above 1 for
            longer reports than the mean log-likelihood would give, below 1 for shorter ones.
        no_repeat_ngram: no run of so many tokens is written twice in a report; 0 for no such rule.
    """

    METRICS = ("bleu4", "rouge_l", "finding_f1", "finding_f1_macro", "distinct")

    type: Literal["report"]
    max_length: int = Field(default=128, ge=3)
    depth: PositiveInt = 2
    heads: PositiveInt = 3
    dropout: float = Field(default=0.1, ge=0, lt=1)
    label_smoothing: float = Field(default=0.0, ge=0, lt=1)
    beams: PositiveInt = 3
    temperature: NonNegativeFloat = 0.0
    length_penalty: float = 1.0
    no_repeat_ngram: NonNegativeInt = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """Reports have no classes; they are counted."""
        return ("reports",)

    def check(self, model: Model) -> None:
        """Check width against heads."""
        check_transformer(self.heads, model.dim)

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[str | None]:
        """Each study's report."""
        if not isinstance(mapping, Column):
            raise MmfmError(f"site '{table.site.name}': {field}: reports are mapped by 'column: NAME'")
        return table.cells(mapping, field)

    def count(self, target: Any) -> Mapping[str, int]:
        """One report."""
        return {"reports": 1}

    def unlabelled(self, model: Model) -> Tensor:
        """Nothing, in every place of a report."""
        return torch.full((self.max_length,), NOTHING)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor | Repaired:
        """Ids [max_length]: the start token, the report's own, the end token, `NOTHING`. A longer one is cut."""
        text = study.targets[name]
        if tokenizer.special.issuperset(tokenizer.encode(text)):
            raise MmfmError(
                "holds no word that the tokenizer knows; list the cell under 'missing', or use a vocabulary of its "
                "language"
            )
        start = [] if tokenizer.prefix else [tokenizer.start_id]
        (ids,), cut = tokenizer.ids([text], self.max_length - len(start))
        target = torch.cat([torch.tensor(start, dtype=ids.dtype), ids.masked_fill(ids == tokenizer.pad_id, NOTHING)])
        return Repaired(target, f"reports longer than {self.max_length} tokens were cut") if cut else target

    def build(self, model: Model, name: str, artifacts: Path) -> "ReportHead":
        """The head, with random weights."""
        return ReportHead(name, model.dim, self, open_tokenizer(model.tokenizer, artifacts))

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic | float | None:
        """See `mmfm_core.metrics.reports`.

        `finding_f1` counts all findings and 'normal' together (micro, as on CheXpert's 14 labels), and
        `finding_f1_macro` averages them: see `mmfm_core.text.findings`.
        """
        if table.empty:
            return None
        # pandas reads an empty cell back as a number.
        generated, references = (list(table[column].fillna("").map(words)) for column in ("generated", "reference"))
        match metric:
            case "bleu4":
                return reports.bleu4(reports.bleu_counts(generated, references))
            case "rouge_l":
                return mean_of(reports.rouge_l(generated, references))
            case "distinct":
                return reports.distinct(generated)
        over_findings = f1 if metric == "finding_f1" else reports.macro_f1
        return over_findings(stated_in(generated), stated_in(references))


def words(report: str) -> str:
    """A report as all its metrics compare it: lower case, a space around every punctuation mark.

    What a vocabulary's decoder leaves beside a mark ('x-ray', 'x - ray') is thereby of no account.
    """
    return " ".join(re.findall(r"\w+|[^\w\s]", report.lower()))


def stated_in(texts: Sequence[str]) -> Bools:
    """The findings that each report states, and whether it is normal, [N, F]."""
    # The rules know sentences by their full stops, and hyphenated words, as they are written.
    written = [re.sub(r" ([.,;:?!])", r"\1", text.replace(" - ", "-")) for text in texts]
    return np.array([list(label_findings(text).values()) for text in written], dtype=np.bool_)


class ReportHead(Head):
    """A transformers GPT-2 with cross-attention on the fused tokens (Radford et al. 2019), from random weights."""

    def __init__(self, name: str, dim: int, config: Report, tokenizer: Tokenizer) -> None:
        super().__init__()
        self.name, self.encoders, self.tokenizer = name, config.encoders, tokenizer
        self.label_smoothing = config.label_smoothing
        self.decoder = GPT2LMHeadModel(
            GPT2Config(
                vocab_size=tokenizer.size,
                n_positions=config.max_length,
                n_embd=dim,
                n_layer=config.depth,
                n_head=config.heads,
                bos_token_id=tokenizer.start_id,
                eos_token_id=tokenizer.end_id,
                resid_pdrop=config.dropout,
                embd_pdrop=config.dropout,
                attn_pdrop=config.dropout,
                add_cross_attention=True,
                tie_word_embeddings=False,  # one tensor used twice has no per-patient gradient
            )
        )
        self.search = GenerationConfig(
            num_beams=config.beams,
            do_sample=config.temperature > 0,
            **({"temperature": config.temperature, "top_k": 0} if config.temperature else {}),  # of all tokens
            length_penalty=config.length_penalty if config.beams > 1 else None,  # which a search without beams refuses
            no_repeat_ngram_size=config.no_repeat_ngram,
            max_length=config.max_length,
            bos_token_id=tokenizer.start_id,
            eos_token_id=tokenizer.end_id,
            pad_token_id=tokenizer.pad_id,
            suppress_tokens=sorted(tokenizer.special - {tokenizer.end_id}),
        )

    def forward(self, encoding: Encoding) -> Tensor:
        """Logits [B, max_length - 1, vocabulary] of each next token, the true ones before it given."""
        ids = encoding.batch.targets[self.name][:, :-1].clamp(min=0)
        # One row of positions per study: GPT-2's own [1, L] loses per-patient gradients. What follows a report's end
        # needs no mask, because attention is causal.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        logits: Tensor = self.decoder(ids, position_ids=positions, use_cache=False, **self._seen(encoding)).logits
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Cross-entropy, [B]: the mean over a report's own tokens and its end, smoothed in training alone."""
        following = batch.targets[self.name][:, 1:]
        smoothing = self.label_smoothing if self.training else 0.0
        logits = outputs.transpose(1, 2)
        each = F.cross_entropy(logits, following, ignore_index=NOTHING, reduction="none", label_smoothing=smoothing)
        return each.sum(1) / (following != NOTHING).sum(1).clamp(min=1)

    def predict(self, encoding: Encoding) -> dict[str, list[str]]:
        """The text that beam search finds, each study's up to its own end token, and the reference."""
        references = encoding.batch.targets[self.name]
        return {
            "generated": self.tokenizer.texts(self.generate(encoding)),
            "reference": self.tokenizer.texts(references.masked_fill(references == NOTHING, self.tokenizer.pad_id)),
        }

    def generate(self, encoding: Encoding) -> Tensor:
        """Ids [B, at most max_length], start token first; nothing of meaning behind the end token."""
        start = torch.full((len(encoding.batch), 1), self.tokenizer.start_id, device=self.decoder.device)
        # Of its own, generate() makes a cache that cross-attention cannot use.
        cache = EncoderDecoderCache(DynamicCache(), DynamicCache())
        seen = self._seen(encoding)
        with seeded("draws", self.name):
            ids = self.decoder.generate(start, self.search, attention_mask=start >= 0, past_key_values=cache, **seen)
        return cast(Tensor, ids)

    def _seen(self, encoding: Encoding) -> dict[str, Tensor]:
        tokens = encoding.fused(self.encoders).tokens
        # A study with nothing to see is not counted, but its attention must not divide by zero.
        mask = tokens.mask | ~tokens.mask.any(1, keepdim=True)
        return {"encoder_hidden_states": tokens.x, "encoder_attention_mask": mask}
