"""Tables: ``.json`` arrays, ``.csv``, ``.parquet`` and data sets of the hub; `datasets` holds
all but the first, off memory.
"""

from __future__ import annotations

import csv
import glob
import hashlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from lorakit.data.read.columns import (
    Columns,
    find_column_problem,
    recognise,
    row_type,
    unrecognised,
    unused_columns,
)
from lorakit.data.read.custom_format import OwnFormat, format_of
from lorakit.data.read.lines import Progress, explain, find_other_format
from lorakit.data.read.rows import FORMATS, Row, find_problem, has_images
from lorakit.errors import DataError, fold, report
from lorakit.extras import require
from lorakit.hub import explain_hub_error, find_hub_problem, stay_offline

_CHECK_ROWS = 1_000
_CHECK_IMAGE_ROWS = 32  # where rows hold images, which may be some megabytes each
csv.field_size_limit(sys.maxsize)  # else a cell ends at 128 KB
Records = Any  # a list of dicts, or a datasets.Dataset


class Table:
    """Rows of a table, checked like the lines of a file; a row is named by its number, counted
    from 1 without the header.
    """

    def __init__(
        self,
        name: str,
        records: Records,
        present: list[str],
        digest: str,
        *,
        format: str | OwnFormat | None = None,
        columns: Columns = (),
        bad_rows: dict[int, str] | None = None,
    ) -> None:
        self.path, self.digest, self._records = Path(name), digest, records
        self.num_rows_seen, self.has_images = len(records), False
        self.problems: list[tuple[str, str]] = []  # table and row, and what is wrong
        self._own = format if isinstance(format, OwnFormat) else None
        found = self._resolve_own(self._own) if self._own else format or recognise(present, columns)
        if found is None:
            raise DataError(unrecognised(name, present, columns))
        assert isinstance(found, str)
        self.format, self._type = found, row_type(found, columns)
        if columns and not self._own and (problem := find_column_problem(columns, found, present)):
            raise DataError(f"{name}: {problem}")
        self.unused_columns = [] if self._own else unused_columns(present, self._type)
        if not isinstance(records, list):
            used = [column for column in present if column not in self.unused_columns]
            records = records.select_columns(used)
            self._records = records.cast(_undecoded(records.features))
        self._rows = self._check(bad_rows or {})

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> Row:
        """Return row ``index`` of those without a problem."""
        row = self._convert(self._records[self._rows[index]])
        assert row is not None  # those are left out
        return row

    def where(self, index: int) -> str:
        """Name row ``index`` as ``file: row N``."""
        return f"{self.path}: row {self._rows[index] + 1}"

    def _resolve_own(self, own: OwnFormat) -> str:
        """The format of what the user's function makes of the first record that it can use."""
        problems = []
        for number, record in enumerate(_records_of(self._records)):
            try:
                if (row := own.convert(_without_nulls(record))) is not None:
                    return format_of(row)
            except msgspec.ValidationError as error:
                problem = explain(error, FORMATS["text"])
                problems.append((f"{self.path}: row {number + 1}", problem))
        raise DataError(
            report(f"{self.path}: {own.name} makes no row of any record:", fold(problems))
        )

    def _convert(self, record: Any) -> Row | None:
        record = _without_nulls(record)
        return self._own.convert(record) if self._own else msgspec.convert(record, self._type)

    def _check(self, bad_rows: dict[int, str]) -> list[int]:
        good = []
        for number, record in enumerate(_records_of(self._records)):
            problem = bad_rows.get(number)
            try:
                if problem is None:
                    row = self._convert(record)
                    if row is None:
                        continue
                    problem = find_problem(row) or find_other_format(
                        row, self._type, self._own, self.format
                    )
                    self.has_images = self.has_images or has_images(row)
            except msgspec.ValidationError as error:
                problem = explain(error, self._type)
            if problem:
                self.problems.append((f"{self.path}: row {number + 1}", problem))
            else:
                good.append(number)
        return good


def load_table(
    path: Path,
    *,
    format: str | OwnFormat | None = None,
    columns: Columns = (),
    progress: Progress | None = None,
) -> Table:
    """Read a ``.json``, ``.csv`` or ``.parquet`` file. CSV cells are text, never guessed to be
    numbers or nulls. Raises DataError, and ConfigError where the package `datasets` is missing.
    """
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    table = {".json": _load_json, ".csv": _load_csv, ".parquet": _load_parquet}[path.suffix](
        path, digest, {"format": format, "columns": columns}
    )
    if progress:
        progress(path.stat().st_size)
    return table


def load_hub_table(
    name: str, split: str, *, format: str | OwnFormat | None = None, columns: Columns = ()
) -> Table:
    """Read a data set of the hub by its name, for instance ``HuggingFaceH4/no_robots``. Raises
    DataError, and ConfigError where the package `datasets` is missing.
    """
    datasets = _datasets(name)
    if problem := find_hub_problem():
        # so that what is cached is read at once, and what is not is an error at once
        stay_offline()
    try:
        records = datasets.load_dataset(name, split=split)
    except Exception as error:  # datasets and the hub raise a zoo of types
        if problem:
            raise DataError(
                f"{name}: no such file or folder; as a data set of the hub it is not in the cache,"
                f" and {problem}"
            ) from error
        raise DataError(explain_hub_error(name, error) or _foreign(name, error)) from error
    return Table(
        f"{name} ({split})",
        records,
        records.column_names,
        str(records._fingerprint),
        format=format,
        columns=columns,
    )


