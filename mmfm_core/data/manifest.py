"""A site's manifest, read into studies: one row per study, with whichever modalities it has."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmfm_core.config import site as sites
from mmfm_core.config.modality import CategoricalFeature, TableModality, TextModality
from mmfm_core.config.model import Model
from mmfm_core.config.site import SPLITS, Column, Site, Split, SplitFractions
from mmfm_core.config.strict import did_you_mean
from mmfm_core.data.table import Table, position_of
from mmfm_core.errors import MmfmError

Value = Path | str | list[float]


@dataclass(frozen=True)
class Study:
    """One patient at one time.

    Attributes:
        row: line of the manifest, for messages.
        inputs: the modalities that are present: a path for an image or volume, text, or a table's numbers with NaN for
            missing (a category is its index).
        targets: head -> the label as `HeadConfig.read` gives it; heads without one are left out.
    """

    row: int
    study: str
    patient: str
    split: Split
    inputs: dict[str, Value]
    targets: dict[str, Any]


def read_manifest(site: Site, model: Model) -> list[Study]:
    """The site's studies, as far as `model` asks for them; a study with no modality at all is left out.

    Raises:
        MmfmError: the manifest or a column is missing, a cell cannot be understood, a required modality is absent, a
            patient is in two splits, or nothing is left.
    """
    table = Table(site)
    splits = _splits(table, site)
    inputs = {name: _inputs(table, site, model, name) for name in site.modalities if name in model.modalities}
    targets = {
        name: head.read(table, site.targets[name], f"targets.{name}")
        for name, head in model.heads.items()
        if name in site.targets
    }
    required = [name for name, modality in model.modalities.items() if not modality.optional]
    studies = []
    for index in range(len(table)):
        present = {name: value for name, values in inputs.items() if (value := values[index]) is not None}
        for name in required:
            if name not in present:
                raise table.error(
                    index,
                    f"has no '{name}', which the federation requires; fill it in, or declare "
                    f"'optional: true' under model.modalities.{name}",
                )
        if present:
            withheld = splits[index] == "train" and position_of(table.patients[index], "labelled") >= site.labelled
            labels = {
                name: label for name, values in targets.items() if (label := values[index]) is not None and not withheld
            }
            studies.append(
                Study(table.row(index), table.studies[index], table.patients[index], splits[index], present, labels)
            )
    if not studies:
        raise MmfmError(
            f"site '{site.name}' has no study with any modality; check 'modalities' and 'missing' in the site's file",
            str(site.manifest),
        )
    return studies


def split_of_patients(site: Site) -> dict[str, Split]:
    """The split of each of a site's patients; errors as of `read_manifest`."""
    table = Table(site)
    return dict(zip(table.patients, _splits(table, site), strict=True))


def _splits(table: Table, site: Site) -> list[Split]:
    if isinstance(site.split, SplitFractions):
        return [hashed_split(patient, site.split) for patient in table.patients]
    words: dict[str, Split] = {word: split for split in SPLITS for word in getattr(site.split, split)}
    splits: list[Split] = []
    first_seen: dict[str, tuple[Split, int]] = {}
    for index, cell in enumerate(table.cells(Column(column=site.split.column), "split")):
        if cell is None or cell not in words:
            raise table.error(index, f"column '{site.split.column}' (split) must be one of {', '.join(words)}")
        split = words[cell]
        first, row = first_seen.setdefault(table.patients[index], (split, table.row(index)))
        if first != split:
            raise table.error(
                index,
                f"this patient is in split '{split}' here and in '{first}' there; keep each patient in one split, or "
                "a model is tested on patients it has seen",
                other=row,
            )
        splits.append(split)
    return splits


def hashed_split(patient: str, fractions: SplitFractions) -> Split:
    """The split of a patient, by a hash of the identifier: patients added later never move the others."""
    position = position_of(patient)
    if position < fractions.train:
        return "train"
    return "val" if position < fractions.train + fractions.val else "test"


def _inputs(
    table: Table, site: Site, model: Model, name: str
) -> "list[Path | None] | list[str | None] | list[list[float] | None]":
    modality, mapping, field = model.modalities[name], site.modalities[name], f"modalities.{name}"
    if isinstance(modality, TableModality) != isinstance(mapping, sites.Table):
        wanted = "features: {FEATURE: COLUMN, ...}" if isinstance(modality, TableModality) else "column: NAME"
        raise MmfmError(f"site '{site.name}': {field}: a {modality.kind} modality is mapped by '{wanted}'")
    if isinstance(mapping, sites.Table) and isinstance(modality, TableModality):
        return _rows(table, mapping, modality, field)
    assert isinstance(mapping, Column)
    return table.cells(mapping, field) if isinstance(modality, TextModality) else table.paths(mapping, field)


def _rows(table: Table, mapping: sites.Table, modality: TableModality, field: str) -> list[list[float] | None]:
    for feature in mapping.features:
        if feature not in modality.features:
            raise MmfmError(
                f"site '{table.site.name}': {field}.features.{feature}: the federation has no such feature; "
                f"{did_you_mean(feature, modality.features)}"
            )
    columns = {
        feature: _numbers(table, mapping.features[feature], spec, f"{field}.features.{feature}")
        for feature, spec in modality.features.items()
        if feature in mapping.features
    }
    absent = [math.nan] * len(table)
    rows = zip(*(columns.get(feature, absent) for feature in modality.features), strict=True)
    return [None if all(map(math.isnan, row)) else list(row) for row in rows]


def _numbers(table: Table, column: Column, spec: object, field: str) -> list[float]:
    if isinstance(spec, CategoricalFeature):
        return [math.nan if index is None else float(index) for index in table.choices(column, field, spec.categories)]
    return table.numbers(column, field)
