"""Rows of a format of the user's own: a function makes a row that lorakit knows of each record."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import msgspec

from lorakit.data.read.columns import recognise
from lorakit.data.read.rows import FORMATS, Row
from lorakit.errors import ConfigError
from lorakit.user_code import import_by_name

# a name in FORMATS, or a function; None: by the columns
Format = str | Callable[[dict[str, Any]], Any] | None


class OwnFormatError(msgspec.ValidationError):
    """What a user's function made cannot be used; the message says it all."""


class OwnFormat:
    """Calls ``function`` on each record: a dict in, a row (a dict with the columns of a known
    format) out, or None to leave it out.
    """

    def __init__(self, function: Callable[[dict[str, Any]], Any]) -> None:
        self.function, self.name = function, name_of_format(function)

    def convert(self, record: Any) -> Row | None:
        """Return the row of ``record``. Raises OwnFormatError, or msgspec's own error where a
        column has another type.
        """
        try:
            found = self.function(record)
        except Exception as error:  # whatever a user's code raises belongs to this row
            raise OwnFormatError(f"{self.name} raises {type(error).__name__}: {error}") from error
        if found is None:
            return None
        if isinstance(found, Row):
            return found
        if not isinstance(found, dict):
            raise OwnFormatError(
                f"{self.name} returns {type(found).__name__}, which is no row: return a dict"
            )
        if (format := recognise(found)) is None:
            raise OwnFormatError(
                f"{self.name} returns the columns {', '.join(map(str, found))}, which are of no"
                " known format"
            )
        return msgspec.convert(found, FORMATS[format])


def format_of(row: Row) -> str:
    """The name of a row's format."""
    return next(name for name, kind in FORMATS.items() if isinstance(row, kind))


def name_of_format(format: Format) -> str | None:
    """How a format is called, for messages and fingerprints."""
    if format is None or isinstance(format, str):
        return format
    named = format if hasattr(format, "__qualname__") else type(format)
    return f"{named.__module__}.{named.__qualname__}"


def find_format(format: Format) -> str | OwnFormat | None:
    """A name of ours, or a function, given itself or by its dotted name. Raises ConfigError."""
    if format is None or (isinstance(format, str) and format in FORMATS):
        return format
    if callable(format):
        return OwnFormat(format)
    if "." not in format:
        raise ConfigError(
            f"data.format={format} is unknown; choose one of {', '.join(FORMATS)}, or name a"
            " function of yours (package.module.name)"
        )
    try:
        found = import_by_name(format)
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"data.format={format} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(f"data.format={format} is no function")
    return OwnFormat(found)
