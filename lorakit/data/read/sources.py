"""A path or a name to rows: files, folders, globs, bundled data sets and data sets of the hub
behind one interface.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import hashlib
import itertools
import math
import os
import re
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import msgspec
import numpy as np

from lorakit.data.read.columns import Columns, check_columns
from lorakit.data.read.custom_format import Format, OwnFormat, find_format
from lorakit.data.read.lines import LineFile, Progress
from lorakit.data.read.rows import CHAT_PAIRS, Preference, Row
from lorakit.data.read.tables import Table, load_hub_table, load_table
from lorakit.errors import ConfigError, DataError, fold, report
from lorakit.extras import find_problem

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
TABLES = (".csv", ".parquet")  # that the package `datasets` reads
BUNDLED = Path(__file__).parents[2] / "examples"
FIX_OR_SKIP = "Fix these rows, or set data.on_error=skip to leave them out (they are counted)."
_HUB_NAME = re.compile(r"\w[\w.-]*/[\w.-]+|[\w-]+")
_SHOW_PROGRESS_BYTES = 20 << 20


def _format_of(file: LineFile | Table) -> str:
    """The format of a file's rows; of pairs it is said where they are conversations."""
    if file.format == "preference" and len(file):
        first = file.row(0)
        if isinstance(first, Preference) and not isinstance(first.chosen, str):
            return CHAT_PAIRS
    return file.format


@dataclass(frozen=True)
class SourceSpec:
    """One of several sources of rows.

    Args:
        path: as ``data.path``.
        weight: how often each of its rows is seen in an epoch; of 0.5 another half each time.
        name: under which its figures are logged; None is the file's name without its ending.
        format, columns, split: as the settings of ``data``, which hold where these are None.
    """

    path: str
    weight: float = 1.0
    name: str | None = None
    format: str | None = None
    columns: dict[str, str] | None = None
    split: str | None = None


@dataclass
class Source:
    """All rows of a data set that passed the first check, addressed by one running index."""

    files: list[LineFile | Table]
    num_skipped: int = 0
    first_skipped: str | None = None  # where, and why
    names: tuple[str, ...] = ()  # of the sources that are mixed; empty where there is only one
    weights: tuple[float, ...] = ()  # of each, how often its rows are seen in an epoch
    origins: tuple[int, ...] = ()  # of each file, which source it is from

    def __post_init__(self) -> None:
        self._ends = list(itertools.accumulate(map(len, self.files)))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Row:
        """Return row ``index``."""
        file, local = self._locate(index)
        return file.row(local)

    def where(self, index: int) -> str:
        """Name row ``index`` for a person: file and line."""
        file, local = self._locate(index)
        return file.where(local)

    def folder(self, index: int) -> Path | None:
        """The folder of the file that row ``index`` is in; None where it is in none."""
        file, _ = self._locate(index)
        return file.path.parent if file.path.is_file() else None

    def origins_of(self, indices: np.ndarray) -> np.ndarray:
        """Which of several sources each row of ``indices`` is from."""
        files = np.searchsorted(self._ends, indices, side="right")
        return np.array(self.origins)[files] if self.origins else np.zeros(len(indices), int)

    @property
    def has_images(self) -> bool:
        """Whether any row has an image."""
        return any(file.has_images for file in self.files)

    @property
    def formats(self) -> list[str]:
        """The formats of the rows, without repeats."""
        return list(dict.fromkeys(_format_of(file) for file in self.files))

    @property
    def unused_columns(self) -> dict[str, str]:
        """Columns that are not used, each with the format of its rows."""
        return {column: file.format for file in self.files for column in file.unused_columns}

    @property
    def fingerprint(self) -> str:
        """A digest of the bytes of all files, independent of where they lie."""
        digests = [file.digest for file in self.files]
        digests += [f"{self.origins} {self.weights}"] if self.names else []
        return hashlib.sha256(" ".join(digests).encode()).hexdigest()[:16]

    def _locate(self, index: int) -> tuple[LineFile | Table, int]:
        number = bisect_right(self._ends, index)
        return self.files[number], index - (self._ends[number - 1] if number else 0)


