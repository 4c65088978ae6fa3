"""Weighted cross-entropy."""

from __future__ import annotations

import torch

from lorakit.types import Batch, LossOutput


def cross_entropy(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
    """Return ``-sum(weight * logprob)``, a sum over tokens as in Tinker's ``cross_entropy``; ``logprobs`` is (B, L)."""
    return LossOutput(-(batch.weights * logprobs).sum(), logprobs.detach())
