"""Text: a transformers BERT."""

from pathlib import Path
from typing import Literal, cast

import torch
from pydantic import Field, PositiveInt
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mmfm_core.config.modality import TextModality
from mmfm_core.config.model import Artifact, Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.errors import MmfmError
from mmfm_core.models.encoders import pretrained
from mmfm_core.models.encoders.base import Encoder, FeatureDropout
from mmfm_core.models.encoders.vit import check_transformer
from mmfm_core.models.tokens import Tokens
from mmfm_core.text import Tokenizer, open_tokenizer

DEPTH, HEADS = 4, 3


class Bert(EncoderConfig):
    """A transformers BERT (Devlin et al. 2019), from random weights or from a checkpoint.

    Attributes:
        depth: layers, 4 if not given; a checkpoint says its own.
        heads: attention heads, 3 if not given; a checkpoint says its own.
        dropout: share of the trunk's features that what follows it does not see in training. On a frozen trunk, few
            studies are soon known by heart.
        pretrained: a folder as `save_pretrained` writes it, of a BERT with the document's vocabulary. Where its width
            is not the model's, a linear layer follows it.
    """

    READS = ("text",)

    type: Literal["bert"]
    depth: PositiveInt | None = None
    heads: PositiveInt | None = None
    dropout: float = Field(default=0.0, ge=0, lt=1)
    pretrained: Artifact | None = None

    def check(self, model: Model, name: str) -> None:
        """Check width against heads, and that nothing is said twice."""
        if self.pretrained is None:
            check_transformer(self.heads or HEADS, model.dim)
            return
        for said in ("depth", "heads"):
            if getattr(self, said) is not None:
                raise ValueError(f"{said}: the checkpoint's config.json says it; leave it out")

    def build(self, model: Model, name: str, artifacts: Path) -> "TextEncoder":
        """The encoder, with random weights or those of its checkpoint."""
        modality = cast(TextModality, model.modalities[name])
        tokenizer = open_tokenizer(model.tokenizer, artifacts)
        if self.pretrained is None:
            return TextEncoder(model.dim, self._random(model.dim, modality, tokenizer), tokenizer, self.dropout)
        field = f"model.encoders.{name}.pretrained"
        bert = pretrained.bert(artifacts, self.pretrained, field)
        if modality.max_length > bert.config.max_position_embeddings:
            raise MmfmError(
                f"model.modalities.{name}.max_length: the checkpoint reads at most "
                f"{bert.config.max_position_embeddings} tokens; lower it"
            )
        # Published vocabularies are sometimes padded to a round size.
        if tokenizer.size > bert.config.vocab_size or tokenizer.pad_id != bert.config.pad_token_id:
            raise MmfmError(
                f"{field}: the checkpoint has {bert.config.vocab_size} tokens and padding "
                f"{bert.config.pad_token_id}, and model.tokenizer {tokenizer.size} and {tokenizer.pad_id}; name the "
                "vocabulary that the checkpoint was made with"
            )
        return TextEncoder(model.dim, bert, tokenizer, self.dropout)

    def _random(self, dim: int, modality: TextModality, tokenizer: Tokenizer) -> BertModel:
        config = BertConfig(
            vocab_size=tokenizer.size,
            hidden_size=dim,
            num_hidden_layers=self.depth or DEPTH,
            num_attention_heads=self.heads or HEADS,
            intermediate_size=4 * dim,
            max_position_embeddings=modality.max_length,
            pad_token_id=tokenizer.pad_id,
        )
        return BertModel(config, add_pooling_layer=False)


class TextEncoder(Encoder):
    """Token ids through a BERT encoder."""

    def __init__(self, dim: int, bert: BertModel, tokenizer: Tokenizer, dropout: float) -> None:
        super().__init__(dim)
        self.pad_id, self.bert = tokenizer.pad_id, bert
        width = bert.config.hidden_size
        to_model: nn.Module = nn.Identity() if width == dim else nn.Linear(width, dim)
        self.project = nn.Sequential(FeatureDropout(dropout), to_model)

    def features(self, x: Tensor) -> Tensor:
        """[B, L] ids -> [B, 1, longest text in the batch, W]."""
        ids = x[:, : int((x != self.pad_id).any(0).sum())]
        # One row of positions per study: BERT's own [1, L] loses per-patient gradients.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        states: Tensor = self.bert(ids, attention_mask=ids != self.pad_id, position_ids=positions).last_hidden_state
        return states[:, None]

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """Tokens of the model's width with padding masked."""
        return Tokens(self.project(features[:, 0]), (x != self.pad_id)[:, : features.shape[2]])
