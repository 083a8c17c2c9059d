"""A manifest as a table of text cells: reading CSV, Parquet and JSON Lines, missing cells, renamed values.

Errors name the row and the column, never the value that stands there; the column and the remedy may leave the site.
"""

import hashlib
import json
import math
import re
from collections.abc import Callable
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from pyarrow import parquet

from mmfm_core.config.site import Column, Site
from mmfm_core.config.strict import MISSING_CELLS, plain
from mmfm_core.errors import MmfmError

LARGEST = 1e30
"""Beyond this a number is a slip of the pen, and soon too large for the 32 bits that a model computes with."""


class Table:
    """The rows of a manifest that belong to one site.

    Attributes:
        patients: patient identifier of each row.
        studies: study identifier of each row (the row's number where the manifest has none).
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        frame = read_frame(site.manifest)
        if site.site is not None:
            frame = frame[self._column(frame, site.site, "site") == site.name]
        for name, values in site.where.items():
            frame = frame[self._column(frame, name, f"where.{name}").isin(values)]
        low, high = site.share
        if (low, high) != (0.0, 1.0):
            patients = self._column(frame, site.patient, "patient")
            frame = frame[[low <= position_of(patient, "share") < high for patient in patients]]
        if frame.empty:
            lack = f"no row has '{site.name}' in column '{site.site}'" if site.site else "it has no rows"
            lack += ", or none that 'where' and 'share' leave" if site.where or (low, high) != (0.0, 1.0) else ""
            raise MmfmError(f"site '{site.name}' is empty: {lack}", str(site.manifest))
        self._frame = frame
        self.patients = self._identifiers(site.patient, "patient")
        self.studies = self._identifiers(site.study, "study") if site.study else [str(row) for row in frame.index]
        seen: set[str] = set()
        for index, study in enumerate(self.studies):
            if study in seen:
                raise self.error(
                    index,
                    f"column '{site.study}' (study): an earlier row has the same identifier; "
                    "give each study its own, or drop the copy",
                )
            seen.add(study)

    def __len__(self) -> int:
        return len(self._frame)

    def row(self, index: int) -> int:
        """The line of the manifest."""
        return int(self._frame.index[index])

    def error(self, index: int, problem: str, other: int | None = None) -> MmfmError:
        """An error about one row, and the line of the other one that it clashes with."""
        there = f" and row {other}" if other is not None else ""
        return MmfmError(problem, f"{self.site.manifest}, row {self.row(index)}{there}")

    def cells(self, column: Column, field: str) -> list[str | None]:
        """A column's cells after `missing` and `values`; None is missing. `field` names the mapping in errors."""
        missing = {*MISSING_CELLS, *self.site.missing, *column.missing}
        # Cells are compared as text, and as numbers too, since "1" may be written 1.0 by the next export.
        missing_numbers = {number for cell in missing if (number := as_number(cell)) is not None}
        renamed_numbers = {n: new for old, new in column.values.items() if (n := as_number(old)) is not None}

        def read(cell: str) -> str | None:
            number = as_number(cell)
            if cell in column.values:
                return column.values[cell]
            if cell in missing or number in missing_numbers:
                return None
            return renamed_numbers.get(number, cell) if number is not None else cell

        return [read(cell) for cell in self._column(self._frame, column.column, field)]

    def choices(self, column: Column, field: str, choices: tuple[str, ...]) -> list[int | None]:
        """The index among `choices` of each cell; None is missing."""
        return [self._choice(i, column, cell, choices) for i, cell in enumerate(self.cells(column, field))]

    def _choice(self, index: int, column: Column, cell: str | None, choices: tuple[str, ...]) -> int | None:
        if cell is not None and cell not in choices:
            raise self.error(
                index,
                f"column '{column.column}' is none of {', '.join(choices)}; rename its values under "
                "'values', or list them under 'missing'",
            )
        return None if cell is None else choices.index(cell)

    def numbers(self, column: Column, field: str) -> list[float]:
        """The number in each cell; NaN is missing."""
        numbers = []
        for index, cell in enumerate(self.cells(column, field)):
            number = math.nan if cell is None else as_number(cell)
            if number is None or abs(number) > LARGEST:
                raise self.error(
                    index, f"column '{column.column}' is not a number; mend it, or list it under 'missing'"
                )
            numbers.append(number)
        return numbers

    def paths(self, column: Column, field: str) -> list[Path | None]:
        """The file, folder or member of an archive that each cell names, relative to the manifest; None is missing."""
        paths: list[Path | None] = []
        for index, cell in enumerate(self.cells(column, field)):
            path = self.site.manifest.parent / cell if cell is not None else None
            if path is not None and not _exists(path):
                if self.site.missing_files == "error":
                    raise self.error(
                        index,
                        f"column '{column.column}': the file does not exist; restore it, or set "
                        "'missing_files: absent' in the site's file",
                    )
                path = None
            paths.append(path)
        return paths

    def _column(self, frame: pd.DataFrame, name: str, field: str) -> "pd.Series[str]":
        if name not in frame.columns:
            close = get_close_matches(name, map(str, frame.columns), n=1)
            lack = f"there is no column '{name}' (named by '{field}' of site '{self.site.name}')"
            told = f"{lack}; compare it with the manifest's header"
            # Not to be told, nor the whole header: where it was forgotten, the first patient stands in its place.
            here = f"{lack}; did you mean '{close[0]}'?" if close else told
            raise MmfmError(here, str(self.site.manifest), told)
        return frame[name]

    def _identifiers(self, name: str, field: str) -> list[str]:
        cells = self.cells(Column(column=name), field)
        if None in cells:
            raise self.error(cells.index(None), f"column '{name}' ({field}) is empty; every study needs one")
        return [str(cell) for cell in cells]


