"""Which token comes next: a distribution, and a number that belongs to the request, the sample and
the place alone.

Shapes: B rows, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from lorakit.types import SamplingParams


@dataclass(frozen=True)
class SampledTokens:
    """The next token of each row, (B,), its log-probability at the row's temperature, and the
    best ones where asked for.
    """

    tokens: torch.Tensor
    logprobs: torch.Tensor
    best: tuple[torch.Tensor, torch.Tensor] | None  # log-probabilities and tokens, (B, K)


class TokenSampler:
    """Picks for rows with these params; made anew when rows come or go."""

    def __init__(
        self,
        params: Sequence[SamplingParams],
        keys: Sequence[int],
        num_best: int,
        device: torch.device,
    ) -> None:
        self.keys, self.num_best = np.asarray(keys, np.uint64), num_best
        temperatures = [p.temperature if p.temperature > 0 else 1.0 for p in params]
        self.temperature_B1: torch.Tensor | None = None
        if set(temperatures) != {1.0}:
            self.temperature_B1 = torch.tensor(temperatures, device=device)[:, None]
        greedy = [p.temperature <= 0 for p in params]
        self.is_greedy_B = torch.tensor(greedy, device=device) if any(greedy) else None
        self.all_greedy = all(greedy)
        cut = [
            i for i, p in enumerate(params) if p.temperature > 0 and (p.top_p < 1 or p.top_k > 0)
        ]
        self.cut = torch.tensor(cut, device=device) if cut else None
        top_p = [params[i].top_p for i in cut]
        top_k = [params[i].top_k if params[i].top_k > 0 else 1 << 30 for i in cut]
        self.top_p = torch.tensor(top_p, device=device, dtype=torch.float64)[:, None]
        self.top_k = torch.tensor(top_k, device=device)[:, None]

    @torch.no_grad()
    def pick(self, logits_BV: torch.Tensor, places: Sequence[int]) -> SampledTokens:
        """Return the token at ``places`` (counted from each sample's first). ``logits_BV`` is
        written over.
        """
        scaled = logits_BV if self.temperature_B1 is None else logits_BV.div_(self.temperature_B1)
        logprobs_BV = scaled.log_softmax(dim=-1)
        if self.all_greedy:
            tokens = logprobs_BV.argmax(dim=-1)
        else:
            numbers = uniform(self.keys, np.asarray(places, np.uint64))
            drawn = torch.from_numpy(numbers).to(logits_BV.device)[:, None]
            tokens = _invert(logprobs_BV.double().exp_(), drawn)
            if self.cut is not None:
                tokens[self.cut] = self._pick_cut(logprobs_BV[self.cut], drawn[self.cut])
            if self.is_greedy_B is not None:
                tokens = torch.where(self.is_greedy_B, logprobs_BV.argmax(dim=-1), tokens)
        best = logprobs_BV.topk(min(self.num_best, logprobs_BV.shape[1])) if self.num_best else None
        return SampledTokens(tokens, logprobs_BV.gather(1, tokens[:, None])[:, 0], best)

    def _pick_cut(self, logprobs_bV: torch.Tensor, drawn: torch.Tensor) -> torch.Tensor:
        """Among the best ``top_k`` tokens, and of these the fewest that hold ``top_p`` of their
        probability.
        """
        ranked, order = logprobs_bV.double().exp_().sort(dim=-1, descending=True, stable=True)
        ranked.masked_fill_(torch.arange(ranked.shape[1], device=ranked.device) >= self.top_k, 0.0)
        before = ranked.cumsum(dim=-1) - ranked
        ranked.masked_fill_(before >= self.top_p * ranked.sum(dim=-1, keepdim=True), 0.0)
        return order.gather(1, _invert(ranked, drawn)[:, None])[:, 0]


def _invert(weights_BV: torch.Tensor, drawn_B1: torch.Tensor) -> torch.Tensor:
    """Return the token at which the running sum of ``weights_BV`` passes the share that was
    drawn, never one of weight 0.
    """
    sums = weights_BV.cumsum(dim=-1)
    found = torch.searchsorted(sums, drawn_B1 * sums[:, -1:], right=True)
    last = (sums < sums[:, -1:]).sum(dim=-1, keepdim=True)  # the last token that has any weight
    return torch.minimum(found, last)[:, 0]


def sample_key(seed: int, number: int) -> int:
    """Return what the numbers of sample ``number`` of a request with ``seed`` are drawn from."""
    numbers = np.array([seed % 2**64, number * 0x9E3779B97F4A7C15 % 2**64], np.uint64)
    return int(_mix(_mix(numbers[:1]) ^ numbers[1:])[0])


def uniform(keys: np.ndarray, places: np.ndarray) -> np.ndarray:
    """Return a number in [0, 1) for each key and place, the same in any company."""
    return (_mix(_mix(keys) + places * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(11)) * 2.0**-53


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's output function (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
    number generators", figure 16).
    """
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