def open_sources(
    mixed: Sequence[SourceSpec],
    *,
    format: Format = None,
    columns: Mapping[str, str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    split: str = "train",
) -> Source:
    """Open several sources as one. The other arguments are as for ``open_source``.

    Raises:
        DataError: one report of what is wrong with the rows of all of them.
    """
    found, problems = [], []
    for entry in mixed:
        try:
            found.append(
                open_source(
                    entry.path,
                    format=entry.format or format,
                    columns=entry.columns or columns,
                    on_error=on_error,
                    split=entry.split or split,
                )
            )
        except DataError as error:
            problems.append(str(error))
    if problems:
        raise DataError("\n".join(problems))
    return Source(
        [file for source in found for file in source.files],
        num_skipped=sum(source.num_skipped for source in found),
        first_skipped=next(filter(None, (source.first_skipped for source in found)), None),
        names=tuple(name_sources(mixed)),
        weights=tuple(float(entry.weight) for entry in mixed),
        origins=tuple(number for number, source in enumerate(found) for _ in source.files),
    )


def read_mixed(entries: Sequence[SourceSpec | Mapping[str, Any] | str]) -> list[SourceSpec]:
    """The entries of ``data.sources``, of which one that is a text alone is a path. Raises
    ConfigError with all problems.
    """
    mixed, problems = [], []
    fields = [field.name for field in dataclasses.fields(SourceSpec)]
    for number, entry in enumerate(entries):
        key = f"data.sources[{number}]"
        if isinstance(entry, SourceSpec | str):
            mixed.append(SourceSpec(entry) if isinstance(entry, str) else entry)
            continue
        if not isinstance(entry, Mapping) or "path" not in entry:
            problems.append(f"{key}={entry}: write a path, or {{path: …, weight: …}}")
            continue
        for name in entry.keys() - fields:
            near = difflib.get_close_matches(name, fields, n=1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(fields)}"
            problems.append(f"unknown key {key}.{name}; {hint}")
        try:
            known = {name: entry[name] for name in fields if name in entry}
            mixed.append(msgspec.convert(known, SourceSpec))
        except msgspec.ValidationError as error:
            problems.append(f"{key}: {str(error).lower().replace('`', '')}")
    problems += [
        f"data.sources: {entry.path} has weight {entry.weight}, which must be above 0"
        for entry in mixed
        if not 0 < entry.weight < math.inf
    ]
    if problems or not entries:
        raise ConfigError("\n".join(problems) or "data.sources is empty")
    return mixed


def name_sources(mixed: Sequence[SourceSpec]) -> list[str]:
    """A name for each source, all different."""
    names: list[str] = []
    for entry in mixed:
        path = Path(entry.path)
        name = entry.name or (path.stem if path.suffix in SUFFIXES else path.name) or entry.path
        numbered = (f"{name}-{number}" for number in itertools.count(2))
        names.append(next(one for one in itertools.chain([name], numbered) if one not in names))
    return names


def open_source(
    path: str,
    *,
    format: Format = None,
    columns: Mapping[str, str] | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    split: str = "train",
) -> Source:
    """Open ``path`` and check every row of it.

    Args:
        path: a file, a folder, a glob, the name of a bundled data set (``pig_latin/train``), or of
            a data set of the hub.
        format: one of ``FORMATS``, or a function (or its dotted name) that makes a row of a record;
            None recognises it by the columns.
        columns: what the data set calls the columns of our formats, by our names.
        on_error: ``raise`` reports all bad rows in one DataError; ``skip`` leaves them out and
            counts them.
        split: which split of a data set of the hub.
    """
    chosen = find_format(format)
    renamed = check_columns(columns or {})
    files = find_files(path)
    if problem := _find_reader_problem(path, files):
        raise ConfigError(problem)
    opened: list[LineFile | Table]
    if files is not None and split != "train":
        raise ConfigError(
            f"data.split={split} has no effect: {path} is not a data set of the hub; name the file"
            " of that split"
        )
    if files is None:
        opened = [load_hub_table(path, split, format=chosen, columns=renamed)]
    else:
        with _progress_of(files) as progress:
            opened = [_open_file(file, chosen, renamed, progress) for file in files]
    return _settle(path, opened, on_error)


def find_files(path: str) -> list[Path] | None:
    """Return the files that ``path`` names, in order; None for a name of the hub."""
    if not path:
        raise ConfigError("data.path is empty; give a file, a folder, a glob or a name")
    here, bundled = Path(path).expanduser(), BUNDLED / f"{path}.jsonl"
    if here.is_file():
        if here.suffix not in SUFFIXES:
            raise DataError(
                f"{path}: unknown file type {here.suffix!r}; known: {', '.join(SUFFIXES)}"
            )
        return [here]
    if here.is_dir():
        if not os.access(here, os.R_OK | os.X_OK):
            raise DataError(f"{path}: no permission to read this folder")
        files = sorted(
            file
            for file in here.rglob("*")
            if _is_data_file(file.relative_to(here)) and file.is_file()
        )
        if not files:
            raise DataError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if bundled.is_file():
        return [bundled]
    if glob.has_magic(path):
        files = sorted(
            Path(file)
            for file in glob.glob(str(here), recursive=True)
            if Path(file).suffix in SUFFIXES
        )
        if not files:
            raise DataError(
                f"{path}: this pattern matches no file that ends in {', '.join(SUFFIXES)}"
            )
        return files
    if here.suffix in SUFFIXES or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{path}: no such file{_suggest_file(here)}")
    if near := difflib.get_close_matches(path, _bundled_names(), n=1, cutoff=0.7):
        raise DataError(f"{path}: no such data set; did you mean {near[0]}?")
    return None


def check_paths(paths: Iterable[str]) -> None:
    """Look for ``paths`` and open none of them. Raises DataError, with all that are not there or
    cannot be read for want of a package.
    """
    problems = []
    for path in paths:
        try:
            problem = _find_reader_problem(path, find_files(path))
        except DataError as error:
            problem = str(error)
        problems += [problem] if problem else []
    if problems:
        raise DataError("\n".join(problems))


def _find_reader_problem(path: str, files: list[Path] | None) -> str | None:
    """What to install before ``files`` can be read, or None where nothing is missing."""
    if files is None:
        problem = find_problem("datasets", "a data set of the hub")
        return problem and f"{path}: no such file or folder here, and {problem}"
    tables = [file for file in files if file.suffix in TABLES]
    return find_problem("datasets", str(tables[0])) if tables else None


def _suggest_file(path: Path) -> str:
    """The nearest name in the folder, or the first ones there."""
    there = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES)
    if near := difflib.get_close_matches(path.name, there, n=1, cutoff=0.7):
        return f"; did you mean {path.with_name(near[0])}?"
    return f" (the folder has: {', '.join(there[:5])})" if there else ""