def _exists(path: Path) -> bool:
    # 'scans.npz:images[3]' is a member of an archive.
    archive, _, member = str(path).rpartition(".npz:")
    try:
        return Path(archive + ".npz").is_file() if archive and member else path.exists()
    except OSError:  # too long for a file's name: the column of another modality
        return False


def position_of(patient: str, purpose: str = "") -> float:
    """A point of [0, 1) for a patient, by a hash of the identifier; points for different purposes are independent."""
    text = f"{purpose}/{patient}" if purpose else patient
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8]) / 2**64


def read_frame(path: Path) -> pd.DataFrame:
    """Read a manifest with every cell as text, indexed by line (Parquet: by row) as an editor counts them.

    Raises:
        MmfmError: the file does not exist, is damaged, or is of no known kind.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise MmfmError(f"a manifest is one of {', '.join(READERS)}; convert it", str(path))
    try:
        frame = read(path)
    except MmfmError:
        raise
    except FileNotFoundError as error:
        raise MmfmError("the manifest does not exist; check 'manifest' in the site's file", str(path)) from error
    except Exception as error:  # pandas raises a dozen kinds for a damaged file
        remedy = next((mend for kind, mend in REMEDIES.items() if isinstance(error, kind)), "export it again")
        problem = f"cannot be read as {path.suffix[1:]} ({type(error).__name__}); {remedy}"
        raise MmfmError(problem, str(path)) from error
    return frame.map(_text)


def _read_csv(path: Path) -> pd.DataFrame:
    frame = pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8", skip_blank_lines=False)
    if not isinstance(frame.index, pd.RangeIndex):  # pandas would shift the columns by what is too much
        raise MmfmError("its rows have more cells than its header; put cells that hold commas in quotes", str(path))
    if len(frame.columns) == 1 and re.search("[;\t]", str(frame.columns[0])):
        raise MmfmError("its cells are separated by ';' or tabs; save it with commas between them", str(path))
    breaks = frame.apply(lambda column: column.str.count("\n")).sum(axis=1)  # inside quotes
    header = sum(str(name).count("\n") for name in frame.columns)
    frame.index = pd.Index(np.arange(len(frame)) + 2 + header + breaks.cumsum().to_numpy() - breaks.to_numpy())
    return frame[(frame != "").any(axis=1)]


def _read_parquet(path: Path) -> pd.DataFrame:
    # What pandas would hide in an index is a column like the others, and whole numbers stay whole beside a gap.
    frame: pd.DataFrame = parquet.read_table(path).to_pandas(ignore_metadata=True, integer_object_nulls=True)
    return frame.set_axis(pd.RangeIndex(1, len(frame) + 1))


def _read_jsonl(path: Path) -> pd.DataFrame:
    with path.open(encoding="utf-8") as file:
        rows = {number: json.loads(line) for number, line in enumerate(file, start=1) if line.strip()}
    return pd.DataFrame(list(rows.values()), index=list(rows), dtype=object)


REMEDIES: dict[type[Exception], str] = {
    UnicodeDecodeError: "save it in UTF-8",
    pd.errors.EmptyDataError: "it is empty; export it again",
    pd.errors.ParserError: "separate its cells by commas, and quote those that hold commas",
}

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": _read_csv,
    ".parquet": _read_parquet,
    ".jsonl": _read_jsonl,
}


def _text(cell: Any) -> str:
    if isinstance(cell, list | dict | np.ndarray):  # JSON Lines and Parquet can hold what a CSV writes as JSON
        cell = json.dumps(cell, default=np.ndarray.tolist)
    if pd.isna(cell):
        return ""
    # Half a character, which JSON can hold where a text was cut, can be neither hashed nor tokenised.
    return plain(str(cell).encode(errors="replace").decode().strip())


def as_number(cell: str) -> float | None:
    """The number a cell spells, or None; NaN is no number."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return None if math.isnan(number) else number
