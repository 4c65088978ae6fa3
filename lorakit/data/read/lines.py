"""Files of one row per line, JSON or text: checked in one pass at full speed, then read at random
by byte offset.

`datasets` names no line when JSON is malformed and stops at the first fault; here every fault of a
file is collected with its line number. Of each row only its offset and line number stay in memory
(12 bytes), so files may be larger than memory.
"""

from __future__ import annotations

import codecs
import hashlib
import mmap
from array import array
from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import msgspec

from lorakit.data.read.columns import (
    Columns,
    find_column_problem,
    recognise,
    required_columns,
    row_type,
    unrecognised,
    unused_columns,
)
from lorakit.data.read.custom_format import OwnFormat, OwnFormatError, format_of
from lorakit.data.read.rows import Message, Role, Row, Text, find_problem, has_images
from lorakit.errors import DataError, fold, report

Progress = Callable[[int], None]  # takes the number of further bytes read
_PROGRESS_BYTES = 4 << 20
_NUM_SAMPLED = 200
_BOM = b"\xef\xbb\xbf"


class LineFile:
    """Rows of one ``.jsonl`` or ``.txt`` file. ``problems`` holds what its first pass found, each
    with file and line.
    """

    def __init__(
        self,
        path: Path,
        *,
        format: str | OwnFormat | None = None,
        columns: Columns = (),
        progress: Progress | None = None,
    ) -> None:
        self.path, self._columns = path, columns
        self._own = format if isinstance(format, OwnFormat) else None
        self.num_rows_seen, self.has_images = 0, False
        self.problems: list[tuple[str, str]] = []
        self._offsets, self._lines = array("q"), array("I")
        self.format = self._resolve_own(self._own) if self._own else self._resolve_format(format)
        self._type = row_type(self.format, columns)
        self._decode = self._make_decoder()
        with path.open("rb") as file:
            self.digest = hashlib.file_digest(file, "sha256").hexdigest()
        self._map = _map(path)
        self._scan(progress)
        if columns and not self._own and len(self):
            problem = find_column_problem(columns, self.format, self._sampled_columns())
            if problem:
                raise DataError(f"{self.path}: {problem}")

    def __len__(self) -> int:
        return len(self._offsets)

    def row(self, index: int) -> Row:
        """Return row ``index`` of those without a problem."""
        row = self._decode(self._line(index))
        assert row is not None  # those are left out
        return row

    def _line(self, index: int) -> bytes:
        start = self._offsets[index]
        end = self._map.find(b"\n", start)
        return self._map[start : end if end >= 0 else len(self._map)]

    def where(self, index: int) -> str:
        """Name row ``index`` as ``file:line``."""
        return f"{self.path}:{self._lines[index]}"

    @cached_property
    def unused_columns(self) -> list[str]:
        """Columns that are not used, as far as the first rows tell."""
        if self.path.suffix == ".txt" or self._own:
            return []
        return unused_columns(self._sampled_columns(), self._type)

    def _sampled_columns(self) -> list[str]:
        """The columns of the first rows, without repeats."""
        rows = (msgspec.json.decode(self._line(i)) for i in range(min(len(self), _NUM_SAMPLED)))
        return list(dict.fromkeys(column for row in rows for column in row))

    def _resolve_own(self, own: OwnFormat) -> str:
        """The format of what the user's function makes of the first line that it can use."""
        problems = []
        for number, line in _lines_of(self.path):
            try:
                row = own.convert(self._record(line))
                if row is not None:
                    return format_of(row)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                problems.append((f"{self.path}:{number}", explain(error, Text)))
        raise DataError(
            report(f"{self.path}: {own.name} makes no row of any line:", fold(problems))
        )

    def _record(self, line: bytes) -> Any:
        if self.path.suffix == ".txt":
            return {"text": line.rstrip(b"\r\n").decode("utf-8")}
        return msgspec.json.decode(line)

    def _resolve_format(self, wanted: Any) -> str:
        if self.path.suffix == ".txt":
            if wanted not in (None, "text"):
                raise DataError(
                    f"{self.path}: data.format={wanted}, but a .txt file holds plain text, one row"
                    " per line"
                )
            return "text"
        if wanted:
            return wanted
        problems: list[tuple[str, str]] = []
        columns: list[str] | None = None
        with self.path.open("rb") as file:
            if file.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE):
                raise DataError(f"{self.path}: this file is UTF-16; save it as UTF-8")
        for number, line in _lines_of(self.path):
            try:
                row = msgspec.json.decode(line)
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                problems.append((f"{self.path}:{number}", explain(error, Text)))
                continue
            if isinstance(row, dict) and (found := recognise(row, self._columns)):
                # lines of another kind before it are reported by the pass over all lines
                return found
            if isinstance(row, dict) and columns is None:
                columns = list(row)
            problems.append((f"{self.path}:{number}", "not a row of a known format"))
        if columns is not None:
            raise DataError(unrecognised(str(self.path), columns, self._columns))
        if problems:
            raise DataError(report(f"{self.path}: no line is a row:", fold(problems)))
        raise DataError(f"{self.path}: no row in this file (it is empty)")

    def _make_decoder(self) -> Callable[[bytes], Row | None]:
        if own := self._own:
            return lambda line: own.convert(self._record(line))
        if self.path.suffix == ".txt":
            return lambda line: Text(line.rstrip(b"\r").decode("utf-8"))
        return msgspec.json.Decoder(self._type).decode

    def _scan(self, progress: Progress | None) -> None:
        offset = reported = 0
        decode, add_offset, add_line = self._decode, self._offsets.append, self._lines.append
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                start, offset = offset, offset + len(line)
                if offset - reported > _PROGRESS_BYTES and progress:
                    progress(offset - reported)
                    reported = offset
                if number == 1 and line.startswith(_BOM):
                    line, start = line[3:], start + 3
                if line.isspace() or not line:
                    continue
                self.num_rows_seen += 1
                try:
                    row = decode(line)
                    if row is None:
                        continue
                    problem = find_problem(row) or find_other_format(
                        row, self._type, self._own, self.format
                    )
                    self.has_images = self.has_images or has_images(row)
                except (msgspec.DecodeError, UnicodeDecodeError) as error:
                    problem = explain(error, self._type)
                if problem:
                    self.problems.append((f"{self.path}:{number}", problem))
                else:
                    add_offset(start)
                    add_line(number)
        if progress:
            progress(offset - reported)


