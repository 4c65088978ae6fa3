"""Which rows an epoch has, where several sources are seen more or less often than once."""

from __future__ import annotations

import numpy as np

from lorakit.data.sources import Source


class Mixture:
    """The rows of each epoch: of a source of weight ``w`` every row ``floor(w)`` times, and a share of them once more.

    That share moves on from epoch to epoch, so that of a source of weight 0.5 two epochs have every row once.
    """

    def __init__(self, indices: np.ndarray, source: Source, *, seed: int) -> None:
        self.indices = indices
        self._groups: list[tuple[np.ndarray, int, int]] = []  # rows, how often all of them, and how many of them once more
        origins = source.origins_of(indices)
        for number, weight in enumerate(source.weights):
            rows = indices[origins == number]
            mixed = np.random.default_rng([seed, number]).permutation(rows)
            self._groups.append((mixed, int(weight), round((weight - int(weight)) * len(rows))))

    @property
    def num_rows(self) -> int:
        """Rows of an epoch."""
        return sum(len(rows) * times + more for rows, times, more in self._groups) if self._groups else len(self.indices)

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of ``epoch``, in the order of the sources."""
        if not self._groups:
            return self.indices
        drawn = [np.tile(rows, times) for rows, times, _ in self._groups]
        drawn += [rows[np.arange(epoch * more, (epoch + 1) * more) % len(rows)] for rows, _, more in self._groups if more]
        return np.sort(np.concatenate(drawn))
