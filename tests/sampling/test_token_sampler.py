"""Numbers of a request alone, and tokens in their proportion."""

from __future__ import annotations

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.sampling.token_sampler import TokenSampler, sample_key, uniform
from lorakit.types import SamplingParams


def test_numbers_are_uniform_and_independent_of_what_they_are_drawn_with() -> None:
    keys = np.array(
        [sample_key(seed, number) for seed in range(100) for number in range(10)], np.uint64
    )
    assert len(set(keys.tolist())) == 1000
    drawn = np.stack([uniform(keys, np.full(1000, place, np.uint64)) for place in range(50)])
    assert drawn.min() >= 0 and drawn.max() < 1
    counts, _ = np.histogram(drawn, bins=20, range=(0, 1))
    # chi-squared with 19 degrees of freedom: 1 in 1,500
    assert ((counts - 2500) ** 2 / 2500).sum() < 45
    for flat in (drawn, drawn.T):  # neighbours in place, and in key
        assert abs(np.corrcoef(flat[:-1].ravel(), flat[1:].ravel())[0, 1]) < 0.02
    assert uniform(keys[17:18], np.array([3], np.uint64))[0] == drawn[3, 17]


def test_tokens_come_in_proportion_to_their_probability() -> None:
    logits = torch.tensor([0.0, 1.0, -1.0, float("-inf"), 2.0]).repeat(20_000, 1)
    params = [SamplingParams(temperature=0.5)] * len(logits)
    picked = TokenSampler(
        params, [sample_key(1, n) for n in range(len(logits))], 0, torch.device("cpu")
    ).pick(logits, [0] * len(logits))
    shares = torch.bincount(picked.tokens, minlength=5) / len(picked.tokens)
    expected = (torch.tensor([0.0, 1.0, -1.0, float("-inf"), 2.0]) / 0.5).softmax(-1)
    assert torch.allclose(shares, expected, atol=0.01) and shares[3] == 0


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.floats(-50, 50), min_size=2, max_size=30),
    st.integers(1, 40),
    st.floats(0.01, 1.0),
    st.integers(0, 2**63 - 1),
)
def test_what_is_cut_off_is_never_picked(
    values: list[float], top_k: int, top_p: float, seed: int
) -> None:
    logits = torch.tensor([values])
    token_sampler = TokenSampler(
        [SamplingParams(top_k=top_k, top_p=top_p)], [sample_key(seed, 0)], 0, torch.device("cpu")
    )
    token = int(token_sampler.pick(logits.clone(), [0]).tokens[0])
    probabilities = logits[0].log_softmax(-1).double().exp()
    ranked, order = probabilities.sort(descending=True, stable=True)
    kept = ranked[:top_k]
    before = kept.cumsum(0) - kept
    allowed = order[: len(kept)][before < top_p * kept.sum() + 1e-9]
    lowest = float(probabilities[allowed].min())  # among equals any may be kept
    assert float(probabilities[token]) >= lowest


def test_seeds_and_numbers_of_any_size_have_keys() -> None:
    assert len({sample_key(seed, 0) for seed in (0, -1, 2**63, 12345)}) == 4
    assert len({sample_key(0, number) for number in (0, 1, -1, 10**6)}) == 4
