"""A manifest as a table of text cells: reading CSV, Parquet and JSON Lines, missing cells, renamed values.

Error texts name the row and the column, never the value that stands there: they may leave the site.
"""

import math
from collections.abc import Callable
from pathlib import Path

import pandas as pd

from mmfm_core.config.site import MISSING_CELLS, Column, Site
from mmfm_core.config.strict import did_you_mean
from mmfm_core.errors import MmfmError

READERS: dict[str, Callable[[Path], pd.DataFrame]] = {
    ".csv": lambda path: pd.read_csv(path, dtype=str, keep_default_na=False, encoding="utf-8"),
    ".parquet": pd.read_parquet,
    ".jsonl": lambda path: pd.read_json(path, lines=True, dtype=False),
}


class Table:
    """The rows of a manifest that belong to one site.

    Attributes:
        patients: patient identifier of each row.
        studies: study identifier of each row (the row's number where the manifest has none).
    """

    def __init__(self, site: Site) -> None:
        self.site = site
        frame = read_frame(site.manifest)
        frame.index = pd.RangeIndex(2, len(frame) + 2)  # as an editor counts lines: the header is line 1
        if site.site is not None:
            frame = frame[self._column(frame, site.site, "site") == site.name]
        if frame.empty:
            lack = f"no row has '{site.name}' in column '{site.site}'" if site.site else "it has no rows"
            raise MmfmError(f"{site.manifest}: site '{site.name}' is empty: {lack}")
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

    def error(self, index: int, problem: str) -> MmfmError:
        """An error about one row."""
        return MmfmError(f"{self.site.manifest}, row {self.row(index)}: {problem}")

    def cells(self, column: Column, field: str) -> list[str | None]:
        """A column's cells after `missing` and `values`; None is missing. `field` names the mapping in errors."""
        missing = {*MISSING_CELLS, *self.site.missing, *column.missing}
        # Cells are compared as text, and as numbers too, since "1" may be written 1.0 by the next export.
        missing_numbers = {number for cell in missing if (number := as_number(cell)) is not None}
        renamed_numbers = {n: new for old, new in column.values.items() if (n := as_number(old)) is not None}

        def read(cell: str) -> str | None:
            number = as_number(cell)
            if cell in missing or number in missing_numbers:
                return None
            return column.values.get(cell) or (renamed_numbers.get(number, cell) if number is not None else cell)

        return [read(cell) for cell in self._column(self._frame, column.column, field)]

    def _column(self, frame: pd.DataFrame, name: str, field: str) -> "pd.Series[str]":
        if name not in frame.columns:
            raise MmfmError(
                f"{self.site.manifest}: there is no column '{name}' (named by '{field}' of site "
                f"'{self.site.name}'); {did_you_mean(name, map(str, frame.columns))}"
            )
        return frame[name].astype(str).str.strip()

    def _identifiers(self, name: str, field: str) -> list[str]:
        cells = self.cells(Column(column=name), field)
        if None in cells:
            raise self.error(cells.index(None), f"column '{name}' ({field}) is empty; every study needs one")
        return [str(cell) for cell in cells]


def read_frame(path: Path) -> pd.DataFrame:
    """Read a manifest with every cell as text.

    Raises:
        MmfmError: the file does not exist, is damaged, or is of no known kind.
    """
    read = READERS.get(path.suffix.lower())
    if read is None:
        raise MmfmError(f"{path}: a manifest is one of {', '.join(READERS)}; convert it")
    try:
        frame = read(path)
    except FileNotFoundError as error:
        raise MmfmError(f"{path}: the manifest does not exist; check 'manifest' in the site's file") from error
    except Exception as error:  # pandas raises a dozen kinds for a damaged file
        raise MmfmError(
            f"{path}: cannot be read as {path.suffix[1:]} ({type(error).__name__}); export it again"
        ) from error
    return frame.map(lambda cell: "" if pd.isna(cell) else str(cell))


def as_number(cell: str) -> float | None:
    """The number a cell spells, or None; NaN is no number."""
    try:
        number = float(cell)
    except ValueError:
        return None
    return None if math.isnan(number) else number
