"""One step's mathematics: model, Batch and loss to a LossOutput. Whoever trains, calls this."""

from __future__ import annotations

from typing import Any

from lorakit.loss import Loss
from lorakit.loss.logprobs import target_logprobs
from lorakit.types import Batch, LossOutput


def compute_loss(model: Any, batch: Batch, loss: Loss) -> LossOutput:
    """Run ``model`` over ``batch`` and return the loss's sum with its graph, and the logprobs of the trained targets."""
    return loss(target_logprobs(model, batch), batch)
