"""Text: a transformers BERT."""

import torch
from torch import Tensor, nn
from transformers import BertConfig, BertModel

from mmfm_core.config.model import Bert, TextModality
from mmfm_core.data.tokenizer import PAD_ID, VOCABULARY
from mmfm_core.models.tokens import Tokens, initialised, learned


class TextEncoder(nn.Module):
    """Token ids through a BERT encoder (Devlin et al. 2019)."""

    def __init__(self, dim: int, modality: TextModality, config: Bert) -> None:
        super().__init__()
        self.bert = BertModel(
            BertConfig(
                vocab_size=VOCABULARY,
                hidden_size=dim,
                num_hidden_layers=config.depth,
                num_attention_heads=config.heads,
                intermediate_size=4 * dim,
                max_position_embeddings=modality.max_length,
                pad_token_id=PAD_ID,
            ),
            add_pooling_layer=False,
        )
        self.modality_embedding = initialised(nn.Embedding(1, dim))

    def forward(self, ids: Tensor) -> Tokens:
        """[B, L] -> Tokens of [B, longest text in the batch, D]."""
        ids = ids[:, : int((ids != PAD_ID).any(0).sum())]
        mask = ids != PAD_ID
        # One row of positions per study: BERT's own [1, L] loses per-patient gradients.
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
        x = self.bert(ids, attention_mask=mask, position_ids=positions).last_hidden_state
        return Tokens(x + learned(self.modality_embedding, len(ids)), mask)
