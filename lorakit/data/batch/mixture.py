"""Which rows an epoch has, where several sources are seen more or less often than once."""

from __future__ import annotations

import math

import numpy as np

from lorakit.data.read.sources import Source


class Mixture:
    """The rows of each epoch: of a source of weight ``w`` every row ``floor(w)`` times, and a share
    of them once more.

    That share moves on from epoch to epoch, and carries its fraction over: of a source of weight
    0.5 two epochs have every row once, however few there are.
    """

    def __init__(self, indices: np.ndarray, source: Source, *, seed: int) -> None:
        self.indices = indices
        # rows in the order in which shares take them, and the weight
        self._groups: list[tuple[np.ndarray, float]] = []
        origins = source.origins_of(indices)
        for number, weight in enumerate(source.weights):
            mixed = np.random.default_rng([seed, number]).permutation(indices[origins == number])
            self._groups.append((mixed, weight))

    @property
    def counts(self) -> list[float]:
        """Rows of each source in an epoch, on average."""
        if not self._groups:
            return [float(len(self.indices))]
        return [len(rows) * weight for rows, weight in self._groups]

    @property
    def num_rows(self) -> float:
        """Rows of an epoch, on average."""
        return sum(self.counts)

    def rows(self, epoch: int) -> np.ndarray:
        """The rows of ``epoch``, in the order of the sources."""
        if not self._groups:
            return self.indices
        drawn = []
        for rows, weight in self._groups:
            drawn.append(np.tile(rows, int(weight)))
            share = (weight - int(weight)) * len(rows)
            first, last = (math.floor(round(number * share, 9)) for number in (epoch, epoch + 1))
            drawn.append(rows[np.arange(first, last) % max(len(rows), 1)])
        return np.sort(np.concatenate(drawn))
