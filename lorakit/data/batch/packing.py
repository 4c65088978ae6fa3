"""Which Datums share a row, and which rows share a batch."""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Sequence

from lorakit.types import Datum


def pack_best_fit(datums: Sequence[Datum], row_tokens: int) -> list[list[Datum]]:
    """Distribute ``datums`` over rows of at most ``row_tokens`` positions by best-fit decreasing.

    The longest is placed first, each into the fullest row that still has room. A Datum that is
    longer than a row has its own.
    """
    return [
        [datums[index] for index in row]
        for row in assign_rows([len(datum) for datum in datums], row_tokens)
    ]


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
    datums: Sequence[Datum],
    *,
    batch_size: int | None,
    batch_tokens: int | None = None,
    row_tokens: int | None,
    rng: random.Random | None,
    are_pairs: bool = False,
) -> list[list[list[Datum]]]:
    """Return batches of rows of Datums over all of ``datums``; see ``assign_batches``.

    Where each two of ``datums`` are a pair, they stay side by side: in one row of a pack, or in two
    rows of a batch that count as one.
    """
    size = 2 if are_pairs else 1
    units = [datums[i : i + size] for i in range(0, len(datums), size)]
    if row_tokens is None and batch_tokens is not None:
        batch_tokens //= size
    lengths = [max(map(len, unit)) if row_tokens is None else sum(map(len, unit)) for unit in units]
    plan = assign_batches(
        lengths, batch_size=batch_size, batch_tokens=batch_tokens, row_tokens=row_tokens, rng=rng
    )
    if row_tokens is None:
        return [
            [[datum] for row in batch for index in row for datum in units[index]] for batch in plan
        ]
    return [[[datum for index in row for datum in units[index]] for row in batch] for batch in plan]


def assign_batches(
    lengths: Sequence[int],
    *,
    batch_size: int | None,
    batch_tokens: int | None,
    row_tokens: int | None,
    rng: random.Random | None,
) -> list[list[list[int]]]:
    """Return which of ``lengths`` share a row, and which rows share a batch, by their indices.

    Args:
        batch_size: rows of a batch; or else
        batch_tokens: positions of a batch, padding included. A row that is longer has a batch of
            its own.
        row_tokens: positions of a packed row at most; without it, each row holds one example, and
            rows of similar length go together.
        rng: shuffles the batches; None keeps the order and groups nothing, for evaluation.
    """
    if row_tokens is not None:
        rows = assign_rows(lengths, row_tokens)
        if rng:
            rng.shuffle(rows)
    else:
        indices = range(len(lengths))
        rows = [[index] for index in (sorted(indices, key=lengths.__getitem__) if rng else indices)]
    batches: list[list[list[int]]] = []
    longest = 0
    for row in rows:
        length = sum(lengths[index] for index in row)
        longest = max(longest, length)
        is_full = not batches or (
            len(batches[-1]) >= batch_size
            if batch_size
            else longest * (len(batches[-1]) + 1) > (batch_tokens or 0)
        )
        if is_full:
            batches.append([])
            longest = length
        batches[-1].append(row)
    if rng:
        rng.shuffle(batches)
    return batches


def fill_with_longest(
    datums: Sequence[Datum], *, batch_tokens: int, row_tokens: int | None, are_pairs: bool = False
) -> list[list[Datum]]:
    """Return the rows of a batch as full as any, of copies of the longest of ``datums``, or of the
    pair that they are.

    Args:
        batch_tokens: positions of the batch, padding included.
        row_tokens: of a packed row; without, each row holds one.
    """
    if not datums:
        return []
    unit = list(datums[:2]) if are_pairs else [max(datums, key=len)]
    if row_tokens is not None:
        copies = max(1, row_tokens // sum(map(len, unit)))
        return [unit * copies] * max(1, batch_tokens // row_tokens)
    count = max(1, batch_tokens // (max(map(len, unit)) * len(unit)))
    return [[datum] for _ in range(count) for datum in unit]
