"""Tables: one token per feature."""

import torch
from torch import Tensor, nn

from mmfm_core.config.model import CategoricalFeature, TableModality
from mmfm_core.models.tokens import Tokens, initialised, learned


class TableEncoder(nn.Module):
    """Feature tokens (FT-Transformer, Gorishniy et al. 2021); NaN marks a missing value, whose token is masked."""

    def __init__(self, dim: int, modality: TableModality) -> None:
        super().__init__()
        specs = list(modality.features.values())
        self.categorical = [isinstance(spec, CategoricalFeature) for spec in specs]
        sizes = [len(spec.categories) if isinstance(spec, CategoricalFeature) else 1 for spec in specs]
        self.scale = initialised(nn.Embedding(len(specs), dim))
        self.shift = initialised(nn.Embedding(len(specs), dim))
        # One table of all categories; a number uses its first row, and its own scale.
        self.offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.category = initialised(nn.Embedding(sum(sizes), dim))
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))
        self.modality_embedding = initialised(nn.Embedding(1, dim))

    def forward(self, features: Tensor) -> Tokens:
        """[B, F] -> Tokens of [B, F, D]."""
        values = features.nan_to_num()
        is_category = torch.tensor(self.categorical, device=features.device)
        codes = torch.where(is_category, values, 0).long() + self.offsets.to(features.device)
        amount = torch.where(is_category, 1, values)[..., None]
        x = amount * (learned(self.scale, len(features)) + self.category(codes)) + learned(self.shift, len(features))
        x = x + self.mix(x)
        return Tokens(x + learned(self.modality_embedding, len(features)), ~features.isnan())
