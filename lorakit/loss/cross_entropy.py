"""Weighted cross-entropy."""

from __future__ import annotations

import torch

from lorakit.loss.inputs import takes
from lorakit.types import Batch, LossOutput


@takes("weights", linear=True)
def cross_entropy(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
    """Return ``-sum(weight * logprob)``, a sum over tokens as in Tinker's ``cross_entropy``;
    ``logprobs`` is shaped as the targets.
    """
    return LossOutput(-(batch.weights * logprobs).sum(), logprobs.detach())
