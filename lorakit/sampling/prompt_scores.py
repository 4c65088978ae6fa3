"""What is asked about a prompt itself: log-probabilities of its tokens and of others in their
places, at temperature 1, and draws.
"""

from __future__ import annotations

import numpy as np
import torch

from lorakit.loss.head import Head, all_logits, best_logprobs, head_logprobs
from lorakit.sampling.request import Request, RunningRequest
from lorakit.sampling.token_sampler import TokenSampler, sample_key
from lorakit.types import TensorData


def score_prompt(
    running: RunningRequest, hidden_NH: torch.Tensor, head: Head, vocab_size: int, *, by_token: bool
) -> None:
    """Keep in ``running`` what its request asks.

    Args:
        hidden_NH: what the unembedding is given at each place of the prompt but the last.
        by_token: compute the logits of one token at a time, as those of sampled tokens are.
    """
    request = running.request
    if request.scores_prompt:
        targets = torch.tensor(request.prompt[1:], device=hidden_NH.device)[:, None]
        score = _score_by_token if by_token else head_logprobs
        running.prompt_logprobs = [None, *score(hidden_NH, head, targets)[:, 0].tolist()]
    if request.num_best_of_prompt:
        values, best = best_logprobs(hidden_NH, head, min(request.num_best_of_prompt, vocab_size))
        pairs = zip(best.tolist(), values.tolist(), strict=True)
        running.best_of_prompt = [None, *(list(zip(*pair, strict=True)) for pair in pairs)]
    if request.prompt_targets is not None:
        wanted = torch.from_numpy(request.prompt_targets.to_numpy()).to(hidden_NH.device)
        found = head_logprobs(hidden_NH, head, wanted.clamp(min=0)).masked_fill_(wanted < 0, 0.0)
        running.target_logprobs = TensorData(found)
    if request.num_alternatives:
        running.alternatives = _draw_alternatives(request, hidden_NH, head)


def _score_by_token(hidden_NH: torch.Tensor, head: Head, targets_N1: torch.Tensor) -> torch.Tensor:
    """As sampled tokens are scored: the logits of one at a time, (N, 1)."""
    rows = [
        all_logits(hidden_NH[n : n + 1], head).log_softmax(dim=-1) for n in range(len(hidden_NH))
    ]
    return torch.cat(rows).gather(1, targets_N1) if rows else hidden_NH.new_zeros((0, 1))


def _draw_alternatives(
    request: Request, hidden_NH: torch.Tensor, head: Head
) -> tuple[TensorData, TensorData]:
    """Draw tokens by numbers of the place alone: (N, K) tokens and their log-probabilities."""
    tokens = np.zeros((len(hidden_NH), request.num_alternatives), np.int64)
    logprobs = np.zeros(tokens.shape, np.float32)
    for first in range(0, len(hidden_NH), 64):
        places = range(first, min(first + 64, len(hidden_NH)))
        logits = all_logits(hidden_NH[first : places.stop], head)
        for draw in range(request.num_alternatives):
            key = sample_key(request.params.seed or 0, -1 - draw)  # no sample's
            token_sampler = TokenSampler(
                [request.params] * len(places), [key] * len(places), 0, hidden_NH.device
            )
            picked = token_sampler.pick(logits.clone(), list(places))
            tokens[first : places.stop, draw] = picked.tokens.cpu().numpy()
            logprobs[first : places.stop, draw] = picked.logprobs.cpu().numpy()
    return TensorData(tokens), TensorData(logprobs)
