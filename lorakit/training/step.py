"""One step's mathematics: model, Batch and loss to a LossOutput. Whoever trains, calls this."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lorakit.loss import WEIGHTED_SUMS, Loss
from lorakit.loss.logprobs import target_logprobs
from lorakit.types import Batch, LossOutput


def compute_loss(model: Any, batch: Batch, loss: Loss, *, all_positions: bool = False) -> LossOutput:
    """Run ``model`` over ``batch`` and return the loss's sum with its graph, and the log-probabilities of the targets.

    Positions of weight 0 never reach the unembedding, and their log-probability is NaN, unless ``all_positions``. The loss itself
    is given 0 there.
    """
    logprobs = target_logprobs(model, batch, all_positions=all_positions, is_weighted_sum=loss in WEIGHTED_SUMS)
    output = loss(logprobs, batch)
    if all_positions:
        return output
    return replace(output, logprobs=output.logprobs.masked_fill(batch.weights == 0, float("nan")))