def _bundled_names() -> list[str]:
    return [str(file.relative_to(BUNDLED).with_suffix("")) for file in BUNDLED.rglob("*.jsonl")]


def _is_data_file(path: Path) -> bool:
    """Whether a file holds rows: by its ending, not hidden, and no README or LICENSE."""
    if any(name.startswith(".") for name in path.parts):
        return False
    return path.suffix in SUFFIXES and not path.name.upper().startswith(("README", "LICENSE"))


def _open_file(
    path: Path, format: str | OwnFormat | None, columns: Columns, progress: Progress | None
) -> LineFile | Table:
    try:
        if path.suffix in (".jsonl", ".ndjson", ".txt") or (
            path.suffix == ".json" and _is_json_lines(path)
        ):
            return LineFile(path, format=format, columns=columns, progress=progress)
        return load_table(path, format=format, columns=columns, progress=progress)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _is_json_lines(path: Path) -> bool:
    """Whether a ``.json`` file holds one object per line rather than one array."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _settle(path: str, files: list[LineFile | Table], on_error: str) -> Source:
    problems = [problem for file in files for problem in file.problems]
    num_rows = sum(file.num_rows_seen for file in files)
    if problems and on_error == "raise":
        title = f"{path}: {len(problems):,} of {num_rows:,} rows cannot be used:"
        raise DataError(report(title, fold(problems), remedy=FIX_OR_SKIP))
    source = Source(
        files, num_skipped=len(problems), first_skipped=": ".join(problems[0]) if problems else None
    )
    if len(source) == 0:
        why = f"{num_rows:,} rows read, all of them bad" if num_rows else "it is empty"
        raise DataError(f"{path}: no usable row ({why})")
    return source


@contextmanager
def _progress_of(files: list[Path]) -> Iterator[Progress | None]:
    """A bar over the bytes of ``files`` where a person watches and waits; else nothing."""
    from rich.console import Console

    console, total = Console(stderr=True), sum(file.stat().st_size for file in files)
    if total < _SHOW_PROGRESS_BYTES or not console.is_terminal:
        yield None
        return
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )
    from rich.progress import Progress as Bar

    columns = (
        TextColumn("checking rows"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
