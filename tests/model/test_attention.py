"""Attention by document: the same outputs and gradients as transformers' mask over all pairs,
which is never made.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tiny_models import gradients, make_datums, make_model, randomise, relative_l2, tiny_config

from lorakit.data.batch.collate import collate
from lorakit.data.batch.packing import pack_best_fit
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.logprobs import target_logprobs
from lorakit.model import attention
from lorakit.model.attention import (
    attend_by_document,
    find_difference,
    group_by_length,
    packed_documents,
)
from lorakit.model.layers import enable_checkpointing

FAMILIES = ["qwen3_moe", "qwen3", "llama", "mistral"]
ROWS = pack_best_fit(make_datums(11), 40)


def step(
    family: str, *, by_document: bool, checkpointing: bool = False
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    base = make_model(family)
    if by_document:
        assert attend_by_document(base) is None
    model = randomise(inject(base, LoRASpec(rank=4, alpha=8)), std=0.02).train()
    if checkpointing:
        enable_checkpointing(model)
    batch = collate(ROWS, pad_token_id=0)
    logprobs = target_logprobs(model, batch)
    (logprobs * batch.weights).sum().backward()
    return logprobs.detach(), gradients(model)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_outputs_and_gradients_are_those_of_the_mask(
    family: str, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, expected_gradients = step(family, by_document=False)
    lists: list[int] = []
    by_document = attention.attention_by_document

    def watched(module: Any, query: Any, key: Any, value: Any, mask: Any, **options: Any) -> Any:
        lists.append(mask.dim())
        return by_document(module, query, key, value, mask, **options)

    monkeypatch.setattr(attention, "attention_by_document", watched)
    found, found_gradients = step(family, by_document=True, checkpointing=checkpointing)
    num_layers = tiny_config(family).num_hidden_layers
    # No (B, 1, L, L) mask in the layers, nor when they are computed again; but mistral's window is
    # narrower than the documents.
    assert lists[-num_layers:] == [4 if family == "mistral" else 2] * num_layers
    assert len(lists) == (3 if checkpointing else 2) * num_layers
    assert (found - expected).abs().max() < 1e-5
    assert relative_l2(found_gradients, expected_gradients) < 1e-5


def test_a_step_may_follow_an_evaluation_of_the_same_documents() -> None:
    base = make_model("qwen3")
    assert attend_by_document(base) is None
    model = randomise(inject(base, LoRASpec(rank=4)), std=0.02).train()
    attention._layout.cache_clear()
    with torch.inference_mode():  # as Lightning evaluates
        evaluated = target_logprobs(model, collate(ROWS, pad_token_id=0))
    trained = target_logprobs(model, collate(ROWS, pad_token_id=0))
    trained.sum().backward()
    assert attention._layout.cache_info().misses == 1 and torch.equal(trained, evaluated)


def test_without_documents_it_is_transformers_own(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, ours = make_model("qwen3"), make_model("qwen3")
    assert attend_by_document(ours) is None
    tokens = torch.arange(2, 26).view(2, 12)
    padded = torch.ones_like(tokens)
    padded[0, :4] = 0
    for options in ({}, {"attention_mask": padded}, {"position_ids": torch.arange(6).repeat(2, 2)}):
        torch.testing.assert_close(ours(tokens, **options).logits, plain(tokens, **options).logits)
    generated = [
        model.generate(tokens, max_new_tokens=5, do_sample=False, pad_token_id=0)
        for model in (plain, ours)
    ]
    assert torch.equal(*generated)


def test_a_model_that_would_compute_something_else_keeps_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = make_model("qwen3")
    # forgets the documents: they leak
    monkeypatch.setattr(attention, "document_mask", lambda *args, **options: None)
    problem = attend_by_document(model)
    assert problem is not None and "logits differ" in problem
    assert model.config._attn_implementation == "sdpa"
    model.set_attn_implementation("eager")
    assert attend_by_document(model) == "model.attention is eager"


def test_documents_of_like_length_share_a_group() -> None:
    spans = [(0, 0, 100), (0, 100, 130), (1, 0, 95), (1, 95, 125), (1, 125, 126)]
    groups = group_by_length(spans)
    assert [[end - start for _, start, end in group] for group in groups] == [
        [100, 95],
        [30, 30],
        [1],
    ]
    assert sorted(span for group in groups for span in group) == sorted(spans)
    with packed_documents(spans):
        mask = attention.document_mask(batch_size=2, q_length=130, kv_length=130)
    assert mask is not None and mask.tolist() == [list(span) for span in spans]


def test_rounding_of_a_few_logits_is_no_difference_and_a_wrong_document_is() -> None:
    expected = torch.randn(62, 288, generator=torch.Generator().manual_seed(0))
    rounded = expected * (
        1 + 2e-3 * torch.randn(62, 288, generator=torch.Generator().manual_seed(1))
    )
    rounded[28, 7] += 0.3 * expected.abs().max()  # more than a trained model showed
    assert find_difference(rounded, expected, is_exact=False) is None
    assert find_difference(rounded, expected, is_exact=True) is not None
    leaking = expected.clone()
    # the shortest document, among others
    leaking[27:30] = torch.randn(3, 288, generator=torch.Generator().manual_seed(2))
    assert find_difference(leaking, expected, is_exact=False) is not None
