"""A loss: log-probabilities of the targets in, a sum over tokens out."""

from __future__ import annotations

import torch

from lorakit.types import Batch, LossOutput


def focal(logprobs: torch.Tensor, batch: Batch, *, gamma: float = 2.0) -> LossOutput:
    """Tokens that are known already count less (Lin et al. 2017, arXiv 1708.02002)."""
    probabilities = logprobs.exp()
    loss = -(batch.weights * (1 - probabilities) ** gamma * logprobs).sum()
    sure = ((probabilities > 0.5) * batch.weights).sum()
    return LossOutput(loss, logprobs.detach(), {"share_of_sure_tokens": sure.detach()})
