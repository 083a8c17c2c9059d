"""Text: a transformers BERT."""

from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import PositiveInt
from torch import Tensor
from transformers import BertConfig, BertModel

from mmfm_core.config.modality import TextModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.tokens import Tokens
from mmfm_core.text import Tokenizer, open_tokenizer


class Bert(EncoderConfig):
    """A transformers BERT (Devlin et al. 2019), from random weights."""

    READS = ("text",)

    type: Literal["bert"]
    depth: PositiveInt = 4
    heads: PositiveInt = 3

    def check(self, model: Model, name: str) -> None:
        """Check width against heads."""
        check_transformer(self.heads, model.dim)

    def build(self, model: Model, name: str, artifacts: Path) -> "TextEncoder":
        """The encoder, with random weights."""
        modality = cast(TextModality, model.modalities[name])
        return TextEncoder(model.dim, modality, self, open_tokenizer(model.tokenizer, artifacts))


class TextEncoder(Encoder):
    """Token ids through a BERT encoder."""

    def __init__(self, dim: int, modality: TextModality, config: Bert, tokenizer: Tokenizer) -> None:
        super().__init__(dim)
        self.pad_id = tokenizer.pad_id
        self.bert = BertModel(
            BertConfig(
                vocab_size=tokenizer.size,
                hidden_size=dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=4 * dim,
                max_position_embeddings=modality.max_length,
                pad_token_id=tokenizer.pad_id,
            ),
            add_pooling_layer=False,
        )

    def features(self, x: Tensor) -> Tensor:
        """[B, L] ids -> [B, 1, longest text in the batch, D]."""
        ids = x[:, : int((x != self.pad_id).any(0).sum())]
        # One row of positions per study: BERT's own [1, L] loses per-patient gradients.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        states: Tensor = self.bert(ids, attention_mask=ids != self.pad_id, position_ids=positions).last_hidden_state
        return states[:, None]

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens with padding masked."""
        return Tokens(features[:, 0], (x != self.pad_id)[:, : features.shape[2]])
