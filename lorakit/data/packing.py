"""Which Datums share a row, and which rows share a batch."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from lorakit.types import Datum


def pack_best_fit(datums: Sequence[Datum], row_tokens: int) -> list[list[Datum]]:
    """Distribute ``datums`` over rows of at most ``row_tokens`` positions by best-fit decreasing.

    The longest is placed first, each into the fullest row that still has room. A Datum that is longer than a row has its own.
    """
    return [[datums[index] for index in row] for row in assign_rows([len(datum) for datum in datums], row_tokens)]


def assign_rows(lengths: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Return which of ``lengths`` share a row, by their indices."""
    rows: list[list[int]] = []
    rooms: list[tuple[int, int]] = []  # (free positions, row number), ascending
    for index in sorted(range(len(lengths)), key=lambda index: -lengths[index]):
        length = lengths[index]
        place = bisect_left(rooms, (length, -1))
        if place < len(rooms):
            room, number = rooms.pop(place)
            rows[number].append(index)
        else:
            room, number = max(row_tokens, length), len(rows)
            rows.append([index])
        insort(rooms, (room - length, number))
    return rows


def plan_batches(
    datums: Sequence[Datum], *, batch_size: int, row_tokens: int | None, rng: random.Random | None
) -> list[list[list[Datum]]]:
    """Return batches of rows of Datums over all of ``datums``.

    With ``row_tokens`` rows are packed; without, each row holds one Datum and rows of like length go together. ``rng``
    shuffles the batches; None keeps the Datums in order and groups nothing, for evaluation.
    """
    if row_tokens is not None:
        rows = pack_best_fit(datums, row_tokens)
        if rng:
            rng.shuffle(rows)
    else:
        rows = [[datum] for datum in (sorted(datums, key=len) if rng else datums)]
    batches = [rows[start : start + batch_size] for start in range(0, len(rows), batch_size)]
    if rng:
        rng.shuffle(batches)
    return batches