def _load_json(path: Path, digest: str, options: dict[str, Any]) -> Table:
    try:
        records = msgspec.json.decode(path.read_bytes().removeprefix(b"\xef\xbb\xbf"))
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        reason = explain(error, FORMATS["text"])
        raise DataError(f"{path}: cannot be read as a data set: {reason}") from error
    if not isinstance(records, list):
        raise DataError(f"{path}: a .json file holds an array of rows, or one row per line")
    present = dict.fromkeys(
        name for record in records[:_CHECK_ROWS] if isinstance(record, dict) for name in record
    )
    return Table(str(path), records, list(present), digest, **options)


def _load_csv(path: Path, digest: str, options: dict[str, Any]) -> Table:
    datasets = _datasets(str(path))
    try:
        bad_rows, header = _check_csv(path)
        features = datasets.Features({name: datasets.Value("string") for name in header if name})
        # not from_csv: it globs the name, caches by path and time, and guesses types
        records = datasets.Dataset.from_generator(
            _csv_records,
            features=features,
            gen_kwargs={"path": str(path), "digest": digest},
            cache_dir=_cache(digest),
        )
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: not UTF-8: {error.reason} at byte {error.start}; save it as UTF-8"
        ) from error
    except csv.Error as error:
        raise DataError(f"{path}: malformed CSV: {error}") from error
    return Table(str(path), records, records.column_names, digest, **options, bad_rows=bad_rows)


def _check_csv(path: Path) -> tuple[dict[int, str], list[str]]:
    """Return (what is wrong, by row, with rows that have another number of cells than the
    header; the header).
    """
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        twice = sorted({name for name in header if name and header.count(name) > 1})
        if twice:
            raise DataError(f"{path}: the header names {', '.join(twice)} twice")
        bad, num_rows = {}, 0
        for row in reader:
            if row and len(row) != len(header):
                bad[num_rows] = (
                    f"{len(row)} cells, but the header has {len(header)} (a comma outside of"
                    " quotes?)"
                )
            num_rows += bool(row)
    if not num_rows:
        raise DataError(f"{path}: no row after the header")
    for mark in ";\t|":
        if len(header) == 1 and mark in header[0]:
            raise DataError(f"{path}: its cells are separated by {mark!r}; save it with commas")
    return bad, header


def _csv_records(path: str, digest: str) -> Iterator[dict[str, str]]:
    """The records of a CSV; ``digest`` is part of the key of datasets' cache, so that no stale
    rows come from it.
    """
    with Path(path).open(newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file)
        header = next(reader, [])
        for row in reader:
            if row:
                cells = [*row, *[""] * (len(header) - len(row))]
                yield {name: cell for name, cell in zip(header, cells, strict=False) if name}


def _load_parquet(path: Path, digest: str, options: dict[str, Any]) -> Table:
    datasets = _datasets(str(path))
    try:
        records = datasets.Dataset.from_parquet(glob.escape(str(path)), cache_dir=_cache(digest))
    except Exception as error:  # down to Arrow's own
        raise DataError(_foreign(str(path), error)) from error
    return Table(str(path), records, records.column_names, digest, **options)


def _datasets(what: str) -> Any:
    """The package `datasets`, which reads ``what``, without its progress bars: ours counts bytes
    of all files.
    """
    datasets = require("datasets", what)
    datasets.disable_progress_bars()
    return datasets


def _cache(digest: str) -> str:
    import datasets

    return str(Path(datasets.config.HF_DATASETS_CACHE) / "lorakit" / digest[:16])


def _undecoded(features: Any) -> Any:
    """``features`` with images as bytes and path: nothing is decoded yet."""
    import datasets

    if isinstance(features, datasets.Image):
        return datasets.Image(decode=False)
    if isinstance(features, dict):
        found = {name: _undecoded(inner) for name, inner in features.items()}
        return datasets.Features(found) if isinstance(features, datasets.Features) else found
    if isinstance(features, list):
        return [_undecoded(inner) for inner in features]
    if isinstance(features, datasets.List):
        return datasets.List(_undecoded(features.feature), length=features.length)
    return features


def _holds_images(features: Any) -> bool:
    return "Image(" in str(features) or "binary" in str(features)


def _records_of(records: Records) -> Iterator[Any]:
    if isinstance(records, list):
        yield from records
        return
    num = _CHECK_ROWS if not _holds_images(records.features) else _CHECK_IMAGE_ROWS
    for start in range(0, len(records), num):
        columns = records[start : start + num]
        for values in zip(*columns.values(), strict=True):
            yield dict(zip(columns, values, strict=True))


def _without_nulls(value: Any) -> Any:
    """Drop the nulls that Arrow adds to records whose neighbours have more fields."""
    if isinstance(value, dict):
        return {key: _without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [_without_nulls(inner) for inner in value]
    return value


def _foreign(where: str, error: Exception) -> str:
    cause = error.__cause__ or error
    reason = " ".join(str(cause).split()) or type(cause).__name__
    return f"{where}: cannot be read as a data set: {reason}"
