"""The order of training: epochs, windows, batches, accumulation windows; a stream that can continue
from any batch.
"""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass, field, replace

import numpy as np

from lorakit.data.batch.collate import collate, idle_batch, take_positions
from lorakit.data.batch.mixture import Mixture
from lorakit.data.batch.packing import plan_batches
from lorakit.data.batch.prefetch import prefetch
from lorakit.data.examples import Examples
from lorakit.data.images import ImageEncoder
from lorakit.types import Batch, Cursor, Datum

Rows = list[list[Datum]]  # of one batch


@dataclass(eq=False)
class BatchStream:
    """All batches of a fit, over all its epochs, in an order that depends on nothing but the
    arguments.

    Rows are shuffled over the whole epoch; packing and length grouping work within windows of
    ``window_rows`` of that order. Each batch knows the weight of its accumulation window (so that
    the loss can be divided by it at once) and the cursor from which a new stream continues.
    Cursors are exact at the end of accumulation windows, where optimiser steps are.

    With several processes each has its own stream: all plan the same windows of ``accumulate *
    world_size`` batches, and each collates its share. Batches of like size are run side by side;
    where the last window is short, idle batches fill it, so that every process makes the same
    number of steps.

    Args:
        accumulate: batches of an accumulation window in each process.
        rank, world_size: which process this is, of how many; where several share each row, which
            group of them.
        sp_rank, sp_size: which of the processes that share each row this is, of how many.
        batch_size, batch_tokens: rows, or positions, of a batch; one of them.
        row_tokens: positions of a packed row; None pads each Datum in a row of its own.
        num_epochs: None never ends.
        are_pairs: each row gives two Datums, which stay together; ``batch_size`` counts pairs.
        shuffle: False keeps the source's order and groups nothing.
    """

    examples: Examples
    mixture: Mixture
    _: KW_ONLY
    pad_token_id: int
    batch_size: int | None
    batch_tokens: int | None = None
    row_tokens: int | None
    accumulate: int = 1
    rank: int = 0
    world_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1
    num_epochs: int | None = 1
    shuffle: bool = True
    seed: int = 0
    window_rows: int = 1024
    cursor: Cursor = field(default_factory=Cursor)
    images: ImageEncoder | None = None
    are_pairs: bool = False
    seconds: float = field(default=0.0, init=False)  # spent on waiting for batches so far

    def __iter__(self) -> Iterator[Batch]:
        groups = prefetch(self._groups())
        while True:
            started = time.perf_counter()
            group = next(groups, None)
            self.seconds += time.perf_counter() - started
            if group is None:
                return
            yield from group

    def _groups(self) -> Iterator[list[Batch]]:
        """Yield this process's batches of one accumulation window after the other."""
        planned = self._planned(self.cursor)
        while window := list(itertools.islice(planned, self.accumulate * self.world_size)):
            weight = sum(self._weight_of(rows) for rows, _ in window)
            last_cursor = window[-1][1]
            if self.world_size > 1:
                window.sort(key=lambda entry: _positions_of(entry[0]))
            mine = [
                replace(
                    collate(rows, self.pad_token_id, self.images, are_pairs=self.are_pairs),
                    cursor=cursor,
                )
                for rows, cursor in window[self.rank :: self.world_size]
            ]
            mine += [idle_batch(self.pad_token_id)] * (self.accumulate - len(mine))
            if self.sp_size > 1:
                mine = [
                    take_positions(batch, self.sp_rank, self.sp_size, self.pad_token_id)
                    for batch in mine
                ]
            mine[-1] = replace(mine[-1], cursor=last_cursor)
            yield [replace(batch, window_weight=weight) for batch in mine]

    def _planned(self, cursor: Cursor) -> Iterator[tuple[Rows, Cursor]]:
        """Yield the rows of each batch of the fit, of all processes, and the cursor after it."""
        for epoch in itertools.count(cursor.epoch):
            if self.num_epochs is not None and epoch >= self.num_epochs:
                return
            resumes = epoch == cursor.epoch
            order = self._order(epoch)
            num_batches = 0
            for start in range(cursor.window_start if resumes else 0, len(order), self.window_rows):
                skip = cursor.batches_done if resumes and start == cursor.window_start else 0
                for number, rows in enumerate(
                    self._window(epoch, order, start)[skip:], start=skip + 1
                ):
                    num_batches += 1
                    yield rows, Cursor(epoch, start, number)
            if not (num_batches or resumes):
                return  # an epoch without a batch would be followed by infinitely many

    def _window(self, epoch: int, order: np.ndarray, start: int) -> list[Rows]:
        datums = [
            d
            for index in order[start : start + self.window_rows]
            for d in self.examples.datums(int(index))
        ]
        rng = random.Random(f"{self.seed} {epoch} {start}") if self.shuffle else None
        return plan_batches(
            datums,
            batch_size=self.batch_size,
            batch_tokens=self.batch_tokens,
            row_tokens=self.row_tokens,
            rng=rng,
            are_pairs=self.are_pairs,
        )

    def _weight_of(self, rows: Rows) -> float:
        """What the loss is divided by: the weight of the targets, or the number of pairs."""
        if self.are_pairs:
            return sum(map(len, rows)) / 2
        return sum(
            float(np.abs(datum.weights).sum(dtype=np.float64)) for row in rows for datum in row
        )

    def _order(self, epoch: int) -> np.ndarray:
        rows = self.mixture.rows(epoch)
        return np.random.default_rng([self.seed, epoch]).permutation(rows) if self.shuffle else rows


def _positions_of(rows: Rows) -> int:
    return len(rows) * max(sum(len(datum) for datum in row) for row in rows)
