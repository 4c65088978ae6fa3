"""The order of training: every row once per epoch, and going on from any step exactly as if
nothing had happened.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import write_jsonl

from lorakit.data.batch.mixture import Mixture
from lorakit.data.batch.stream import BatchStream
from lorakit.data.datum import OnLong
from lorakit.data.examples import Examples
from lorakit.data.read.sources import open_source
from lorakit.data.render.renderer import Renderer
from lorakit.types import Batch, Cursor

NUM_ROWS, WINDOW = 23, 7
Make = Callable[..., BatchStream]


@pytest.fixture
def make(tmp_path: Path, tiny: Any) -> Make:
    """Streams over rows whose first token is their number; weights differ, so that sums tell
    windows apart.
    """
    rng = random.Random(0)
    rows = []
    for number in range(NUM_ROWS):
        length = rng.randint(2, 12)
        weights = [0.0, *(rng.choice([0.0, 0.5, 1.0, -0.25]) for _ in range(length - 1)), 1.0]
        rows.append({"tokens": [number] * (length + 1), "weights": weights})
    source = open_source(write_jsonl(tmp_path / "rows.jsonl", rows))

    def make(
        indices: np.ndarray | None = None, max_tokens: int = 64, **options: Any
    ) -> BatchStream:
        examples = Examples(source, Renderer(tiny), max_tokens, OnLong.DROP)
        given = {
            "pad_token_id": 258,
            "batch_size": 2,
            "row_tokens": None,
            "num_epochs": 2,
            "window_rows": WINDOW,
            "seed": 5,
        }
        mixture = Mixture(np.arange(NUM_ROWS) if indices is None else indices, source, seed=5)
        return BatchStream(examples, mixture, **(given | options))

    return make


def rows_in(batches: list[Batch]) -> list[int]:
    return [int(batch.input_ids[row, start]) for batch in batches for row, start, _ in batch.spans]


def facts(batch: Batch) -> tuple[Any, ...]:
    positions = None if batch.position_ids is None else batch.position_ids.tolist()
    tensors = (batch.input_ids.tolist(), batch.targets.tolist(), batch.weights.tolist(), positions)
    return (*tensors, batch.spans, batch.window_weight, batch.cursor)


def of_epoch(batches: list[Batch], epoch: int) -> list[Batch]:
    return [batch for batch in batches if batch.cursor and batch.cursor.epoch == epoch]


WAYS = pytest.mark.parametrize(
    "way",
    [{}, {"row_tokens": 24}, {"shuffle": False}, {"shuffle": False, "row_tokens": 24}],
    ids=str,
)


@WAYS
def test_every_row_comes_once_per_epoch(make: Make, way: dict[str, Any]) -> None:
    batches = list(make(**way))
    for epoch in (0, 1):
        assert sorted(rows_in(of_epoch(batches, epoch))) == list(range(NUM_ROWS))
    assert {batch.cursor.epoch for batch in batches} == {0, 1}


def test_only_the_rows_asked_for_come(make: Make) -> None:
    chosen = np.array([3, 4, 9, 22])
    assert sorted(rows_in(list(make(chosen, num_epochs=1)))) == chosen.tolist()


@pytest.mark.parametrize("row_tokens", [None, 24])
def test_the_same_seed_gives_the_same_order_and_other_seeds_and_epochs_another(
    make: Make, row_tokens: int | None
) -> None:
    batches = list(make(row_tokens=row_tokens))
    assert [facts(batch) for batch in batches] == [
        facts(batch) for batch in make(row_tokens=row_tokens)
    ]
    assert rows_in(of_epoch(batches, 0)) != rows_in(of_epoch(batches, 1))
    assert rows_in(batches) != rows_in(list(make(row_tokens=row_tokens, seed=6)))


def test_shuffling_reaches_over_the_whole_epoch_and_not_only_over_a_window(make: Make) -> None:
    first_window = [batch for batch in make(num_epochs=1) if batch.cursor.window_start == 0]
    assert not set(rows_in(first_window)) <= set(range(WINDOW))


def test_without_shuffling_the_order_of_the_file_stays(make: Make) -> None:
    assert rows_in(list(make(shuffle=False))) == [*range(NUM_ROWS)] * 2


@WAYS
@pytest.mark.parametrize("accumulate", [1, 3])
def test_going_on_from_any_step_gives_exactly_the_remaining_batches(
    make: Make, way: dict[str, Any], accumulate: int
) -> None:
    whole = list(make(accumulate=accumulate, **way))
    assert len({batch.cursor.window_start for batch in whole}) == 4  # windows of 7, 7, 7 and 2 rows
    crossing = False
    for done in range(accumulate, len(whole) + 1, accumulate):
        cursor = Cursor(**whole[done - 1].cursor.to_dict())
        rest = list(make(accumulate=accumulate, cursor=cursor, **way))
        assert [facts(batch) for batch in rest] == [facts(batch) for batch in whole[done:]], cursor
        group = {(b.cursor.epoch, b.cursor.window_start) for b in whole[done - accumulate : done]}
        crossing |= len(group) > 1
    assert crossing or accumulate == 1, "no step of this test reached over a window's end"


def test_the_cursor_of_the_last_batch_of_an_epoch_leads_into_the_next(make: Make) -> None:
    whole = list(make())
    first = of_epoch(whole, 0)
    rest = list(make(cursor=first[-1].cursor))
    assert [facts(batch) for batch in rest] == [facts(batch) for batch in whole[len(first) :]]
    assert list(make(cursor=whole[-1].cursor)) == []


@WAYS
@pytest.mark.parametrize("accumulate", [1, 3, 1_000])
def test_every_batch_carries_the_weight_of_its_whole_accumulation_window(
    make: Make, way: dict[str, Any], accumulate: int
) -> None:
    batches = list(make(accumulate=accumulate, **way))
    for start in range(0, len(batches), accumulate):
        group = batches[start : start + accumulate]
        expected = sum(float(np.abs(batch.weights.numpy()).sum()) for batch in group)
        assert expected > 0
        assert [batch.window_weight for batch in group] == pytest.approx(
            [expected] * len(group), rel=1e-6
        )


def test_dropped_rows_leave_windows_resumable_and_are_the_only_ones_missing(make: Make) -> None:
    whole = list(make(max_tokens=6, num_epochs=2))
    lengths = {row: len(make().examples.datums(row)[0]) + 1 for row in range(NUM_ROWS)}
    kept = sorted(row for row, length in lengths.items() if length <= 6)
    assert 0 < len(kept) < NUM_ROWS
    assert sorted(rows_in(of_epoch(whole, 1))) == kept
    for done in range(1, len(whole)):
        rest = list(make(max_tokens=6, cursor=whole[done - 1].cursor))
        assert [facts(batch) for batch in rest] == [facts(batch) for batch in whole[done:]]


def test_a_stream_without_end_goes_on_and_one_without_a_row_ends(make: Make) -> None:
    endless = list(itertools.islice(make(num_epochs=None), 100))
    assert max(batch.cursor.epoch for batch in endless) > 5
    assert list(make(max_tokens=1, num_epochs=None)) == []


def test_a_stream_can_be_walked_twice(make: Make) -> None:
    stream = make(accumulate=3)
    assert [facts(batch) for batch in stream] == [facts(batch) for batch in stream]


def test_no_packed_row_is_longer_than_asked(make: Make) -> None:
    batches = list(make(row_tokens=24))
    assert max(batch.input_ids.shape[1] for batch in batches) <= 24
    assert any(batch.position_ids is not None for batch in batches)


@pytest.mark.parametrize("row_tokens", [None, 24])
def test_processes_that_share_rows_have_the_same_windows_cursors_and_weights(
    make: Make, row_tokens: int | None
) -> None:
    options = {"row_tokens": row_tokens, "accumulate": 2, "num_epochs": 1}
    for rank in (0, 1):
        whole = list(make(rank=rank, world_size=2, **options))
        pieces = [
            list(make(rank=rank, world_size=2, sp_rank=sp_rank, sp_size=2, **options))
            for sp_rank in (0, 1)
        ]
        for batch, *cut in zip(whole, *pieces, strict=True):
            assert {piece.window_weight for piece in cut} == {batch.window_weight}
            assert all(piece.cursor == batch.cursor and piece.spans == batch.spans for piece in cut)
            assert sum(piece.weight for piece in cut) == batch.weight
