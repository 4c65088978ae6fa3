"""Which Datums share a row: nothing lost, nothing over, and tightly enough."""

from __future__ import annotations

import itertools
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batch.packing import pack_best_fit, plan_batches
from lorakit.types import Datum, ModelInput


def datums_of(lengths: list[int]) -> list[Datum]:
    """One Datum per length; none equals another."""
    return [
        Datum(
            ModelInput.from_ints([number] * length),
            {"target_tokens": [number] * length, "weights": [1.0] * length},
        )
        for number, length in enumerate(lengths)
    ]


def identities(datums: list[Datum]) -> list[int]:
    return sorted(map(id, datums))


LENGTHS = st.lists(st.integers(1, 25), max_size=60)


@given(LENGTHS, st.integers(1, 20))
def test_every_datum_is_in_one_row_and_no_row_is_over_full(
    lengths: list[int], row_tokens: int
) -> None:
    datums = datums_of(lengths)
    rows = pack_best_fit(datums, row_tokens)
    assert identities([datum for row in rows for datum in row]) == identities(datums)
    for row in rows:
        assert row and (sum(map(len, row)) <= row_tokens or len(row) == 1)


@given(LENGTHS, st.integers(25, 60))
def test_no_two_rows_could_be_one(lengths: list[int], row_tokens: int) -> None:
    loads = sorted(sum(map(len, row)) for row in pack_best_fit(datums_of(lengths), row_tokens))
    assert all(a + b > row_tokens for a, b in itertools.pairwise(loads))
    assert len(loads) <= 2 * sum(lengths) / row_tokens + 1


def next_fit(lengths: list[int], row_tokens: int) -> int:
    num_rows, room = 0, 0
    for length in lengths:
        if length > room:
            num_rows, room = num_rows + 1, row_tokens
        room -= length
    return num_rows


def test_packing_beats_next_fit_on_every_random_document_mix() -> None:
    rng = random.Random(0)
    for _ in range(20):
        lengths = [min(128, int(rng.lognormvariate(3, 1)) + 1) for _ in range(300)]
        packed = len(pack_best_fit(datums_of(lengths), 128))
        assert packed <= next_fit(lengths, 128)
        assert packed <= sum(lengths) / 128 * 1.1 + 1


@pytest.mark.parametrize(
    ("lengths", "expected"),
    [
        ([5, 5, 5, 5], [[5, 5], [5, 5]]),
        ([2, 9, 1, 8], [[9, 1], [8, 2]]),
        ([10, 10], [[10], [10]]),
        ([12, 1], [[12], [1]]),
        ([3, 6, 7, 4], [[7, 3], [6, 4]]),
        ([], []),
    ],
)
def test_rows_of_ten_by_hand(lengths: list[int], expected: list[list[int]]) -> None:
    assert [[len(d) for d in row] for row in pack_best_fit(datums_of(lengths), 10)] == expected


@given(LENGTHS, st.integers(1, 7), st.none() | st.integers(25, 50), st.none() | st.integers(0, 5))
def test_a_plan_holds_every_datum_once_in_batches_of_the_size(
    lengths: list[int], batch_size: int, row_tokens: int | None, seed: int | None
) -> None:
    datums = datums_of(lengths)
    rng = None if seed is None else random.Random(seed)
    plan = plan_batches(datums, batch_size=batch_size, row_tokens=row_tokens, rng=rng)
    assert identities([d for batch in plan for row in batch for d in row]) == identities(datums)
    assert sum(len(batch) < batch_size for batch in plan) <= 1
    assert all(0 < len(batch) <= batch_size for batch in plan)
    if row_tokens is None:
        assert all(len(row) == 1 for batch in plan for row in batch)


def test_without_a_random_generator_the_order_stays() -> None:
    datums = datums_of([3, 1, 2, 5, 4])
    plan = plan_batches(datums, batch_size=2, row_tokens=None, rng=None)
    assert [row[0] for batch in plan for row in batch] == datums


def test_like_lengths_go_together_and_batches_come_in_random_order() -> None:
    datums = datums_of(random.Random(3).sample(range(1, 201), 200))
    plan = plan_batches(datums, batch_size=10, row_tokens=None, rng=random.Random(0))
    spreads = [
        max(len(row[0]) for row in batch) - min(len(row[0]) for row in batch) for batch in plan
    ]
    assert spreads == [9] * 20
    longest = [max(len(row[0]) for row in batch) for batch in plan]
    assert longest != sorted(longest) and longest != sorted(longest, reverse=True)


@given(
    LENGTHS, st.integers(50, 120), st.none() | st.integers(25, 50), st.none() | st.integers(0, 5)
)
def test_a_batch_of_tokens_is_as_full_as_its_rows_allow(
    lengths: list[int], batch_tokens: int, row_tokens: int | None, seed: int | None
) -> None:
    datums = datums_of(lengths)
    rng = None if seed is None else random.Random(seed)
    plan = plan_batches(
        datums, batch_size=None, batch_tokens=batch_tokens, row_tokens=row_tokens, rng=rng
    )
    assert identities([d for batch in plan for row in batch for d in row]) == identities(datums)
    positions = [len(batch) * max(sum(map(len, row)) for row in batch) for batch in plan]
    assert all(
        count <= batch_tokens or len(batch) == 1
        for count, batch in zip(positions, plan, strict=True)
    )


def test_batches_of_tokens_by_hand() -> None:
    plan = plan_batches(
        datums_of([4, 1, 6, 2, 3]), batch_size=None, batch_tokens=8, row_tokens=None, rng=None
    )
    assert [[len(row[0]) for row in batch] for batch in plan] == [[4, 1], [6], [2, 3]]
    plan = plan_batches(
        datums_of([4, 4, 4, 4, 4, 4]), batch_size=None, batch_tokens=20, row_tokens=8, rng=None
    )
    assert [[[len(d) for d in row] for row in batch] for batch in plan] == [
        [[4, 4], [4, 4]],
        [[4, 4]],
    ]
