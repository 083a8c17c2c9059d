"""Masked language modelling: a few words are hidden, and guessed from the others."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import ObjectiveConfig
from mmfm_core.config.strict import Name
from mmfm_core.models.tasks import Encoding, Objective
from mmfm_core.text import Tokenizer, open_tokenizer


class MaskedText(ObjectiveConfig):
    """BERT's masked language model (Devlin et al. 2019) around one text encoder.

    Attributes:
        mask_ratio: share of a text's tokens that are to be guessed.
    """

    type: Literal["masked_text"]
    encoders: tuple[Name]
    mask_ratio: float = Field(default=0.15, gt=0, lt=1)

    def check(self, model: Model) -> None:
        """Check that the encoder reads text."""
        (name,) = self.encoders
        if model.modalities[model.encoders[name].inputs(name)[0]].kind != "text":
            raise ValueError(f"encoders: '{name}' reads no text; name an encoder that does")

    def usable(self, model: Model, present: Mapping[str, Tensor]) -> Tensor:
        """Studies with the text."""
        return present[self.encoders[0]]

    def build(self, model: Model, name: str, artifacts: Path) -> "MaskedLanguage":
        """The output layers, with random weights."""
        return MaskedLanguage(model.dim, self, open_tokenizer(model.tokenizer, artifacts))


class MaskedLanguage(Objective):
    """BERT's output layers. Not transformers' collator: it draws per batch, and may leave a short text unmasked."""

    def __init__(self, dim: int, config: MaskedText, tokenizer: Tokenizer) -> None:
        super().__init__()
        (self.encoder,) = config.encoders
        self.ratio, self.tokenizer = config.mask_ratio, tokenizer
        self.ordinary = torch.tensor([token for token in range(tokenizer.size) if token not in tokenizer.special])
        self.guess = nn.Sequential(nn.Linear(dim, dim), nn.GELU(), nn.LayerNorm(dim), nn.Linear(dim, tokenizer.size))

    def forward(self, encoding: Encoding) -> Tensor:
        """The loss of each study with a mask of its own, [B]."""
        return self.loss(encoding, *self.mask(encoding.input(self.encoder)))

    def mask(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Ids [B, L] with some tokens hidden, and which ones ([B, L] bool), from torch's global generator.

        At least one in every text that has an ordinary token. Of the hidden ones 80 % become the mask, 10 % any other
        token and 10 % stay, so that the encoder also learns what stands where no mask is.
        """
        draw = torch.rand(ids.shape, device=ids.device)
        draw = torch.where(torch.isin(ids, self.ordinary.to(ids.device)), draw, 2)
        hidden = (draw < self.ratio) | ((draw == draw.amin(1, keepdim=True)) & (draw < 1))
        others = self.ordinary[torch.randint(len(self.ordinary), ids.shape)].to(ids.device)
        fate = torch.rand(ids.shape, device=ids.device)
        shown = torch.where(fate < 0.8, self.tokenizer.mask_id, torch.where(fate < 0.9, others, ids))
        return torch.where(hidden, shown, ids), hidden

    def loss(self, encoding: Encoding, shown: Tensor, hidden: Tensor) -> Tensor:
        """Cross-entropy, [B]: the mean over a study's own hidden tokens; zero where it has none."""
        ids = encoding.input(self.encoder)
        states = encoding.encoder(self.encoder)(shown).x
        hidden = hidden[:, : states.shape[1]]
        # The output layer is the costly part: only as many places as the batch's most hidden text has.
        places = hidden.int().argsort(1, descending=True)[:, : max(1, int(hidden.sum(1).max()))]
        logits = self.guess(states.gather(1, places[..., None].expand(-1, -1, states.shape[-1])))
        each = F.cross_entropy(logits.transpose(1, 2), ids.gather(1, places), reduction="none")
        counted = hidden.gather(1, places)
        return (each * counted).sum(1) / counted.sum(1).clamp(min=1)
