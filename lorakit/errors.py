"""What lorakit raises when a user can fix it: what is wrong, where, and what to do."""

from __future__ import annotations

import re
from collections.abc import Iterable


class LorakitError(Exception):
    """Base of all errors that a user can cause; the command line prints it without a traceback and
    exits with 2.

    Where several processes raise it, only the first prints one that ``is_of_all``.
    """

    is_of_all = False


class ConfigError(LorakitError, ValueError):
    """A setting is wrong, misspelt, missing, or contradicts another."""


class DataError(LorakitError, ValueError):
    """Input data cannot be used; the message names file and line.

    Args:
        text: what is wrong.
        where: the row, as ``rows.jsonl:3``; it comes first in the message.
    """

    def __init__(self, text: str = "", where: str = "") -> None:
        super().__init__(text, where)
        self.text, self.where = text, where

    def __str__(self) -> str:
        return f"{self.where}: {self.text}" if self.where else self.text


class AdapterError(LorakitError, ValueError):
    """An adapter does not fit its base, its plan, or itself."""


class CheckpointError(LorakitError, ValueError):
    """A run folder or checkpoint is missing, torn, or belongs to another configuration."""


class TrainingError(LorakitError, RuntimeError):
    """Training cannot continue, for instance because losses are no longer finite."""


MAX_SHOWN = 20


def report(title: str, problems: list[str], total: int | None = None, remedy: str = "") -> str:
    """Return one message with the first 20 of ``problems``, the total, and the remedy."""
    total = len(problems) if total is None else total
    lines = [title, *(f"  {problem}" for problem in problems[:MAX_SHOWN])]
    if total > min(len(problems), MAX_SHOWN):
        lines.append(f"  … and {total - min(len(problems), MAX_SHOWN):,} more")
    if remedy:
        lines.append(remedy)
    return "\n".join(lines)


_PLACE = re.compile(r"(?P<head>.*?)(?P<number>\d+)(?P<tail>]?)", re.DOTALL)
_LEADING_COUNT = re.compile(r"(?P<count>\d[\d,]*)(?P<rest> .*)", re.DOTALL)


def fold(problems: Iterable[tuple[str, str]], separator: str = ": ") -> list[str]:
    """Return a line for each message, with every row that it is about.

    Messages that differ in a leading count alone are equal: "up to 25,002 tokens, but …".

    Args:
        problems: where, as ``rows.jsonl:3``, ``rows.csv: row 3`` or ``data[3]``, and what.
        separator: between the two.
    """
    rows: dict[tuple[str, str, str], list[int]] = {}
    counts: dict[tuple[str, str, str], list[int]] = {}
    for where, text in problems:
        place, count = _PLACE.fullmatch(where), _LEADING_COUNT.fullmatch(text)
        head, number, tail = place.group("head", "number", "tail") if place else (where, "", "")
        key = head, tail, count["rest"] if count else text
        rows.setdefault(key, []).extend([int(number)] if number else [])
        counts.setdefault(key, []).extend([int(count["count"].replace(",", ""))] if count else [])
    lines = []
    for (head, tail, text), numbers in rows.items():
        found = counts[head, tail, text]
        size = f"{'up to ' if len(set(found)) > 1 else ''}{max(found):,}" if found else ""
        lines.append(f"{head}{_spans(numbers)}{tail}{separator}{size}{text}")
    return lines


def _spans(numbers: list[int]) -> str:
    """``numbers`` as "1, 3, 5–9", the first 20 entries of it, and how many more there are."""
    spans: list[list[int]] = []
    for number in numbers:
        if spans and number == spans[-1][-1] + 1:
            spans[-1].append(number)
        else:
            spans.append([number])
    entries = [
        f"{span[0]}–{span[-1]}" if len(span) > 2 else ", ".join(map(str, span))
        for span in spans[:MAX_SHOWN]
    ]
    rest = sum(map(len, spans[MAX_SHOWN:]))
    return ", ".join(entries) + (f" and {rest:,} more" if rest else "")


_NO_MEMORY = (
    "can't allocate memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDA error: out of memory",
    "MPS backend out of memory",
)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device, or the host, has refused memory: by its type, or by its words where a
    library has no type for it.
    """
    is_named = isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError"
    return is_named or (
        isinstance(error, RuntimeError) and any(words in str(error) for words in _NO_MEMORY)
    )
