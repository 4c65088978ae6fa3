"""One step's mathematics: model, Batch and loss to a LossOutput. All training calls this."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorakit.lora.state import adapters_off
from lorakit.loss import Loss
from lorakit.loss.head import HeadAdapter
from lorakit.loss.inputs import inputs_of
from lorakit.loss.logprobs import target_logprobs
from lorakit.loss.preference import REFERENCE
from lorakit.types import Batch, LossOutput


def compute_loss(
    model: Any, batch: Batch, loss: Loss, *, all_positions: bool = False
) -> LossOutput:
    """Run ``model`` over ``batch`` and return the loss's sum with its graph, and the
    log-probabilities of the targets.

    Positions of weight 0 never reach the unembedding, and their log-probability is NaN, unless
    ``all_positions``. The loss itself is given 0 there.
    """
    if inputs_of(loss).needs_reference:
        batch = batch.with_extra(REFERENCE, reference_logprobs(model, batch))
    logprobs = target_logprobs(
        model, batch, all_positions=all_positions, is_weighted_sum=inputs_of(loss).is_weighted_sum
    )
    output = loss(logprobs, batch)
    if all_positions:
        return output
    return replace(output, logprobs=output.logprobs.masked_fill(batch.weights == 0, float("nan")))


@torch.no_grad()
def reference_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """The log-probabilities of ``batch``'s targets under the base alone: no second model, the
    adapter is switched off.
    """
    with adapters_off(model):
        return target_logprobs(model, batch)


def sums_by_origin(output: LossOutput, batch: Batch, num_origins: int) -> torch.Tensor:
    """Return ``-weight * logprob`` and ``|weight|``, summed for each source of data, (2, S)
    float32, of positions that are trained.
    """
    weights = batch.weights
    losses = (-weights * output.logprobs).masked_fill(weights == 0, 0.0)
    per_position = torch.stack([losses, weights.abs()])
    if per_position.ndim > 3:
        per_position = per_position.sum(-1)
    sums = per_position.new_zeros(2, num_origins)
    if batch.origins:
        sums.index_add_(1, batch.origin_ids.flatten(), per_position.flatten(1))
    return sums


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model with others', under a loss of their own."""

    batch: Batch
    loss: Loss


def compute_losses(
    model: Any,
    joined: Batch,
    micro_batches: Sequence[MicroBatch],
    head_adapters: Sequence[HeadAdapter] = (),
) -> list[LossOutput]:
    """Run ``model`` once over ``joined``, the rows of all ``micro_batches``, and return the output
    of each; logprobs of all positions.

    Args:
        head_adapters: on the unembedding, beside what the model itself has there; their gates have
            a row for each position.
    """
    logprobs = target_logprobs(
        model,
        joined,
        all_positions=True,
        is_weighted_sum=all(inputs_of(one.loss).is_weighted_sum for one in micro_batches),
        head_adapters=head_adapters,
    )
    outputs, first = [], 0
    for micro_batch in micro_batches:
        shape = micro_batch.batch.targets.shape
        own = logprobs[first : first + shape[0], : shape[1]]
        if own.ndim > 2:  # others have several targets per position
            own = own[..., : shape[2]] if len(shape) > 2 else own[..., 0]
        outputs.append(micro_batch.loss(own, micro_batch.batch))
        first += shape[0]
    return outputs
