"""Rows of Datums to tensors, and every Datum found again in them."""

from __future__ import annotations

import random

import torch
from hypothesis import given
from hypothesis import strategies as st

from lorakit.data.batch.collate import collate, idle_batch, take_positions
from lorakit.data.datum import make_datum
from lorakit.types import Datum, ModelInput


def test_a_packed_batch_by_hand() -> None:
    a, b, c = (
        make_datum([1, 2, 3], [0, 0.5, 1]),
        make_datum([4, 5], [0, -1]),
        make_datum([6, 7], [0, 2]),
    )
    batch = collate([[a, b], [c]], pad_token_id=9)
    assert batch.input_ids.tolist() == [[1, 2, 4], [6, 9, 9]]
    assert batch.targets.tolist() == [[2, 3, 5], [7, 9, 9]]
    assert batch.weights.tolist() == [[0.5, 1, -1], [2, 0, 0]]
    assert batch.position_ids is not None and batch.position_ids.tolist() == [[0, 1, 0], [0, 0, 1]]
    assert batch.spans == ((0, 0, 2), (0, 2, 3), (1, 0, 1))
    assert (batch.num_tokens, batch.num_trained_tokens, batch.weight) == (4, 4, 4.5)
    assert abs(batch.padding_share - 2 / 6) < 1e-12
    assert (batch.input_ids.dtype, batch.targets.dtype, batch.weights.dtype) == (
        torch.int64,
        torch.int64,
        torch.float32,
    )


def test_parts_of_rows_by_hand() -> None:
    a, b, c = (
        make_datum([1, 2, 3], [0, 0.5, 1]),
        make_datum([4, 5], [0, -1]),
        make_datum([6, 7], [0, 2]),
    )
    first, second = (
        take_positions(collate([[a, b], [c]], pad_token_id=9), part, 2, 9) for part in (0, 1)
    )
    assert (first.input_ids.tolist(), second.input_ids.tolist()) == (
        [[1, 2], [6, 9]],
        [[4, 9], [9, 9]],
    )
    assert (first.weights.tolist(), second.weights.tolist()) == (
        [[0.5, 1], [2, 0]],
        [[-1, 0], [0, 0]],
    )
    assert first.position_ids is not None and first.position_ids.tolist() == [[0, 1], [0, 0]]
    assert (first.position_range, second.position_range) == ((0, 2), (2, 4))
    # of whole rows: attention sees them
    assert first.spans == second.spans == ((0, 0, 2), (0, 2, 3), (1, 0, 1))
    assert (first.spans_here, second.spans_here) == ([(0, 0, 2), (1, 0, 1)], [(0, 0, 1)])
    assert (first.num_tokens, second.num_tokens) == (3, 1) and (first.weight, second.weight) == (
        3.5,
        1.0,
    )


def test_parts_of_a_row_have_its_positions_and_an_idle_batch_has_one_position_in_each() -> None:
    parts = [
        take_positions(collate([[make_datum([1, 2, 3, 4, 5, 6], [1] * 6)]], 0), part, 4, 0)
        for part in range(4)
    ]
    assert [part.position_ids.tolist() for part in parts if part.position_ids is not None] == [
        [[0, 1]],
        [[2, 3]],
        [[4, 0]],
        [[0, 0]],
    ]
    assert [part.num_tokens for part in parts] == [2, 2, 1, 0]
    idle = take_positions(idle_batch(7), 1, 2, 7)
    assert idle.input_ids.tolist() == [[7]] and idle.weight == idle.num_tokens == 0


@given(
    st.lists(st.lists(st.integers(2, 9), min_size=1, max_size=3), min_size=1, max_size=3),
    st.integers(2, 5),
)
def test_all_parts_together_are_the_batch(lengths: list[list[int]], parts: int) -> None:
    rows = [
        [make_datum(range(3, 3 + length), [0, *[0.5] * (length - 1)]) for length in row]
        for row in lengths
    ]
    whole = collate(rows, 0)
    cut = [take_positions(whole, part, parts, 0) for part in range(parts)]
    width = whole.input_ids.shape[1]
    for name in ("input_ids", "targets", "weights"):
        assert torch.equal(
            torch.cat([getattr(part, name) for part in cut], dim=1)[:, :width], getattr(whole, name)
        )
    assert sum(part.num_tokens for part in cut) == whole.num_tokens
    assert sum(part.num_trained_tokens for part in cut) == whole.num_trained_tokens
    assert sum(part.weight for part in cut) == whole.weight
    assert len({part.input_ids.shape for part in cut}) == 1


def test_rows_of_one_document_need_no_positions() -> None:
    batch = collate(
        [[make_datum([1, 2, 3], [0, 0, 1])], [make_datum([4, 5], [0, 1])]], pad_token_id=0
    )
    assert batch.position_ids is None
    assert batch.spans == ((0, 0, 2), (1, 0, 1))


def test_further_loss_inputs_travel_along_padded_with_0() -> None:
    def datum(advantages: list[float]) -> Datum:
        tokens = list(range(len(advantages)))
        inputs = {"target_tokens": tokens, "weights": [1.0] * len(tokens), "advantages": advantages}
        return Datum(ModelInput.from_ints(tokens), inputs)

    batch = collate([[datum([0.5, 1.5]), datum([-2])], [datum([3])]], pad_token_id=0)
    assert batch.extras["advantages"].tolist() == [[0.5, 1.5, -2], [3, 0, 0]]


@st.composite
def rows_of_datums(draw: st.DrawFn) -> list[list[Datum]]:
    shape = draw(
        st.lists(st.lists(st.integers(2, 8), min_size=1, max_size=4), min_size=1, max_size=4)
    )
    rng = random.Random(draw(st.integers(0, 99)))

    def make(n: int) -> Datum:
        return make_datum(rng.choices(range(50), k=n), rng.choices([0.0, 1.0, -0.25], k=n))

    return [[make(length) for length in row] for row in shape]


@given(rows_of_datums(), st.integers(0, 49))
def test_every_datum_is_found_again_and_the_rest_is_padding_without_weight(
    rows: list[list[Datum]], pad: int
) -> None:
    batch = collate(rows, pad)
    datums = [datum for row in rows for datum in row]
    assert len(batch.spans) == len(datums)
    is_padding = torch.ones_like(batch.input_ids, dtype=torch.bool)
    for datum, (row, start, end) in zip(datums, batch.spans, strict=True):
        assert any(datum is other for other in rows[row])
        assert batch.input_ids[row, start:end].tolist() == datum.model_input.to_ints()
        assert batch.targets[row, start:end].tolist() == datum.targets.tolist()
        assert batch.weights[row, start:end].tolist() == datum.weights.tolist()
        if batch.position_ids is not None:
            assert batch.position_ids[row, start:end].tolist() == list(range(end - start))
            assert end == batch.input_ids.shape[1] or batch.position_ids[row, end] == 0
        assert is_padding[row, start:end].all(), "two documents overlap"
        is_padding[row, start:end] = False
    assert not batch.weights[is_padding].any()
    assert batch.input_ids[is_padding].eq(pad).all()
    for row in range(len(rows)):  # on the right, in one piece
        assert is_padding[row].tolist() == sorted(is_padding[row].tolist())
    assert (batch.position_ids is None) == all(len(row) == 1 for row in rows)
    assert batch.num_tokens == sum(map(len, datums))
    assert batch.input_ids.shape[1] == max(sum(map(len, row)) for row in rows)
