"""Tables that `datasets` reads: ``.json .csv .parquet`` files and data sets of the hub."""

from __future__ import annotations

import csv
import hashlib
from pathlib import Path
from typing import Any

import msgspec

from lorakit.data.lines import Progress, explain, unrecognised
from lorakit.data.rows import FORMATS, Row, find_problem, recognise
from lorakit.errors import DataError

_CHECK_ROWS = 1_000


class Table:
    """Rows of a `datasets` table, checked like the lines of a file; a row is named by its number."""

    def __init__(self, name: str, table: Any, digest: str, *, format: str | None = None) -> None:
        self.path, self.digest, self._table = Path(name), digest, table
        self.num_rows_seen = len(table)
        self.problems: list[tuple[int, str]] = []
        found = format or recognise(table.column_names)
        if found is None:
            raise DataError(unrecognised(name, ", ".join(table.column_names)))
        self.format = found
        self._columns = [column for column in _columns_of(found) if column in table.column_names]
        self._table = table.select_columns(self._columns)
        self._rows = self._check()

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """Return row ``index`` of those without a problem."""
        return self._convert(self._table[self._rows[index]])

    def where(self, index: int) -> str:
        """Name row ``index`` as ``file: row N``, counted from 1 without the header."""
        return f"{self.path}: row {self._rows[index] + 1}"

    def _convert(self, row: dict[str, Any]) -> Row:
        return msgspec.convert(_without_nulls(row), FORMATS[self.format])

    def _check(self) -> list[int]:
        good = []
        for start in range(0, len(self._table), _CHECK_ROWS):
            columns = self._table[start : start + _CHECK_ROWS]
            for number in range(len(next(iter(columns.values()), []))):
                row = {name: values[number] for name, values in columns.items()}
                try:
                    problem = find_problem(self._convert(row))
                except msgspec.ValidationError as error:
                    problem = explain(error, FORMATS[self.format])
                if problem:
                    self.problems.append((start + number + 1, problem))
                else:
                    good.append(start + number)
        return good


def _columns_of(format: str) -> list[str]:
    return [field.encode_name for field in msgspec.structs.fields(FORMATS[format])]


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow adds to records whose neighbours have more fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def load_table(path: Path, *, format: str | None = None, progress: Progress | None = None) -> Table:
    """Read a ``.json``, ``.csv`` or ``.parquet`` file. CSV cells are text, never guessed to be numbers or nulls."""
    kind = path.suffix.removeprefix(".")
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    options: dict[str, Any] = {}
    if kind == "csv":
        options = {"features": _text_features(path), "keep_default_na": False}
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    table = _load(kind, str(path), data_files=str(path), split="train", **options)
    if progress:
        progress(path.stat().st_size)
    return Table(str(path), table, digest, format=format)


def load_hub_table(name: str, split: str, *, format: str | None = None) -> Table:
    """Read a data set of the hub by its name, for instance ``HuggingFaceH4/no_robots``."""
    table = _load(name, name, split=split)
    return Table(f"{name} ({split})", table, str(table._fingerprint), format=format)


def _load(kind: str, where: str, **options: Any) -> Any:
    import datasets

    datasets.disable_progress_bars()
    try:
        return datasets.load_dataset(kind, **options)
    except Exception as error:  # datasets raises a zoo of types, down to pandas' and Arrow's own
        cause = error.__cause__ or error
        message = " ".join(str(cause).split()) or type(cause).__name__
        raise DataError(f"{where}: cannot be read as a data set: {message}") from error


def _text_features(path: Path) -> Any:
    import datasets

    with path.open(newline="", encoding="utf-8-sig") as file:
        header = next(csv.reader(file), [])
    return datasets.Features({name: datasets.Value("string") for name in header})
