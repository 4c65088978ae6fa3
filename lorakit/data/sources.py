"""A path or a name to rows: files, folders, globs, bundled data sets and data sets of the hub behind one interface."""

from __future__ import annotations

import difflib
import glob
import hashlib
import os
import re
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from lorakit.data.lines import LineFile, Progress
from lorakit.data.rows import FORMATS, Row
from lorakit.data.tables import Table, load_hub_table, load_table
from lorakit.errors import ConfigError, DataError, report

SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet", ".txt")
BUNDLED = Path(__file__).parent.parent / "examples"
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+|[\w-]+")
_SHOW_PROGRESS_BYTES = 20 << 20


@dataclass
class Source:
    """All rows of a data set that passed the first check, addressed by one running index."""

    parts: list[LineFile | Table]
    num_skipped: int = 0
    first_skipped: str | None = None  # where, and why

    def __post_init__(self) -> None:
        self._ends: list[int] = []
        for part in self.parts:
            self._ends.append((self._ends[-1] if self._ends else 0) + len(part))

    def __len__(self) -> int:
        return self._ends[-1]

    def row(self, index: int) -> Row:
        """Return row ``index``."""
        part, local = self._locate(index)
        return part.row(local)

    def where(self, index: int) -> str:
        """Name row ``index`` for a person: file and line."""
        part, local = self._locate(index)
        return part.where(local)

    def folder(self, index: int) -> Path | None:
        """The folder of the file that row ``index`` is in; None where it is in none."""
        part, _ = self._locate(index)
        return part.path.parent if part.path.is_file() else None

    @property
    def has_images(self) -> bool:
        """Whether any row has an image."""
        return any(part.has_images for part in self.parts)

    @property
    def formats(self) -> list[str]:
        """The formats of the rows, without repeats."""
        return list(dict.fromkeys(part.format for part in self.parts))

    @property
    def unused_columns(self) -> dict[str, str]:
        """Columns that are not used, each with the format of its rows."""
        return {column: part.format for part in self.parts for column in part.unused_columns}

    @property
    def fingerprint(self) -> str:
        """A digest of the bytes of all files, independent of where they lie."""
        return hashlib.sha256(" ".join(part.digest for part in self.parts).encode()).hexdigest()[:16]

    def _locate(self, index: int) -> tuple[LineFile | Table, int]:
        number = bisect_right(self._ends, index)
        return self.parts[number], index - (self._ends[number - 1] if number else 0)


def open_source(
    path: str, *, format: str | None = None, on_error: Literal["raise", "skip"] = "raise", split: str = "train"
) -> Source:
    """Open ``path`` and check every row of it.

    Args:
        path: a file, a folder, a glob, the name of a bundled data set (``pig_latin/train``), or of a data set of the hub.
        format: one of ``FORMATS``; None recognises it by the columns.
        on_error: ``raise`` reports all bad rows in one DataError; ``skip`` leaves them out and counts them.
        split: which split of a data set of the hub.
    """
    if format is not None and format not in FORMATS:
        raise ConfigError(f"data.format={format} is unknown; choose one of {', '.join(FORMATS)}")
    files = find_files(path)
    parts: list[LineFile | Table]
    if files is not None and split != "train":
        raise ConfigError(f"data.split={split} has no effect: {path} is not a data set of the hub; name the file of that split")
    if files is None:
        parts = [load_hub_table(path, split, format=format)]
    else:
        with _progress_of(files) as progress:
            parts = [_open_file(file, format, progress) for file in files]
    return _settle(path, parts, on_error)


def find_files(path: str) -> list[Path] | None:
    """Return the files that ``path`` names, in order; None where it can only be a name of the hub."""
    if not path:
        raise ConfigError("data.path is empty; give a file, a folder, a glob or a name")
    here, bundled = Path(path).expanduser(), BUNDLED / f"{path}.jsonl"
    if here.is_file():
        if here.suffix not in SUFFIXES:
            raise DataError(f"{path}: unknown file type {here.suffix!r}; known: {', '.join(SUFFIXES)}")
        return [here]
    if here.is_dir():
        if not os.access(here, os.R_OK | os.X_OK):
            raise DataError(f"{path}: no permission to read this folder")
        files = sorted(file for file in here.rglob("*") if _is_data_file(file.relative_to(here)) and file.is_file())
        if not files:
            raise DataError(f"{path}: no file in this folder ends in {', '.join(SUFFIXES)}")
        return files
    if bundled.is_file():
        return [bundled]
    if glob.has_magic(path):
        files = sorted(Path(file) for file in glob.glob(str(here), recursive=True) if Path(file).suffix in SUFFIXES)
        if not files:
            raise DataError(f"{path}: this pattern matches no file that ends in {', '.join(SUFFIXES)}")
        return files
    if here.suffix in SUFFIXES or not _HUB_NAME.fullmatch(path):
        raise DataError(f"{path}: no such file{_suggest_file(here)}")
    if near := difflib.get_close_matches(path, _bundled_names(), n=1, cutoff=0.7):
        raise DataError(f"{path}: no such data set; did you mean {near[0]}?")
    return None


def _suggest_file(path: Path) -> str:
    """The nearest name in the folder, or the first ones there."""
    there = sorted(file.name for file in path.parent.glob("*") if file.suffix in SUFFIXES) if path.parent.is_dir() else []
    if near := difflib.get_close_matches(path.name, there, n=1, cutoff=0.7):
        return f"; did you mean {path.with_name(near[0])}?"
    return f" (the folder has: {', '.join(there[:5])})" if there else ""


def _bundled_names() -> list[str]:
    return [str(file.relative_to(BUNDLED).with_suffix("")) for file in BUNDLED.rglob("*.jsonl")]


def _is_data_file(path: Path) -> bool:
    """Whether a file of a folder holds rows: by its ending, not hidden, and no README or LICENSE."""
    is_hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in SUFFIXES and not is_hidden and not path.name.upper().startswith(("README", "LICENSE"))


def _open_file(path: Path, format: str | None, progress: Progress | None) -> LineFile | Table:
    try:
        if path.suffix in (".jsonl", ".ndjson", ".txt") or (path.suffix == ".json" and _is_json_lines(path)):
            return LineFile(path, format=format, progress=progress)
        return load_table(path, format=format, progress=progress)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error


def _is_json_lines(path: Path) -> bool:
    """Whether a ``.json`` file holds one object per line rather than one array."""
    with path.open("rb") as file:
        return file.read(64).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{")


def _settle(path: str, parts: list[LineFile | Table], on_error: str) -> Source:
    problems = [
        f"{part.path}:{number}: {text}" if isinstance(part, LineFile) else f"{part.path}: row {number}: {text}"
        for part in parts
        for number, text in part.problems
    ]
    num_rows = sum(part.num_rows_seen for part in parts)
    if problems and on_error == "raise":
        remedy = "Mend these rows, or set data.on_error=skip to leave them out (they are counted)."
        raise DataError(report(f"{path}: {len(problems):,} of {num_rows:,} rows cannot be used:", problems, remedy=remedy))
    source = Source(parts, num_skipped=len(problems), first_skipped=problems[0] if problems else None)
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
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    columns = (TextColumn("checking rows"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    with Bar(*columns, console=console, transient=True) as bar:
        task = bar.add_task("", total=total)
        yield lambda num_bytes: bar.advance(task, num_bytes)
