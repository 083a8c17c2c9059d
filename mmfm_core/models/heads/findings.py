"""Findings: each of several may be present, absent, or unlabelled in a study."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
import torch
from pydantic import AfterValidator, Field
from torch import Tensor, nn
from torch.nn import functional as F

from mmfm_core.config.model import Model
from mmfm_core.config.part import HeadConfig
from mmfm_core.config.site import Column, Columns
from mmfm_core.config.site import Mapping as SiteMapping
from mmfm_core.config.strict import Name, did_you_mean
from mmfm_core.data.dataset import Batch
from mmfm_core.data.manifest import Study
from mmfm_core.data.table import Table, as_number
from mmfm_core.errors import MmfmError
from mmfm_core.metrics.binned import Ranking
from mmfm_core.metrics.classification import mean_of_findings
from mmfm_core.metrics.statistic import Statistic
from mmfm_core.models.tasks import Encoding, Head
from mmfm_core.text import Tokenizer


def _each_once(findings: tuple[str, ...]) -> tuple[str, ...]:
    for finding in findings:
        if findings.count(finding) > 1:
            raise ValueError(f"'{finding}' is named twice")
    return findings


class Findings(HeadConfig):
    """Several findings, each present or absent (multi-label classification).

    The site maps a column of 0 and 1 to each finding that it has labels for: `columns: {effusion: label_effusion, ...}`
    under the head's name in `targets`. A finding left out, and a missing cell, is unlabelled: neither 0 nor 1.

    Attributes:
        prior: the probability of every finding before any training, as in RetinaNet (Lin et al. 2017); the layer's
            weights then start at zero. Where findings are rare, and steps few or noisy, none is spent on learning that.
    """

    METRICS = ("auroc", "auprc", "f1", "ece")
    LOWER_IS_BETTER = ("ece",)

    type: Literal["findings"]
    findings: Annotated[tuple[Name, ...], Field(min_length=1), AfterValidator(_each_once)]
    prior: float | None = Field(default=None, gt=0, lt=1)

    @property
    def labels(self) -> tuple[str, ...]:
        """The findings."""
        return self.findings

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[list[float] | None]:
        """0, 1 or NaN (unlabelled) for each finding of each study; None where a study has no label at all."""
        if not isinstance(mapping, Columns):
            raise MmfmError(
                f"site '{table.site.name}': {field}: findings are mapped by 'columns: {{FINDING: COLUMN, ...}}'"
            )
        for finding in mapping.columns:
            if finding not in self.findings:
                raise MmfmError(
                    f"site '{table.site.name}': {field}.columns.{finding}: the federation has no such finding; "
                    f"{did_you_mean(finding, self.findings)}"
                )
        columns = {f: _zeros_and_ones(table, c, f"{field}.columns.{f}") for f, c in mapping.columns.items()}
        unlabelled = [math.nan] * len(table)
        rows = zip(*(columns.get(finding, unlabelled) for finding in self.findings), strict=True)
        return [None if all(map(math.isnan, row)) else list(row) for row in rows]

    def count(self, target: Any) -> Mapping[str, int]:
        """One of each finding that is present."""
        return {finding: int(label == 1) for finding, label in zip(self.findings, target, strict=True)}

    def unlabelled(self, model: Model) -> Tensor:
        """NaN for each finding."""
        return torch.full((len(self.findings),), math.nan)

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor:
        """0, 1 or NaN for each finding, [F]."""
        return torch.tensor(study.targets[name])

    def build(self, model: Model, name: str, artifacts: Path) -> "FindingsHead":
        """The head, with random weights, or at its prior."""
        return FindingsHead(name, model.dim, self)

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic | None:
        """The mean over the findings with enough labels of both kinds; see `mmfm_core.metrics.classification`."""
        probabilities, targets = (table[[f"{c}_{f}" for f in self.findings]].to_numpy(float) for c in "py")
        return mean_of_findings(metric, probabilities, targets, pd.factorize(table["patient"])[0])

    @property
    def ranked(self) -> tuple[str, ...]:
        """The findings."""
        return self.findings

    def rankings(self, table: pd.DataFrame) -> list[Ranking]:
        """By the probability of each finding, over its labelled studies."""
        return [Ranking(*(table[f"{c}_{finding}"].to_numpy(float) for c in "py")) for finding in self.findings]

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """Studies in which each finding is present."""
        return {finding: int((table[f"y_{finding}"] == 1).sum()) for finding in self.findings}


def _zeros_and_ones(table: Table, column: Column, field: str) -> list[float]:
    labels = []
    for index, cell in enumerate(table.cells(column, field)):
        label = None if cell is None else as_number(cell)
        if cell is not None and label not in (0, 1):
            raise table.error(
                index,
                f"column '{column.column}' is neither 0 nor 1; rename its values under 'values', or list them under "
                "'missing'",
            )
        labels.append(math.nan if label is None else label)
    return labels


class FindingsHead(Head):
    """A normalised linear layer on the pooled state, with one logit per finding."""

    def __init__(self, name: str, dim: int, config: Findings) -> None:
        super().__init__()
        self.name, self.encoders, self.findings = name, config.encoders, config.findings
        self.norm, self.linear = nn.LayerNorm(dim), nn.Linear(dim, len(config.findings))
        if config.prior is not None:
            nn.init.zeros_(self.linear.weight)
            nn.init.constant_(self.linear.bias, math.log(config.prior / (1 - config.prior)))

    def forward(self, encoding: Encoding) -> Tensor:
        """Logits [B, F]."""
        logits: Tensor = self.linear(self.norm(encoding.fused(self.encoders).pooled))
        return logits

    def loss(self, outputs: Tensor, batch: Batch) -> Tensor:
        """Binary cross-entropy, its mean over each study's labelled findings, [B]; zero where there is none."""
        targets = batch.targets[self.name]
        labelled = targets.isfinite()
        each = F.binary_cross_entropy_with_logits(outputs, targets.nan_to_num(), reduction="none")
        return (each * labelled).sum(1) / labelled.sum(1).clamp(min=1)

    def predict(self, encoding: Encoding) -> dict[str, list[float]]:
        """Of each finding the label, NaN where there is none, and the probability that it is present."""
        columns = {"y": encoding.batch.targets[self.name], "p": self(encoding).sigmoid()}
        return {f"{c}_{f}": v.tolist() for c, x in columns.items() for f, v in zip(self.findings, x.T, strict=True)}
