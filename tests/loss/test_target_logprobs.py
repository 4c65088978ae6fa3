"""The log-probabilities that losses see are those of the full softmax, with the same gradient."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import gradients, make_batches, make_datums, make_model, randomise, relative_l2

from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.loss.head import head_logprobs
from lorakit.loss.logprobs import _warn_of_all_logits, target_logprobs
from lorakit.training.step import compute_loss
from lorakit.types import Batch

FAMILIES = ["qwen3_moe", "qwen3", "llama", "mistral", "gemma2"]


def make(family: str = "llama") -> Any:
    return randomise(inject(make_model(family), LoRASpec(rank=4, alpha=8, unembedding=True)))


def full_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """log_softmax over all logits, gathered at the targets; 0 where the weight is 0."""
    logprobs = model(input_ids=batch.input_ids).logits.float().log_softmax(dim=-1)
    return logprobs.gather(-1, batch.targets[..., None]).squeeze(-1) * (batch.weights != 0)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_equal_log_softmax_and_gather_with_gradients(family: str) -> None:
    batch = make_batches(make_datums(5), 5, 1)[0]
    assert batch.padding_share > 0.2
    assert 0 < batch.num_trained_tokens < batch.num_tokens
    ours, theirs = make(family), make(family)
    values = target_logprobs(ours, batch)
    expected = full_logprobs(theirs, batch)
    torch.testing.assert_close(values, expected, atol=2e-6, rtol=1e-6)
    (values * batch.weights).sum().backward()
    (expected * batch.weights).sum().backward()
    assert relative_l2(gradients(ours), gradients(theirs)) < 1e-6


class _SameDropout(torch.nn.Dropout):
    """Drops the same third of a vector everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * (torch.arange(x.shape[-1]) % 3 > 0) * 1.5 if self.training else x


def test_dropout_on_the_unembedding_holds_no_logits_either(
    caplog: pytest.LogCaptureFixture,
) -> None:
    batch = make_batches(make_datums(5), 5, 1)[0]
    found = []
    for compute in (target_logprobs, full_logprobs):
        model = make().train()
        model.get_output_embeddings().lora_dropout["default"] = _SameDropout(1 / 3)
        values = compute(model, batch)
        (values * batch.weights).sum().backward()
        found.append((values, gradients(model)))
    torch.testing.assert_close(found[0][0], found[1][0], atol=2e-6, rtol=1e-6)
    assert relative_l2(found[0][1], found[1][1]) < 1e-6
    assert (found[0][0] - target_logprobs(make(), batch)).abs().max() > 0.01  # it does something
    assert not caplog.text


def test_a_shifted_target_would_be_seen() -> None:
    batch = make_batches(make_datums(5), 5, 1)[0]
    shifted = replace(batch, targets=batch.targets.roll(1, dims=1))
    difference = target_logprobs(make(), shifted) - full_logprobs(make(), batch)
    assert difference.abs().max() > 0.1


def test_they_are_zero_where_the_weight_is_zero_and_float32() -> None:
    batch = make_batches(make_datums(5), 5, 1)[0]
    values = target_logprobs(make(), batch)
    assert values.dtype == torch.float32
    assert values.shape == batch.weights.shape
    assert not values[batch.weights == 0].any()
    assert bool((values[batch.weights != 0] < 0).all())


def test_a_bfloat16_model_gives_float32_logprobs() -> None:
    model = inject(make_model("llama", "bfloat16"), LoRASpec(rank=4))
    assert target_logprobs(model, make_batches(make_datums(3), 3, 1)[0]).dtype == torch.float32


def test_a_batch_without_any_weight_gives_zero_with_zero_gradients() -> None:
    batch = make_batches(make_datums(3), 3, 1)[0]
    batch = replace(batch, weights=torch.zeros_like(batch.weights))
    model = make()
    output = cross_entropy(target_logprobs(model, batch), batch)
    assert output.loss_sum.item() == 0
    output.loss_sum.backward()
    assert not any(gradient.any() for gradient in gradients(model).values())


