"""A caller's own loss: a function of all Datums' log-probabilities."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
import torch

from lorakit.errors import DataError
from lorakit.loss import Loss
from lorakit.loss.preference import CustomLoss
from lorakit.types import Batch, Datum, LossOutput, TensorData

Array = TypeVar("Array", np.ndarray, torch.Tensor)


def as_loss(function: CustomLoss, data: Sequence[Datum]) -> Loss:
    """Return ``function(data, logprobs)``, which returns (scalar loss, metrics), as a loss over
    a batch of these Datums in order.
    """

    def loss(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
        own = []
        for (row, start, end), datum in zip(batch.spans, data, strict=True):
            found = as_targets(logprobs[row, start:end], datum.targets.shape)
            own.append(found.cpu())  # where the caller's own numbers are
        value, metrics = _call(function, data, own)
        return LossOutput(value.sum().float().to(logprobs.device), logprobs.detach(), metrics)

    return loss


def as_targets(logprobs: Array, shape: tuple[int, ...]) -> Array:
    """Return a Datum's log-probabilities, (positions,) or (positions, K) with K of the whole
    batch, in the ``shape`` of its own targets.
    """
    if len(shape) > 1:
        return logprobs[:, : shape[1]]
    return logprobs if logprobs.ndim == 1 else logprobs[:, 0]


def pull_back(
    function: CustomLoss, data: Sequence[Datum], logprobs: Sequence[TensorData]
) -> tuple[list[Datum], float, dict[str, float]]:
    """Return Datums whose cross-entropy has the gradient of ``function`` at ``logprobs``, its
    value, and its metrics.
    """
    leaves = [found.to_torch().requires_grad_() for found in logprobs]
    value, metrics = _call(function, data, leaves)
    gradients = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    weighted = [
        Datum(
            datum.model_input,
            {
                "target_tokens": datum.loss_fn_inputs["target_tokens"],
                "weights": torch.zeros_like(leaf) if gradient is None else -gradient,
            },
        )
        for datum, leaf, gradient in zip(data, leaves, gradients, strict=True)
    ]
    return weighted, float(value.detach().sum()), metrics


def with_unit_weights(datum: Datum) -> Datum:
    """Only what log-probabilities need: a custom loss reads the rest itself."""
    targets = datum.targets
    return Datum(
        datum.model_input, {"target_tokens": targets, "weights": np.ones(targets.shape, np.float32)}
    )


def _call(
    function: CustomLoss, data: Sequence[Datum], logprobs: Sequence[torch.Tensor]
) -> tuple[torch.Tensor, dict[str, float]]:
    value, metrics = function(data, logprobs)
    if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
        raise DataError(
            "a custom loss must return (a scalar tensor that depends on the log-probabilities, a"
            " dict of metrics)"
        )
    return value, {str(name): float(number) for name, number in metrics.items()}
