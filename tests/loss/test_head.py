"""The head in blocks against all logits at once: values and gradients, with everything that an
unembedding may have.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import peft
import pytest
import torch
from tiny_models import LargestTensor, make_model

import lorakit.loss.head
from lorakit.loss.head import Head, HeadAdapter, best_logprobs, head_logprobs
from lorakit.loss.logprobs import describe_head

TOKENS, VOCAB, HIDDEN, RANK = 23, 61, 16, 3


def make(
    dtype: torch.dtype = torch.float32, *, adapters: int = 0, bias: bool = False, **options: Any
) -> tuple[Head, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)

    pairs = tuple(
        HeadAdapter(randn(RANK, HIDDEN).requires_grad_(), randn(VOCAB, RANK).requires_grad_(), 0.5)
        for _ in range(adapters)
    )
    head = Head(randn(VOCAB, HIDDEN), randn(VOCAB) if bias else None, pairs, **options)
    return head, randn(TOKENS, HIDDEN).requires_grad_()


def plain(
    hidden: torch.Tensor, head: Head, targets: torch.Tensor, temperature: float = 1.0
) -> torch.Tensor:
    """All logits, log_softmax, gather."""
    weight = head.weight_VH + sum(scale * b @ a for a, b, scale, *_ in head.adapters)
    logits = hidden @ weight.T + (0 if head.bias_V is None else head.bias_V)
    logits = logits.float() if logits.dtype != torch.float64 else logits
    logits = logits * head.multiplier
    if head.softcap:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits / temperature).log_softmax(dim=-1).gather(1, targets)


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """As a share of the largest value: what rounding of float32 is relative to."""
    return float(((ours - theirs).abs().max() / theirs.abs().max()).detach())


def curved(logprobs: torch.Tensor) -> torch.Tensor:
    """A loss that is not linear in log-probabilities."""
    return (
        logprobs.exp() * torch.linspace(-1, 2, logprobs.numel()).view_as(logprobs) + 0.1 * logprobs
    ).sum()


CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "bias": {"bias": True},
    "adapter": {"adapters": 1},
    "two adapters": {"adapters": 2},
    "softcap": {"softcap": 2.0},
    "scaled": {"multiplier": 0.25},
    "all": {"bias": True, "adapters": 1, "softcap": 2.0, "multiplier": 0.5},
}


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("num_targets", [1, 4])
@pytest.mark.parametrize("block_bytes", [12, 4 * 7 * TOKENS, 4096 * 7, None])
@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_all_logits_at_once(
    case: str, block_bytes: int | None, num_targets: int, temperature: float
) -> None:
    head, hidden = make(**CASES[case])
    targets = torch.randint(
        VOCAB, (TOKENS, num_targets), generator=torch.Generator().manual_seed(1)
    )
    factors = [factor for adapter in head.adapters for factor in adapter[:2]]
    ours = head_logprobs(hidden, head, targets, temperature=temperature, block_bytes=block_bytes)
    theirs = plain(hidden, head, targets, temperature)
    assert ours.dtype == torch.float32
    assert largest_difference(ours, theirs) < 1e-6
    found = torch.autograd.grad(curved(ours), [hidden, *factors])
    expected = torch.autograd.grad(curved(theirs), [hidden, *factors])
    for mine, reference in zip(found, expected, strict=True):
        assert float((mine - reference).norm() / reference.norm()) < 2e-6


@pytest.mark.parametrize("num_targets", [1, 4])
@pytest.mark.parametrize("block_bytes", [12, VOCAB * 4, VOCAB * 4 * 2 + 60, None])
@pytest.mark.parametrize("case", [case for case in CASES if CASES[case].get("adapters")])
def test_a_weighted_sum_whose_weights_are_known_computes_its_logits_once(
    monkeypatch: pytest.MonkeyPatch, case: str, block_bytes: int | None, num_targets: int
) -> None:
    head, hidden = make(**CASES[case])
    targets = torch.randint(
        VOCAB, (TOKENS, num_targets), generator=torch.Generator().manual_seed(1)
    )
    weights = torch.randn(TOKENS, num_targets, generator=torch.Generator().manual_seed(2))
    factors = [factor for adapter in head.adapters for factor in adapter[:2]]
    again: list[int] = []
    twice = lorakit.loss.head._add_all_gradients_
    monkeypatch.setattr(
        lorakit.loss.head,
        "_add_all_gradients_",
        lambda *args, **options: again.append(1) or twice(*args, **options),
    )
    ours = head_logprobs(
        hidden, head, targets, temperature=0.7, block_bytes=block_bytes, weights_NK=weights
    )
    theirs = plain(hidden, head, targets, 0.7)
    assert largest_difference(ours, theirs) < 1e-6
    found = torch.autograd.grad(-(weights * ours).sum() / 7, [hidden, *factors], retain_graph=True)
    assert not again or block_bytes == 12  # which does not hold the logits of one token
    expected = torch.autograd.grad(
        -(weights * theirs).sum() / 7, [hidden, *factors], retain_graph=True
    )
    # a loss that is not what was told
    other = torch.autograd.grad(curved(ours), [hidden, *factors])
    assert again
    expected += torch.autograd.grad(curved(theirs), [hidden, *factors])
    for mine, reference in zip([*found, *other], expected, strict=True):
        assert float((mine - reference).norm() / reference.norm()) < 2e-6


def test_a_gradient_that_forgets_the_softcap_would_be_seen() -> None:
    head, hidden = make(softcap=2.0)
    bare, _ = make()
    targets = torch.zeros(TOKENS, 1, dtype=torch.long)
    (capped,) = torch.autograd.grad(head_logprobs(hidden, head, targets).sum(), hidden)
    (plainly,) = torch.autograd.grad(head_logprobs(hidden, bare, targets).sum(), hidden)
    assert float((capped - plainly).norm() / plainly.norm()) > 0.1


def test_the_best_alternatives_are_those_of_all_logits() -> None:
    head, hidden = make(adapters=1)
    everything = plain(hidden, head, torch.arange(VOCAB).repeat(TOKENS, 1))
    expected = everything.topk(5)
    values, tokens = best_logprobs(hidden, head, 5, block_bytes=4 * 7 * TOKENS)
    assert largest_difference(values, expected.values) < 1e-6
    assert torch.equal(tokens, expected.indices)


def test_no_token_at_all_is_no_error() -> None:
    head, hidden = make(adapters=1)
    logprobs = head_logprobs(hidden[:0], head, torch.zeros(0, 1, dtype=torch.long))
    assert logprobs.shape == (0, 1)
    logprobs.sum().backward()
    assert best_logprobs(hidden[:0], head, 2)[0].shape == (0, 2)


def test_large_logits_do_not_overflow() -> None:
    head, hidden = make(multiplier=1e4)
    logprobs = head_logprobs(hidden, head, torch.zeros(TOKENS, 1, dtype=torch.long))
    assert bool(torch.isfinite(logprobs).all()) and bool((logprobs <= 0).all())


def test_without_gradients_nothing_is_kept_nor_formed(monkeypatch: pytest.MonkeyPatch) -> None:
    head, hidden = make()
    # what would be pulled towards the vocabulary
    monkeypatch.setattr(lorakit.loss.head, "_add_product_", None)
    with torch.no_grad():
        assert not head_logprobs(
            hidden, head, torch.zeros(TOKENS, 1, dtype=torch.long)
        ).requires_grad
    with pytest.raises(TypeError):  # the control
        head_logprobs(hidden, head, torch.zeros(TOKENS, 1, dtype=torch.long))


def test_a_frozen_unembedding_computes_its_logits_once_for_whatever_loss(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    head, hidden = make()
    blocks: list[int] = []
    compute = lorakit.loss.head._Call._logits
    monkeypatch.setattr(
        lorakit.loss.head._Call, "_logits", lambda *args: blocks.append(1) or compute(*args)
    )
    logprobs = head_logprobs(
        hidden, head, torch.zeros(TOKENS, 1, dtype=torch.long), block_bytes=4096 * 7
    )
    assert len(blocks) == 4  # 23 tokens, 7 at a time, that meet all 61 of the vocabulary
    curved(logprobs).backward()
    assert len(blocks) == 4


@pytest.mark.parametrize("weights", [None, torch.ones(64, 1)])
@pytest.mark.parametrize("adapters", [0, 1])
def test_tokens_times_vocabulary_is_never_held(adapters: int, weights: torch.Tensor | None) -> None:
    vocab, tokens, hidden_size = 4096, 64, 16
    a, b = (
        torch.randn(RANK, hidden_size, requires_grad=True),
        torch.randn(vocab, RANK, requires_grad=True),
    )
    head = Head(torch.randn(vocab, hidden_size), None, (HeadAdapter(a, b, 0.5),) * adapters)
    hidden, targets = (
        torch.randn(tokens, hidden_size, requires_grad=True),
        torch.zeros(tokens, 1, dtype=torch.long),
    )
    with LargestTensor() as ours:
        curved(
            head_logprobs(hidden, head, targets, block_bytes=4 * 4096 * 4, weights_NK=weights)
        ).backward()
    with LargestTensor() as theirs:  # the control
        curved(plain(hidden, head, targets)).backward()
    assert ours.num_elements < 0.3 * tokens * vocab <= tokens * vocab <= theirs.num_elements


def test_dropout_falls_on_what_the_adapter_is_given() -> None:
    head, hidden = make(adapters=1)
    kept = (torch.arange(HIDDEN) % 3 > 0) * 1.5
    dropped = replace(head, adapters=(head.adapters[0]._replace(dropout=lambda x: x * kept),))
    targets = torch.randint(VOCAB, (TOKENS, 1), generator=torch.Generator().manual_seed(1))
    a, b, scale, *_ = head.adapters[0]
    logits = hidden @ head.weight_VH.T + scale * (hidden * kept) @ a.T @ b.T
    theirs = logits.log_softmax(dim=-1).gather(1, targets)
    ours = head_logprobs(hidden, dropped, targets)
    assert largest_difference(ours, theirs) < 1e-6
    found, expected = (
        torch.autograd.grad(curved(logprobs), [hidden, a, b]) for logprobs in (ours, theirs)
    )
    for mine, reference in zip(found, expected, strict=True):
        assert float((mine - reference).norm() / reference.norm()) < 2e-6


@pytest.mark.parametrize("adapters", [0, 1])
def test_in_bf16_a_token_that_the_model_is_sure_of_keeps_its_gradient(adapters: int) -> None:
    """Its row of the unembedding less the mean of all rows would be the small difference of two
    that are nearly alike.
    """
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(512, 64, generator=generator).bfloat16()
    targets = torch.randint(512, (40, 1), generator=generator)
    states = (
        0.3 * weight[targets[:, 0]].float() + 0.05 * torch.randn(40, 64, generator=generator)
    ).bfloat16()
    pairs = [
        torch.randn(RANK, 64, generator=generator) * 0.02,
        torch.randn(512, RANK, generator=generator) * 0.02,
    ]
    found = []
    for dtype, compute in ((torch.float64, plain), (torch.bfloat16, head_logprobs)):
        factors = [factor.to(dtype).requires_grad_() for factor in pairs * adapters]
        head = Head(
            weight.to(dtype), None, tuple(HeadAdapter(*factors, 1.0) for _ in range(adapters))
        )
        hidden = states.to(dtype).requires_grad_()
        logprobs = compute(hidden, head, targets)
        found.append(torch.autograd.grad(-logprobs.sum(), [hidden, *factors]))
    assert float(logprobs.detach().exp().mean()) > 0.99
    for mine, reference in zip(found[1], found[0], strict=True):
        # 0.8 by the difference
        assert float((mine.double() - reference).norm() / reference.norm()) < 0.05


@pytest.mark.parametrize("change", ["bias of LoRA", "bias of the unembedding"])
def test_a_trained_bias_is_left_to_the_model_itself(change: str) -> None:
    model = make_model("llama")
    model.lm_head = torch.nn.Linear(32, 64).requires_grad_(False)
    config = peft.LoraConfig(target_modules=["lm_head"], lora_bias=change == "bias of LoRA")
    wrapped = peft.get_peft_model(model, config)
    unembedding = wrapped.get_output_embeddings()
    if change == "bias of the unembedding":
        assert describe_head(wrapped, unembedding) is not None
        unembedding.base_layer.bias.requires_grad_()
    assert describe_head(wrapped, unembedding) is None