def test_the_last_position_alone_can_be_trained() -> None:
    batch = make_batches(make_datums(3), 3, 1)[0]
    weights = torch.zeros_like(batch.weights)
    weights[:, -1] = 1
    batch = replace(batch, weights=weights)
    torch.testing.assert_close(
        target_logprobs(make(), batch), full_logprobs(make(), batch), atol=2e-6, rtol=1e-6
    )


def test_cross_entropy_is_minus_the_weighted_sum_by_hand() -> None:
    weights = torch.tensor([[1.0, 0.5, 0.0], [-0.25, 2.0, 1.0]])
    logprobs = torch.tensor([[-1.0, -2.0, -9.0], [-4.0, -0.5, -3.0]], requires_grad=True)
    empty = torch.zeros(2, 3, dtype=torch.long)
    output = cross_entropy(logprobs, Batch(empty, empty, weights, None, ((0, 0, 3), (1, 0, 3))))
    assert output.loss_sum.item() == pytest.approx(1.0 + 1.0 + 0.0 - 1.0 + 1.0 + 3.0)
    output.loss_sum.backward()
    assert torch.equal(logprobs.grad, -weights)
    assert not output.logprobs.requires_grad


def test_a_step_says_nothing_of_what_it_did_not_compute() -> None:
    batch, model = make_batches(make_datums(5), 5, 1)[0], make()
    some, everything = (
        compute_loss(model, batch, cross_entropy, all_positions=flag) for flag in (False, True)
    )
    assert (
        torch.equal(some.logprobs.isnan(), batch.weights == 0)
        and not everything.logprobs.isnan().any()
    )
    torch.testing.assert_close(some.loss_sum, everything.loss_sum)
    expected = (
        model(input_ids=batch.input_ids)
        .logits.log_softmax(dim=-1)
        .gather(-1, batch.targets[..., None])[..., 0]
    )
    torch.testing.assert_close(everything.logprobs, expected, atol=2e-6, rtol=1e-6)


@pytest.mark.parametrize("num_trained", [1, 4])
def test_only_trained_positions_reach_the_unembedding(
    num_trained: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    batch, model = make_batches(make_datums(5), 5, 1)[0], make()
    weights = torch.zeros_like(batch.weights)
    weights[0, :num_trained] = 1
    seen = []

    def counted(hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(len(hidden))
        return head_logprobs(hidden, *args, **kwargs)

    target_logprobs(model, batch)  # compares the unembedding with the model's own, once
    monkeypatch.setattr("lorakit.loss.logprobs.head_logprobs", counted)
    target_logprobs(model, replace(batch, weights=weights))
    assert seen == [num_trained]


def test_an_unembedding_that_is_not_known_is_run_by_the_model_itself(
    caplog: pytest.LogCaptureFixture,
) -> None:
    _warn_of_all_logits.cache_clear()
    batch, model = make_batches(make_datums(5), 5, 1)[0], make_model("llama")
    forward = model.forward

    # as a family does whose config lorakit cannot read
    def scaled(*args: Any, **kwargs: Any) -> Any:
        output = forward(*args, **kwargs)
        output.logits = output.logits * 3.0
        return output

    model.forward = scaled
    torch.testing.assert_close(
        target_logprobs(model, batch), full_logprobs(model, batch), atol=2e-6, rtol=1e-6
    )
    assert "not one that lorakit knows" in caplog.text


def test_what_the_model_s_own_unembedding_is_given_to_compare_is_contiguous() -> None:
    """Of a slice torch makes a product in batches, for which a CPU copies a 16-bit unembedding
    once for every row.
    """
    model, given = make_model("llama"), []
    model.get_output_embeddings().register_forward_hook(
        lambda module, args, output: given.append(args[0])
    )
    target_logprobs(model, make_batches(make_datums(4), 4, 1)[0])
    assert given[0].shape[:2] == (4, 2) and given[0].is_contiguous()
