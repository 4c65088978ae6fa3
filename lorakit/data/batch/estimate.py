"""What the batches of training will be, estimated from the rows that were looked at before it."""

from __future__ import annotations

import math
import random
from dataclasses import dataclass

import numpy as np

from lorakit.data.batch.mixture import Mixture
from lorakit.data.batch.packing import assign_batches
from lorakit.data.examples import DatasetReport


@dataclass(frozen=True)
class BatchEstimate:
    """Number and filling of a stream's batches; the settings are those of ``BatchStream``."""

    report: DatasetReport
    mixture: Mixture
    batch_size: int | None
    batch_tokens: int | None
    row_tokens: int | None
    window_rows: int
    shuffle: bool
    seed: int
    are_pairs: bool

    def num_batches(self, num_epochs: int) -> int:
        """Micro-batches of all epochs. Exact where nothing is packed, ``batch_size`` is set and
        each row gives one example.
        """
        lengths, num_units = self._sample()
        units_per_row = num_units / self.mixture.num_rows
        if self.row_tokens or self.batch_size is None:
            plan = self._plan(lengths, batch_size=None if self.batch_size is None else 1)
            batches_per_unit = len(plan) / len(lengths) / (self.batch_size or 1)
            return max(1, round(num_units * batches_per_unit * num_epochs))
        windows, rest = divmod(num_units, self.window_rows * units_per_row)
        per_window = math.ceil(self.window_rows * units_per_row / self.batch_size)
        return max(
            1,
            round(
                (windows * per_window + math.ceil(round(rest, 6) / self.batch_size)) * num_epochs
            ),
        )

    def padding_share(self) -> float:
        """Share of the batches' positions that hold only padding."""
        lengths, _ = self._sample()
        together = self._together(lengths)
        plan = self._plan(lengths, batch_size=self.batch_size)
        rows_each = 1 if self.row_tokens else lengths.shape[1]
        positions = sum(
            rows_each * len(rows) * max(together[row].sum() for row in rows) for rows in plan
        )
        return 1 - float(lengths.sum()) / float(positions)

    def _sample(self) -> tuple[np.ndarray, float]:
        """Return the positions of a window's worth of what stays together, (units, 1), or of pairs
        (units, 2), as training draws them, and how many there are in an epoch.
        """
        report, size = self.report, 2 if self.are_pairs else 1
        lengths, origins = (report.lengths - 1).reshape(-1, size), report.origins[::size]
        rng = np.random.default_rng(self.seed)
        if not report.shares:
            ordered = rng.permutation(lengths) if self.shuffle else lengths
            return ordered[
                : self.window_rows
            ], self.mixture.num_rows * report.examples_per_row / size
        found = np.bincount(origins, minlength=len(report.shares))  # units of each source
        looked = np.array([max(share.num_rows_profiled, 1) for share in report.shares.values()])
        in_epoch = found / looked * np.array(self.mixture.counts)
        wanted = np.rint(in_epoch / in_epoch.sum() * min(self.window_rows, len(lengths))).astype(
            int
        )
        chosen = [
            rng.choice(np.flatnonzero(origins == number), size=count)
            for number, count in enumerate(wanted)
            if count
        ]
        return lengths[np.concatenate(chosen)], float(in_epoch.sum())

    def _plan(self, lengths: np.ndarray, *, batch_size: int | None) -> list[list[list[int]]]:
        """Which units of ``lengths`` share a row, and which rows a batch, as in the stream."""
        tokens = self.batch_tokens and self.batch_tokens // (
            1 if self.row_tokens else lengths.shape[1]
        )
        return assign_batches(
            self._together(lengths).tolist(),
            batch_size=batch_size,
            batch_tokens=tokens,
            row_tokens=self.row_tokens,
            rng=random.Random(0),
        )

    def _together(self, lengths: np.ndarray) -> np.ndarray:
        """Positions that a unit takes of a row: of a pair both answers, or, in rows of their
        own, the longer one.
        """
        return lengths.sum(1) if self.row_tokens else lengths.max(1)