def find_other_format(row: Row, kind: type[Row], own: OwnFormat | None, format: str) -> str | None:
    """What is wrong where the user's function makes rows of several formats."""
    if own is None or isinstance(row, kind):
        return None
    return f"{own.name} makes a row of {format_of(row)}, of earlier ones {format}"


def explain(error: Exception, kind: type[Row]) -> str:
    """Say in a user's words what msgspec found wrong with a row."""
    if isinstance(error, UnicodeDecodeError):
        return f"not UTF-8: {error.reason} at byte {error.start}"
    if isinstance(error, OwnFormatError):
        return str(error)
    if not isinstance(error, msgspec.ValidationError):
        return f"malformed JSON: {str(error).removeprefix('JSON is malformed: ')}"
    text = str(error)
    if "Invalid enum value" in text and ".role" in text:
        return f"unknown role: {text} (known: {', '.join(get_args(Role))})"
    if "missing required field" in text:
        return f"{text} (this format needs the columns {', '.join(required_columns(kind))})"
    if "unknown field" in text:
        known = ", ".join(field.encode_name for field in msgspec.structs.fields(Message))
        return (
            f"{text}: lorakit would not train on it; rename or remove it (a message has: {known})"
        )
    return f"wrong type: {text}"


def _lines_of(path: Path) -> Iterator[tuple[int, bytes]]:
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            line = line.removeprefix(_BOM) if number == 1 else line
            if line and not line.isspace():
                yield number, line


def _map(path: Path) -> mmap.mmap | bytes:
    with path.open("rb") as file:
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if path.stat().st_size else b""
