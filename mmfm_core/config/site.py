"""A site's file: where its data is and how its columns map to the federation's modalities and targets."""

import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BeforeValidator,
    Discriminator,
    Field,
    PositiveFloat,
    Tag,
    ValidationInfo,
    field_validator,
    model_validator,
)

from mmfm_core.config.strict import Cell, Name, Strict

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")
Device = Literal["cpu", "cuda"]
Precision = Literal["float32", "bfloat16"]


class Column(Strict):
    """One column of the manifest: its values may be renamed, and some of them may mean 'missing'."""

    column: str
    values: dict[Cell, Cell] = {}
    missing: tuple[Cell, ...] = ()


def _short(value: Any) -> Any:
    return {"column": value} if isinstance(value, str) else value


ColumnOrName = Annotated[Column, BeforeValidator(_short)]
"""A column; a plain string is short for its name."""


class Table(Strict):
    """The columns behind a tabular modality's features. A feature left out is missing at this site."""

    features: dict[Name, ColumnOrName] = Field(min_length=1)


class Columns(Strict):
    """Several columns behind one target: one per finding, or one per image of a pair."""

    columns: dict[Name, ColumnOrName] = Field(min_length=1)


class SplitColumn(Strict):
    """The manifest says which split a study belongs to; the lists name its words for each."""

    column: str = "split"
    train: tuple[Cell, ...] = ("train",)
    val: tuple[Cell, ...] = ("val",)
    test: tuple[Cell, ...] = ("test",)

    @model_validator(mode="after")
    def _disjoint(self) -> "SplitColumn":
        words = [*self.train, *self.val, *self.test]
        twice = next((word for word in words if words.count(word) > 1), None)
        if twice is not None:
            raise ValueError(f"'{twice}' cannot mean two splits")
        return self


class SplitFractions(Strict):
    """The site has no split: patients are assigned by a hash of their identifier."""

    train: float = Field(gt=0, le=1)
    val: float = Field(ge=0, lt=1)
    test: float = Field(ge=0, lt=1)

    @model_validator(mode="after")
    def _sums_to_one(self) -> "SplitFractions":
        total = self.train + self.val + self.test
        if abs(total - 1) > 1e-6:
            raise ValueError(f"train, val and test must sum to 1, not {total:g}")
        return self


def _kind_of_split(value: Any) -> str:
    if isinstance(value, dict):
        return "SplitFractions" if any(isinstance(v, int | float) for v in value.values()) else "SplitColumn"
    return "SplitFractions" if isinstance(value, SplitFractions) else "SplitColumn"


def _kind_of_mapping(value: Any) -> str:
    for kind, key in ((Table, "features"), (Columns, "columns")):
        if isinstance(value, kind) or (isinstance(value, dict) and key in value):
            return kind.__name__
    return "Column"


# In a union that is told apart by hand only the errors of the kind that was meant are reported.
Splitting = Annotated[
    Annotated[SplitColumn, Tag("SplitColumn")] | Annotated[SplitFractions, Tag("SplitFractions")],
    Discriminator(_kind_of_split),
    BeforeValidator(_short),
]
Mapping = Annotated[
    Annotated[Column, Tag("Column")] | Annotated[Table, Tag("Table")] | Annotated[Columns, Tag("Columns")],
    Discriminator(_kind_of_mapping),
    BeforeValidator(_short),
]


class Release(Strict):
    """How counts leave the site: rounded up to multiples of `min_count`, so that no small group shows.

    Every count (of studies, patients, labels, and the studies behind a figure) is told so, totals like their parts:
    '5' means 1 to 5, whatever stands beside it. A total that is told beside its two parts leaves every size of a small
    one possible; of many parts a coincidence can tell more, and then a site raises `min_count`. A figure over fewer
    studies is not told at all.
    """

    min_count: int = Field(default=5, ge=1)

    def count(self, exact: float) -> int:
        """A count as it is told. It grows with `exact`, and zero stays zero: that nothing is there is no secret."""
        return self.min_count * math.ceil(exact / self.min_count)


class Budget(Strict):
    """What all private federations together may cost each of the site's patients."""

    epsilon: PositiveFloat = 8.0
    delta: float = Field(default=1e-5, gt=0, lt=1)


class Limits(Strict):
    """What a request may take of a site's machine; one that takes more is refused.

    Attributes:
        memory: GB (10^9 bytes) of the agent's process.
        seconds: from a request's arrival to its answer.
    """

    memory: PositiveFloat | None = None
    seconds: PositiveFloat | None = None


class Site(Strict):
    """One hospital. It says where its data is and what it holds; it can only tighten what the federation asks.

    Attributes:
        site: the manifest's column that names the site, where several sites have one manifest.
        where: column -> the values of the rows that are used.
        share: the patients that are used of a manifest without such a column: from one point to another of [0, 1], on
            which a hash of the identifier puts each patient. To cut one data set into several sites in a simulation.
        labelled: the share of training patients whose targets are used, by a hash too; to study scarce labels.
        release: how counts leave; the default is for real patients, and public data may say `{min_count: 1}`.
        budget: what private federations may cost a patient here, all of them together; the ledger holds them to it.
        ledger: where that is written down; by default in the site's directory. Several sites of one hospital that hold
            the same patients name one ledger.
        limits: what a request may take of the machine; nothing is limited by default.
        device: where models compute: the processor, or the first CUDA device that the agent sees.
        precision: what a training step without privacy multiplies matrices and convolves in. Parameters, gradients,
            private steps and all figures are float32. 'bfloat16' is for processors and cards that have it: measure it.
        missing: cells that mean 'missing', in addition to `mmfm_core.config.strict.MISSING_CELLS`.
    """

    name: Name
    manifest: Path
    study: str | None = None
    patient: str = "patient_id"
    site: str | None = None
    where: dict[str, tuple[Cell, ...]] = {}
    share: tuple[float, float] = (0.0, 1.0)
    labelled: float = Field(default=1.0, gt=0, le=1)
    split: Splitting = SplitColumn()
    modalities: dict[Name, Mapping] = Field(min_length=1)
    targets: dict[Name, Mapping] = {}
    release: Release = Release()
    budget: Budget = Budget()
    ledger: Path | None = None
    limits: Limits = Limits()
    device: Device = "cpu"
    precision: Precision = "float32"
    missing: tuple[Cell, ...] = ()
    missing_files: Literal["error", "absent"] = "error"

    @field_validator("share")
    @classmethod
    def _share_of_something(cls, share: tuple[float, float]) -> tuple[float, float]:
        if not 0 <= share[0] < share[1] <= 1:
            raise ValueError("must be two points of [0, 1], the lower one first, for example [0, 0.25]")
        return share

    @field_validator("manifest", "ledger")
    @classmethod
    def _relative_to_the_file(cls, path: Path | None, info: ValidationInfo) -> Path | None:
        folder = (info.context or {}).get("folder")
        try:
            return (folder / path.expanduser()).resolve() if folder and path else path
        except RuntimeError as error:  # '~' of a user that this machine does not know
            raise ValueError(f"{path}: there is no such home directory") from error
