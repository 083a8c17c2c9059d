"""The `model` part of the document: modalities, encoders, fusion, heads and objectives, and how they fit together."""

from collections.abc import Collection
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Field,
    PositiveFloat,
    PositiveInt,
    SerializeAsAny,
    StringConstraints,
    model_validator,
)

from mmfm_core.config.modality import Modality
from mmfm_core.config.part import (
    EncoderConfig,
    FusionConfig,
    HeadConfig,
    ObjectiveConfig,
    TaskConfig,
    chosen_from,
    described,
)
from mmfm_core.config.strict import Name, Strict, did_you_mean
from mmfm_core.registry import ENCODERS, FUSIONS, HEADS, OBJECTIVES


class Artifact(Strict):
    """A file or folder that comes with the document (a vocabulary, a checkpoint), pinned by its hash.

    Attributes:
        path: where it lies, relative to the document; only whoever starts a run reads it there.
        sha256: what every site checks its own copy against (`mmfm sha256 PATH`).
    """

    path: str
    sha256: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]


class ByteTokenizer(Strict):
    """UTF-8 bytes (ByT5): no vocabulary, so nothing that could hold a patient's name."""

    type: Literal["bytes"] = "bytes"


class WordPieceTokenizer(Strict):
    """Pieces of words from a public vocabulary: BERT's `vocab.txt`, or a `tokenizer.json`."""

    type: Literal["wordpiece"]
    vocabulary: Artifact


def _short(value: Any) -> Any:
    return {"type": "shared"} | value if isinstance(value, dict) and "share_with" in value else value


Encoder = Annotated[SerializeAsAny[EncoderConfig], BeforeValidator(chosen_from(ENCODERS)), BeforeValidator(_short)]
Fusion = Annotated[SerializeAsAny[FusionConfig], BeforeValidator(chosen_from(FUSIONS))]
Head = Annotated[SerializeAsAny[HeadConfig], BeforeValidator(chosen_from(HEADS))]
Objective = Annotated[SerializeAsAny[ObjectiveConfig], BeforeValidator(chosen_from(OBJECTIVES))]


class Adapter(Strict):
    """A low-rank change beside frozen weights (LoRA): `alpha / rank` times a product of two thin matrices.

    Attributes:
        targets: glob patterns over the names of linear and convolutional layers of encoders and fusion, such as
            `encoders.frontal.trunk.*.qkv`.
    """

    rank: PositiveInt = 4
    alpha: PositiveFloat = 8.0
    targets: tuple[str, ...] = Field(min_length=1)


@dataclass(frozen=True)
class Held:
    """The parts of a model that a site has."""

    encoders: tuple[str, ...]
    heads: tuple[str, ...]
    objectives: tuple[str, ...]

    @property
    def blocks(self) -> set[str]:
        """The same as blocks of the state dict, with the fusion, which every site has."""
        kinds = {"encoders": self.encoders, "heads": self.heads, "objectives": self.objectives}
        return {"fusion", *(f"{kind}.{name}" for kind, names in kinds.items() for name in names)}


class Model(Strict):
    """Encoders, one fusion, adapters beside their layers, and the heads and objectives, all of one width `dim`."""

    dim: PositiveInt = 192
    tokenizer: Annotated[ByteTokenizer | WordPieceTokenizer, Field(discriminator="type")] = ByteTokenizer()
    modalities: dict[Name, Modality] = Field(min_length=1)
    encoders: dict[Name, Encoder]
    fusion: Fusion
    adapters: dict[Name, Adapter] = {}
    heads: dict[Name, Head] = {}
    objectives: dict[Name, Objective] = {}

    @property
    def tasks(self) -> dict[str, TaskConfig]:
        """Heads and objectives: what a stage can train."""
        return {**self.heads, **self.objectives}

    def behind(self, encoder: str) -> tuple[str, ...]:
        """The modalities that pass through an encoder's weights: its own, and those of encoders that share it."""
        sharing = [name for name, e in self.encoders.items() if getattr(e, "share_with", None) == encoder]
        return tuple(m for name in (encoder, *sharing) for m in self.encoders[name].inputs(name))

    def held(self, modalities: Collection[str], targets: Collection[str]) -> Held:
        """What a site builds that has these modalities, and targets for these heads."""
        able = [name for name, e in self.encoders.items() if set(e.inputs(name)) & set(modalities)]
        return Held(
            tuple(name for name in self.encoders if set(self.behind(name)) & set(modalities)),
            tuple(name for name, head in self.heads.items() if head.held(self, able, name in targets)),
            tuple(name for name, task in self.objectives.items() if set(task.sees(self)) & set(able)),
        )

    @model_validator(mode="after")
    def _fits_together(self) -> "Model":
        for name, encoder in self.encoders.items():
            for modality in encoder.inputs(name):
                if modality not in self.modalities:
                    hint = did_you_mean(modality, self.modalities)
                    raise ValueError(f"encoders.{name}: there is no modality '{modality}'; {hint}")
                if self.modalities[modality].kind not in encoder.READS:
                    kind = self.modalities[modality].kind
                    raise ValueError(
                        f"encoders.{name}.type: '{encoder.type}' does not read {kind}; use {_readers(kind)}"
                    )
            _say_where(f"encoders.{name}", encoder.check, self, name)
        read = {modality for name, encoder in self.encoders.items() for modality in encoder.inputs(name)}
        for modality in self.modalities:
            if modality not in read:
                fitting = _readers(self.modalities[modality].kind)
                raise ValueError(f"modalities.{modality}: has no encoder; add one under 'encoders', of type {fitting}")
        _say_where("fusion", self.fusion.check, self)
        if not self.tasks:
            raise ValueError("heads: name at least one head, or an objective under 'objectives'")
        for task, config in self.tasks.items():
            place = f"heads.{task}" if task in self.heads else f"objectives.{task}"
            if task in self.heads and task in self.objectives:
                raise ValueError(f"objectives.{task}: a head has this name too; give it another")
            for seen in config.encoders:
                if seen not in self.encoders:
                    hint = did_you_mean(seen, self.encoders)
                    raise ValueError(f"{place}.encoders: there is no encoder '{seen}'; {hint}")
            _say_where(place, config.check, self)
        return self


def _readers(kind: str) -> str:
    """The types of encoders that read a kind of modality; only somebody who chose wrongly waits for their imports."""
    return " or ".join(t for t in ENCODERS if t != "shared" and kind in described(ENCODERS, t).READS)  # type: ignore[attr-defined]


def _say_where(place: str, check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except ValueError as error:
        raise ValueError(f"{place}.{error}") from error
