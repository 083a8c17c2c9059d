"""What every encoder, fusion, head and objective says of itself in a document, whatever its type.

The classes that are filled in live beside the modules they describe (`mmfm_core.registry`), and are imported only when
a document names them.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field
from pydantic_core import PydanticCustomError

from mmfm_core.config.strict import Name, Strict, did_you_mean
from mmfm_core.process import importing

if TYPE_CHECKING:
    import pandas as pd
    from torch import Tensor

    from mmfm_core.config.modality import Axis
    from mmfm_core.config.model import Model
    from mmfm_core.config.site import Mapping as SiteMapping
    from mmfm_core.data.manifest import Study
    from mmfm_core.data.table import Table
    from mmfm_core.metrics.binned import Ranking
    from mmfm_core.metrics.statistic import Statistic
    from mmfm_core.models.encoders.base import Encoder
    from mmfm_core.models.fusion.base import Fusion
    from mmfm_core.models.tasks import Head, Objective
    from mmfm_core.text.tokenizer import Tokenizer


@dataclass(frozen=True)
class Repaired:
    """A target that could be used only after a repair, which is counted: 'was cut at 128 tokens'."""

    target: Tensor
    repair: str


class Part(Strict):
    """Told apart by `type`."""

    type: str


def chosen_from(registry: Mapping[str, str]) -> Callable[[Any], Any]:
    """A validator that turns a mapping with a `type` into the class which the registry has for it."""

    def choose(value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        if "type" not in value:
            raise PydanticCustomError("no_type", "'type' is missing; known: {known}", {"known": ", ".join(registry)})
        name = str(value["type"])
        if name not in registry:
            context = {"name": name, "hint": did_you_mean(name, registry)}
            raise PydanticCustomError("unknown_type", "unknown 'type' '{name}'; {hint}", context)
        return described(registry, name).model_validate(value)

    return choose


def described(registry: Mapping[str, str], name: str) -> type[Part]:
    """The class that describes the part `name`; imports the part's own file, and with it what it computes with."""
    module, _, described_by = registry[name].partition(":")
    if module not in sys.modules:
        with importing():
            import_module(module)
    part: type[Part] = getattr(import_module(module), described_by)
    return part


class EncoderConfig(Part):
    """One encoder. It reads the modality of its own name, or several images stacked as `channels`."""

    READS: ClassVar[tuple[str, ...]]

    def inputs(self, name: str) -> tuple[str, ...]:
        """The modalities that the encoder called `name` reads."""
        return (name,)

    def check(self, model: Model, name: str) -> None:
        """Check that it fits the model's width and its modalities; a ValueError says 'FIELD: why'."""

    def build(self, model: Model, name: str, artifacts: Path) -> Encoder:
        """The encoder `name`, with random weights, or those it is told to start from."""
        raise NotImplementedError


class FusionConfig(Part):
    """How the encoders' tokens become one state per study."""

    modality_dropout: float = Field(default=0.0, ge=0, lt=1)

    def check(self, model: Model) -> None:
        """Check that it fits the model; a ValueError says 'FIELD: why'."""

    def build(self, model: Model) -> Fusion:
        """The fusion over all encoders of the document, whichever a site holds: its shape is the same everywhere."""
        raise NotImplementedError


class TaskConfig(Part):
    """What heads and objectives have in common.

    Attributes:
        encoders: the encoders whose tokens it may see; all of them where it names none.
    """

    PER_SAMPLE: ClassVar[bool] = True
    """Whether a study's loss depends on that study alone: what per-patient clipping needs."""

    encoders: tuple[Name, ...] = ()

    def sees(self, model: Model) -> tuple[str, ...]:
        """The encoders whose tokens it may see."""
        return self.encoders or tuple(model.encoders)

    def check(self, model: Model) -> None:
        """Check that it fits the model; a ValueError says 'FIELD: why'."""


class ObjectiveConfig(TaskConfig):
    """A loss for pre-training: it needs no labels."""

    def usable(self, model: Model, present: Mapping[str, Tensor]) -> Tensor:
        """Which studies ([N] bool) serve it, of those whose encoders have an input where `present` says so."""
        raise NotImplementedError

    def build(self, model: Model, name: str, artifacts: Path) -> Objective:
        """The objective, with random weights."""
        raise NotImplementedError


class HeadConfig(TaskConfig):
    """What is read from the fused state, what it is taught by, and what it is judged by.

    Attributes:
        METRICS: what it can be measured by; by default all, and the first one leads.
        LOWER_IS_BETTER: those of them that cannot lead.
        EXCLUSIVE: whether a study has exactly one of `labels`.
        PER_STUDY: whether a study counts once at most towards each of `labels`.
    """

    METRICS: ClassVar[tuple[str, ...]]
    LOWER_IS_BETTER: ClassVar[tuple[str, ...]] = ()
    EXCLUSIVE: ClassVar[bool] = False
    PER_STUDY: ClassVar[bool] = True

    @property
    def labels(self) -> tuple[str, ...]:
        """What is counted in a site's targets."""
        raise NotImplementedError

    def held(self, model: Model, encoders: Collection[str], has_targets: bool) -> bool:
        """Whether a site whose studies pass through these encoders, with or without targets for it, has the head."""
        return has_targets and not set(self.sees(model)).isdisjoint(encoders)

    def usable(self, model: Model, present: Mapping[str, Tensor], labelled: Tensor) -> Tensor:
        """Which studies ([N] bool) it can be trained and judged on."""
        seen = [present[name] for name in self.sees(model) if name in present]
        return labelled & sum(seen, start=~labelled & labelled).bool()

    def read(self, table: Table, mapping: SiteMapping, field: str) -> list[Any]:
        """Each study's target as the manifest has it, None where it has none.

        Raises:
            MmfmError: naming the row and the column, never the cell.
        """
        raise NotImplementedError

    def count(self, target: Any) -> Mapping[str, int]:
        """How many of each of `labels` a target that was read holds."""
        raise NotImplementedError

    def unlabelled(self, model: Model) -> Tensor:
        """What stands where a study has no target; the shape and type of every target."""
        raise NotImplementedError

    def decode(self, name: str, study: Study, model: Model, tokenizer: Tokenizer) -> Tensor | Repaired:
        """The target that the head called `name` has for a study, as a tensor.

        Raises:
            MmfmError: why the target cannot be used; the caller adds the manifest's row.
        """
        raise NotImplementedError

    def mirrored(self, targets: Tensor, model: Model, axis: Axis) -> Tensor:
        """The targets [B, ...] of studies whose images were mirrored along an axis; most do not change."""
        return targets

    def moved(self, targets: Tensor, model: Model, drawn: Tensor) -> Tensor:
        """The targets [B, ...] of studies whose images were moved by `draws`; most do not change."""
        return targets

    def build(self, model: Model, name: str, artifacts: Path) -> Head:
        """The head, with random weights."""
        raise NotImplementedError

    def statistic(self, metric: str, table: pd.DataFrame) -> Statistic | float | None:
        """A metric of a table of predictions, one row per study.

        A function of study weights where it can be bootstrapped, else its value; None where it is undefined.
        """
        raise NotImplementedError

    @property
    def ranked(self) -> tuple[str, ...]:
        """The labels whose AUROCs have the head's 'auroc' for a mean, which can then be told with noise."""
        return ()

    def rankings(self, table: pd.DataFrame) -> list[Ranking]:
        """Of each of `ranked`, how studies rank by it."""
        return []

    def counts(self, table: pd.DataFrame) -> dict[str, int]:
        """What stands behind the metrics: how many of each label the table's studies have."""
        return {"studies": len(table)}
