"""Losses of reinforcement learning, in Tinker's definitions
(tinker-docs.thinkingmachines.ai/tinker/losses): sums over tokens.

lp is the learner's log-probability of a token, q that of the policy that sampled it (``logprobs``),
A its advantage, r = exp(lp - q). Bounds are bounds of r itself, not distances from 1; a Datum may
bring bounds of its own for each token.
"""

from __future__ import annotations

import torch

from lorakit.loss.inputs import takes
from lorakit.types import Batch, LossOutput

BOUNDS = ("clip_low_threshold", "clip_high_threshold")


@takes("logprobs", "advantages")
def importance_sampling(logprobs: torch.Tensor, batch: Batch) -> LossOutput:
    """Return ``-sum(r * A)``."""
    ratio = _ratio(logprobs, batch)
    return _sum_of(ratio * batch.extras["advantages"], logprobs)


@takes("logprobs", "advantages", optional=BOUNDS)
def ppo(
    logprobs: torch.Tensor,
    batch: Batch,
    *,
    clip_low_threshold: float = 0.8,
    clip_high_threshold: float = 1.2,
) -> LossOutput:
    """Return ``-sum(min(r * A, clamp(r, low, high) * A))`` (arXiv 1707.06347, equation 7)."""
    distance = (logprobs - batch.extras["logprobs"]).masked_fill(batch.weights == 0, 0.0)
    return _clipped(distance, logprobs, batch, clip_low_threshold, clip_high_threshold)


@takes("logprobs", "advantages", optional=BOUNDS)
def cispo(
    logprobs: torch.Tensor,
    batch: Batch,
    *,
    clip_low_threshold: float = 0.0,
    clip_high_threshold: float = 4.0,
) -> LossOutput:
    """Return ``-sum(sg(clamp(r, low, high)) * lp * A)`` (MiniMax-M1, arXiv 2506.13585, equation
    4); sg has no gradient.
    """
    low, high = _bounds(batch, clip_low_threshold, clip_high_threshold)
    weights = _clamp(_ratio(logprobs, batch), low, high).detach()
    return _sum_of(weights * logprobs * batch.extras["advantages"], logprobs)


@takes("logprobs", "advantages")
def dro(logprobs: torch.Tensor, batch: Batch, *, beta: float = 0.05) -> LossOutput:
    """Return ``-sum(lp * A - beta / 2 * (lp - q)^2)`` (Richemond et al. 2024, arXiv 2405.19107)."""
    distance = (logprobs - batch.extras["logprobs"]) * (batch.weights != 0)
    return _sum_of(logprobs * batch.extras["advantages"] - 0.5 * beta * distance.square(), logprobs)


@takes("logprobs", "advantages", "sequence_ratio_mask", optional=BOUNDS)
def gspo(
    logprobs: torch.Tensor,
    batch: Batch,
    *,
    clip_low_threshold: float = 1 - 3e-4,
    clip_high_threshold: float = 1 + 4e-4,
) -> LossOutput:
    """Return ``-sum(min(s * A, clamp(s, low, high) * A))`` with one ratio per sequence, s =
    exp(mean of lp - q within the mask).

    The gradient goes to each token: ``s = exp(sg(mean) + lp - sg(lp))`` (GSPO-token, arXiv
    2507.18071, section 4.3; bounds of 5.1).
    """
    mask = (batch.extras["sequence_ratio_mask"] != 0) & (batch.weights != 0)
    apart = (logprobs.detach() - batch.extras["logprobs"]).masked_fill(~mask, 0.0)
    means = torch.zeros_like(apart)
    for row, start, end in batch.spans:
        means[row, start:end] = apart[row, start:end].sum() / mask[row, start:end].sum().clamp(
            min=1
        )
    distance = means + (logprobs - logprobs.detach())  # the difference first: it is exactly 0
    return _clipped(distance, logprobs, batch, clip_low_threshold, clip_high_threshold)


def _ratio(logprobs: torch.Tensor, batch: Batch) -> torch.Tensor:
    """r where there is a token, else 1."""
    is_silent = (batch.weights == 0) | (batch.extras["advantages"] == 0)
    return (logprobs - batch.extras["logprobs"]).masked_fill(is_silent, 0.0).exp()


def _clipped(
    distance: torch.Tensor, logprobs: torch.Tensor, batch: Batch, low: float, high: float
) -> LossOutput:
    """``-sum(min(r * A, clamp(r) * A))``; r may be infinite where that is a constant, and 0
    times it would be no number.
    """
    advantages, ratio = batch.extras["advantages"], distance.detach().exp()
    bound = _clamp(ratio, *_bounds(batch, low, high))
    is_constant = (advantages == 0) | (bound * advantages < ratio * advantages)
    moving = distance.masked_fill(is_constant, 0.0).exp()
    return _sum_of(torch.where(is_constant, bound, moving) * advantages, logprobs)


def _clamp(ratio: torch.Tensor, low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    return torch.minimum(torch.maximum(ratio, low), high)


def _bounds(batch: Batch, low: float, high: float) -> tuple[torch.Tensor, torch.Tensor]:
    given = [batch.extras.get(name) for name in BOUNDS]
    both = [
        batch.weights.new_tensor(value) if tensor is None else tensor
        for tensor, value in zip(given, (low, high), strict=True)
    ]
    return both[0], both[1]


def _sum_of(gains: torch.Tensor, logprobs: torch.Tensor) -> LossOutput:
    return LossOutput(-gains.sum(), logprobs.detach())
