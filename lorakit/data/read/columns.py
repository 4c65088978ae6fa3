"""What the columns of a file mean: their format, and our columns under other names."""

from __future__ import annotations

import contextlib
import difflib
import functools
from collections.abc import Iterable, Mapping, Sequence
from typing import cast

import msgspec

from lorakit.data.read.rows import FORMATS, Row
from lorakit.errors import ConfigError
from lorakit.quoting import quote_for_hydra, quote_for_shell

Columns = tuple[tuple[str, str], ...]  # (our name, the file's name) of columns
# What others call the columns, for a hint on files that are not recognised.
SYNONYMS: dict[str, tuple[str, ...]] = {
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": (
        "question",
        "query",
        "instruction",
        "input",
        "problem",
        "source",
        "request",
        "context",
        "src",
        "user",
    ),
    "completion": (
        "answer",
        "response",
        "output",
        "target",
        "solution",
        "reply",
        "summary",
        "label",
        "tgt",
        "assistant",
    ),
    "text": ("content", "body", "document", "passage", "article"),
}


@functools.cache
def row_type(format: str, columns: Columns = ()) -> type[Row]:
    """The type of rows of ``format``, whose columns have other names where ``columns`` says so,
    as (ours, theirs).
    """
    kind, theirs = FORMATS[format], dict(columns)
    taken = set(theirs.values())  # a field of that name has another one's column, or none
    renamed = []  # all fields: msgspec's own `rename` does not reach inherited ones
    for field in msgspec.structs.fields(kind):
        ours = field.encode_name
        is_lost = ours in taken and ours not in theirs
        if is_lost and field.required:
            raise ConfigError(
                f"data.columns gives `{ours}` another meaning, and rows of {format} need it"
            )
        name = f"({ours}: given away)" if is_lost else theirs.get(ours, ours)
        options = {} if field.required else {"default": field.default}
        renamed.append((field.name, field.type, msgspec.field(name=name, **options)))
    if theirs.keys().isdisjoint(columns_of(kind)):
        return kind
    return cast(type[Row], msgspec.defstruct(kind.__name__, renamed, bases=(kind,)))


def all_columns() -> list[str]:
    """The names of the columns of all formats."""
    return list(dict.fromkeys(name for kind in FORMATS.values() for name in columns_of(kind)))


def columns_of(kind: type[Row]) -> list[str]:
    """The columns that rows of this type may have."""
    return [field.encode_name for field in msgspec.structs.fields(kind)]


def required_columns(kind: type[Row]) -> list[str]:
    """The columns without which rows of this type cannot be read."""
    return [field.encode_name for field in msgspec.structs.fields(kind) if field.required]


def unused_columns(columns: Iterable[str], kind: type[Row]) -> list[str]:
    """The ``columns`` that rows of this type do not have: nothing of them is trained on."""
    return [column for column in dict.fromkeys(columns) if column not in columns_of(kind)]


def explain_unused(column: str, format: str) -> str | None:
    """Why an unused column is likely a mistake, or None: it is nearly a column of this format,
    or means something in another.
    """
    kind = FORMATS[format]
    optional = [name for name in columns_of(kind) if name not in required_columns(kind)]
    if near := difflib.get_close_matches(column, optional, n=1, cutoff=0.7):
        return f"did you mean `{near[0]}`?"
    for name, other in FORMATS.items():
        if column in columns_of(other):
            return f"it belongs to the format {name}"
    if column in ("weight", "loss_weight"):
        return "weights are given per message or per token"
    return None


def recognise(present: Iterable[str], columns: Columns = ()) -> str | None:
    """Return the name of the format that the columns ``present`` belong to, or None; ``columns``
    as in ``row_type``.
    """
    there = set(present)
    for name in FORMATS:
        with contextlib.suppress(ConfigError):  # of a format that lacks what `columns` takes away
            if there.issuperset(required_columns(row_type(name, columns))):
                return name
    return None


def find_column_problem(columns: Columns, format: str, present: Iterable[str]) -> str | None:
    """Why ``columns`` would do nothing for rows of ``format`` with ``present``, or None."""
    ours, there = columns_of(FORMATS[format]), list(present)
    if strange := [name for name, _ in columns if name not in ours]:
        return (
            f"data.columns names {', '.join(strange)}, which rows of {format} do not have; set"
            " data.format where they are another's"
        )
    lost = [(name, theirs) for name, theirs in columns if theirs not in there]
    if not lost:
        return None
    name, theirs = lost[0]
    near = difflib.get_close_matches(theirs, there, n=1)
    hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(there)}"
    return f"data.columns says that {name} is called {theirs}, and no such column is there; {hint}"


def guess_columns(present: Sequence[str]) -> dict[str, str]:
    """Which of the columns ``present``, of no known format, are likely meant by ours."""
    lower = {name.casefold(): name for name in reversed(present)}
    found = {
        ours: next((lower[name] for name in (ours, *names) if name in lower), None)
        for ours, names in SYNONYMS.items()
    }
    for wanted in (("messages",), ("prompt", "completion"), ("text",)):
        if all(found[ours] for ours in wanted):
            return {ours: str(found[ours]) for ours in wanted}
    if len(present) == 1:
        return {"text": present[0]}
    prompt = found["prompt"] or next(name for name in present if name != found["completion"])
    return {
        "prompt": prompt,
        "completion": found["completion"] or next(name for name in present if name != prompt),
    }


def check_columns(columns: Mapping[str, str]) -> Columns:
    """``columns`` as pairs. Raises ConfigError for a name that no format of ours has, and one
    that stands for two.
    """
    known = all_columns()
    for ours in columns:
        if ours not in known:
            near = difflib.get_close_matches(ours, known, n=1)
            hint = f"did you mean {near[0]}?" if near else f"ours are {', '.join(known)}"
            raise ConfigError(
                f"data.columns says what the data calls our columns, as ours: theirs; {ours} is"
                f" none of ours; {hint}"
            )
    theirs = list(columns.values())
    if twice := sorted({name for name in theirs if theirs.count(name) > 1}):
        raise ConfigError(f"data.columns gives {', '.join(twice)} two meanings")
    return tuple(columns.items())


def unrecognised(where: str, present: Sequence[str], columns: Columns) -> str:
    """The message for a file whose columns, ``present``, match no format under the names that
    ``columns`` gives them.
    """
    known = "\n".join(
        f"  {name}: {', '.join(required_columns(kind))}" for name, kind in FORMATS.items()
    )
    lost = [f"{theirs} (for {ours})" for ours, theirs in columns if theirs not in present]
    absent = f" data.columns names {', '.join(lost)}, which is not there." if lost else ""
    guessed = []
    for ours, theirs in guess_columns(present).items() if present else ():
        is_plain = theirs.isascii() and theirs.isidentifier()
        name = theirs if is_plain else quote_for_hydra(theirs, mark='"')
        guessed.append(f"{ours}: {name}")
    typed = quote_for_shell(f"data.columns={{{', '.join(guessed)}}}")
    hint = f"\nOr say what its columns mean, for instance:\n  {typed}" if guessed else ""
    found = f"columns not recognised (found: {', '.join(present)})"
    return (
        f"{where}: {found}.{absent} A row needs the columns of one of these formats:\n{known}{hint}"
    )
