"""Retrieval: images and texts of the same study near each other. Trained first, it is contrastive pre-training."""

import hashlib
import json
import math
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd
import torch
from pydantic import PositiveInt
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Name
from mmfm_core.data.dataset import Batch
from mmfm_core.data.table import Table
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.retrieval import chance_recall_at, recall_at, reciprocal_rank, search, similarity
from mmfm_core.metrics.statistic import Statistic, macro
from mmfm_core.models.tasks import Encoding, Head

DIGITS = 4
"""Decimals of an embedding in the table of predictions: its entries are at most 1, and its order needs no more."""


class Retrieval(HeadConfig):
    """An image encoder and a text encoder, in this order. It has no target: a study teaches it by having both.

    Attributes:
        embed_dim: width of the common space.
        loss: 'clip' tells a batch's right pair from its others (Radford et al. 2021), 'siglip' judges each pair by
            itself (Zhai et al. 2023).
    """

    # A pair's loss is taken against the other studies of its batch.
    PER_SAMPLE = False
    METRICS = (
        "recall_at_10",
        "image_to_text_at_10",
        "text_to_image_at_10",
        "recall_at_1",
        "recall_at_5",
        "mrr",
        "image_to_text_chance_at_10",
        "text_to_image_chance_at_10",
    )

    type: Literal["retrieval"]
    encoders: tuple[Name, Name]
    embed_dim: PositiveInt = 128
    loss: Literal["clip", "siglip"] = "clip"

    @property
    def labels(self) -> tuple[str, ...]:
        """None."""
        return ()

    def check(self, model: Model) -> None:
        """Check that the second encoder, and not the first, reads text."""
        reads = [model.modalities[model.encoders[name].inputs(name)[0]].kind == "text" for name in self.encoders]
        if reads != [False, True]:
            raise ValueError("encoders: name the encoder of the images first, and that of the text second")

    def held(self, model: Model, encoders: Collection[str], has_targets: bool) -> bool:
        """Whether a site has both encoders."""
        return set(self.encoders) <= set(encoders)

    def usable(self, model: Model, present: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """Studies with an image and a text."""
        image, text = (present[name] for name in self.encoders)
        return image & text

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[Any]:
        """Refuse a column."""
        raise MmfmError(
            f"site '{table.site.name}': {field}: retrieval has no target column; map its image and text under "
            "'modalities', and take this line out"
        )

    def unlabelled(self, model: Model) -> Tensor:
        """Nothing; no study has a target."""
        return torch.tensor(0)

    def build(self, model: Model, name: str, artifacts: Path) -> "RetrievalHead":
        """The head, with random weights."""
        return RetrievalHead(name, model.dim, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic | float | None:
        """See `mmfm_core.metrics.retrieval`; candidates are the table's studies, and figures the mean of directions."""
        texts = list(table["group"])
        if not texts:
            return None
        if "chance" in metric:
            return chance_recall_at(10, texts)[metric.startswith("text")]
        embedded = (torch.tensor([json.loads(cell) for cell in table[side]]) for side in ("image", "text"))
        both = search(similarity(*embedded), texts)
        match metric:
            case "image_to_text_at_10":
                return recall_at(10, both.image_to_text)
            case "text_to_image_at_10":
                return recall_at(10, both.text_to_image)
            case "mrr":
                return macro([reciprocal_rank(direction) for direction in both])
        k = int(metric.removeprefix("recall_at_"))
        return macro([recall_at(k, direction) for direction in both])


class Pairs(NamedTuple):
    """A batch in the common space.

    Attributes:
        image: [B, embed_dim], of length 1.
        text: [B, embed_dim], of length 1.
        same: [B, B] bool, whether two studies have the same text.
    """

    image: Tensor
    text: Tensor
    same: Tensor


class Temperature(nn.Module):
    """Learned scale and bias of similarities; a leaf, so that its parameters hide nobody's."""

    def __init__(self, scale: float, bias: float | None) -> None:
        super().__init__()
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        if bias is not None:
            self.bias = nn.Parameter(torch.tensor(bias))

    def forward(self, cosine: Tensor) -> Tensor:
        """Logits of cosines; the scale stays below 100, as in CLIP."""
        scaled = cosine * self.log_scale.clamp(max=math.log(100)).exp()
        return scaled + self.bias if hasattr(self, "bias") else scaled


class RetrievalHead(Head):
    """Two linear maps from the encoders' mean tokens, before fusion has mixed the modalities, into one space."""

    def __init__(self, name: str, dim: int, config: Retrieval) -> None:
        super().__init__()
        self.name, self.encoders, self.kind = name, config.encoders, config.loss
        self.project = nn.ModuleList(nn.Linear(dim, config.embed_dim, bias=False) for _ in config.encoders)
        self.temperature = Temperature(10.0, -10.0) if config.loss == "siglip" else Temperature(1 / 0.07, None)

    def forward(self, encoding: Encoding) -> Pairs:
        """Both embeddings of each study."""
        image, text = (
            F.normalize(project(encoding.parts[name].mean()), dim=-1)
            for project, name in zip(self.project, self.encoders, strict=True)
        )
        ids = encoding.input(self.encoders[1])
        return Pairs(image, text, (ids[:, None] == ids).all(-1))

    def loss(self, outputs: Pairs, batch: Batch) -> Tensor:
        """What each usable study adds, [B]: its image among the texts and its text among the images; zero elsewhere."""
        rows = batch.usable[self.name].nonzero()[:, 0]
        logits = self.temperature(outputs.image[rows] @ outputs.text[rows].T)
        contrast = clip_loss if self.kind == "clip" else siglip_loss
        each = contrast(logits, outputs.same[rows][:, rows])
        return each.new_zeros(len(batch)).index_put((rows,), each)

    def predict(self, encoding: Encoding) -> dict[str, list[str]]:
        """Both embeddings as JSON, and the text's group: the hash of its tokens, one for all who have the same text."""
        pairs = self(encoding)
        ids = encoding.input(self.encoders[1]).cpu().numpy()
        return {
            "image": [json.dumps([round(value, DIGITS) for value in row]) for row in pairs.image.tolist()],
            "text": [json.dumps([round(value, DIGITS) for value in row]) for row in pairs.text.tolist()],
            "group": ["text-" + hashlib.sha256(row.tobytes()).hexdigest()[:16] for row in ids],
        }


def clip_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Mean of the cross-entropies of each row and each column of [N, N] logits, [N] (InfoNCE, Radford et al. 2021).

    Another study with the `same` ([N, N] bool) text is no wrong answer, and is left out of the choice.
    """
    own = torch.eye(len(logits), dtype=torch.bool, device=logits.device)
    logits = logits.masked_fill(same & ~own, -torch.inf)
    target = torch.arange(len(logits), device=logits.device)
    of_images, of_texts = (F.cross_entropy(each, target, reduction="none") for each in (logits, logits.T))
    return (of_images + of_texts) / 2


def siglip_loss(logits: Tensor, same: Tensor) -> Tensor:
    """Sum over each row of [N, N] logits of every pair's logistic loss, [N] (Zhai et al. 2023, algorithm 1).

    A pair whose texts are the `same` ([N, N] bool) is a right one.
    """
    return -F.logsigmoid(torch.where(same, logits, -logits)).sum(1)
