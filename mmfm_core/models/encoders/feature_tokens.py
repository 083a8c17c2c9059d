"""Tables: one token per feature."""

from pathlib import Path
from typing import Literal, cast

import torch
from torch import Tensor, nn

from mmfm_core.config.modality import CategoricalFeature, TableModality
from mmfm_core.config.model import Model
from mmfm_core.config.part import EncoderConfig
from mmfm_core.models.encoders.base import Encoder
from mmfm_core.models.tokens import Tokens, initialised, learned


class FeatureTokens(EncoderConfig):
    """One token per feature (FT-Transformer, Gorishniy et al. 2021)."""

    READS = ("tabular",)

    type: Literal["feature_tokens"]

    def build(self, model: Model, name: str, artifacts: Path) -> "TableEncoder":
        """The encoder, with random weights."""
        return TableEncoder(model.dim, cast(TableModality, model.modalities[name]))


class TableEncoder(Encoder):
    """Feature tokens: a number scales its feature's vector, a category has one of its own."""

    def __init__(self, dim: int, modality: TableModality) -> None:
        super().__init__(dim)
        specs = list(modality.features.values())
        self.categorical = [isinstance(spec, CategoricalFeature) for spec in specs]
        sizes = [len(spec.categories) if isinstance(spec, CategoricalFeature) else 1 for spec in specs]
        self.scale = initialised(nn.Embedding(len(specs), dim))
        self.shift = initialised(nn.Embedding(len(specs), dim))
        # One table of all categories; a number uses its first row, and its own scale.
        self.offsets = torch.tensor([0, *sizes[:-1]]).cumsum(0)
        self.category = initialised(nn.Embedding(sum(sizes), dim))
        self.mix = nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * dim), nn.GELU(), nn.Linear(2 * dim, dim))

    def features(self, x: Tensor) -> Tensor:
        """[B, F] -> [B, 1, F, D]."""
        values = x.nan_to_num()
        is_category = torch.tensor(self.categorical, device=x.device)
        codes = torch.where(is_category, values, 0).long() + self.offsets.to(x.device)
        amount = torch.where(is_category, 1, values)[..., None]
        mapped = amount * (learned(self.scale, len(x)) + self.category(codes)) + learned(self.shift, len(x))
        return (mapped + self.mix(mapped))[:, None]

    def tokens(self, features: Tensor, x: Tensor) -> Tokens:
        """One token per feature; a missing value (NaN) is masked."""
        return Tokens(features[:, 0], ~x.isnan())
