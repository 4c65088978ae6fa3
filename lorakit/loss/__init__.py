"""Losses: pure functions (logprobs, batch) -> LossOutput. ``LOSSES`` is the only list of their names."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lorakit.loss.cross_entropy import cross_entropy

if TYPE_CHECKING:
    import torch

    from lorakit.types import Batch, LossOutput

Loss = Callable[["torch.Tensor", "Batch"], "LossOutput"]
LOSSES: dict[str, Loss] = {"cross_entropy": cross_entropy}
WEIGHTED_SUMS: tuple[Loss, ...] = (cross_entropy,)  # a multiple of the sum of batch.weights times logprobs
