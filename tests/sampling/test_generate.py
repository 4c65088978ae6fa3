"""Samples are what a plain loop over the logits gives, end where they should, and leave no trace
behind.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_model

from lorakit.model.load import load_model, load_tokenizer
from lorakit.sampling.generate import generate
from lorakit.types import Sample, SamplingParams

TEXTS = ["copy: ab\n", "reverse: banana split and more\n", "x", "upper: the cat\n"]


class NoEnd:
    """A tokenizer over the tiny vocabulary whose EOS never comes: one character a token."""

    pad_token_id, eos_token_id = 0, None

    def decode(self, tokens: list[int], **options: Any) -> str:
        return "".join(chr(48 + token) for token in tokens)


def written(samples: list[Sample]) -> list[tuple[list[int], str, str]]:
    """Samples without their log-probabilities, which other company rounds otherwise."""
    return [(sample.tokens, sample.text, sample.stop_reason) for sample in samples]


@pytest.fixture(scope="module")
def tiny() -> tuple[Any, Any]:
    return load_model("tiny"), load_tokenizer("tiny")


@torch.no_grad()
def argmax_loop(model: Any, prompt: list[int], count: int, end: set[int]) -> list[int]:
    """Greedy decoding of one prompt without cache, padding or mask."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(
            int(model(input_ids=torch.tensor([tokens]), use_cache=False).logits[0, -1].argmax())
        )
        if tokens[-1] in end:
            break
    return tokens[len(prompt) :]


def ends_of(model: Any, tokenizer: Any) -> set[int]:
    configured = model.generation_config.eos_token_id
    return {tokenizer.eos_token_id, *(configured if isinstance(configured, list) else [configured])}


def test_greedy_is_the_argmax_loop_for_prompts_of_different_lengths(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    samples = generate(model, tokenizer, prompts, SamplingParams(max_tokens=12, temperature=0))
    for prompt, sample in zip(prompts, samples, strict=True):
        assert list(sample.tokens) == argmax_loop(model, prompt, 12, ends_of(model, tokenizer))


@pytest.mark.parametrize("family", ["qwen3_moe", "llama", "mistral"])
def test_greedy_is_the_argmax_loop_for_random_models(family: str) -> None:
    model = make_model(family)
    model.generation_config.eos_token_id = None
    prompts = [[5, 9, 3], [7], [11, 12, 40, 41, 42, 8, 30, 31, 32]]
    samples = generate(model, NoEnd(), prompts, SamplingParams(max_tokens=8, temperature=0))
    assert [list(sample.tokens) for sample in samples] == [
        argmax_loop(model, prompt, 8, set()) for prompt in prompts
    ]
    assert {sample.stop_reason for sample in samples} == {"length"}


def test_eos_ends_a_row_and_is_its_last_token() -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [[5, 9, 3], [7, 8]]
    free = generate(model, NoEnd(), prompts, SamplingParams(max_tokens=8, temperature=0))
    end = free[0].tokens[3]
    model.generation_config.eos_token_id = [end]
    ended = generate(model, NoEnd(), prompts, SamplingParams(max_tokens=8, temperature=0))
    for before, after in zip(free, ended, strict=True):
        cut = before.tokens.index(end) + 1 if end in before.tokens else 8
        assert after.tokens == before.tokens[:cut]
        assert after.stop_reason == ("stop" if end in before.tokens else "length")
        assert after.text == NoEnd().decode([token for token in after.tokens if token != end])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_a_stop_string_ends_the_text_and_is_cut(length: int) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [[5, 9, 3], [7, 8, 20, 21]]
    free = generate(model, NoEnd(), prompts, SamplingParams(max_tokens=10, temperature=0))
    stop = free[0].text[4 : 4 + length]
    samples = generate(
        model, NoEnd(), prompts, SamplingParams(max_tokens=10, temperature=0, stop=[stop, "never"])
    )
    for before, after in zip(free, samples, strict=True):
        place = before.text.find(stop)
        assert after.text == (before.text[:place] if place >= 0 else before.text)
        assert after.tokens == (before.tokens[: place + length] if place >= 0 else before.tokens)
        assert after.stop_reason == ("stop" if place >= 0 else "length")
    alone = generate(
        model, NoEnd(), prompts[:1], SamplingParams(max_tokens=10, temperature=0, stop=stop)
    )
    assert written(alone) == written(samples[:1])


def test_the_same_seed_repeats_and_another_does_not(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]

    def sample(seed: int) -> list[Any]:
        return generate(
            model, tokenizer, prompts, SamplingParams(max_tokens=12, temperature=1.5, seed=seed)
        )

    first = sample(1)
    torch.rand(3)
    assert sample(1) == first
    assert sample(2) != first


def test_top_k_of_one_is_greedy(tiny: tuple[Any, Any]) -> None:
    model, tokenizer = tiny
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    greedy = generate(model, tokenizer, prompts, SamplingParams(max_tokens=8, temperature=0))
    again = generate(
        model, tokenizer, prompts, SamplingParams(max_tokens=8, temperature=1.0, top_k=1, seed=0)
    )
    assert written(again) == written(greedy)
    again = generate(
        model, tokenizer, prompts, SamplingParams(max_tokens=8, temperature=1.0, top_p=1e-6, seed=0)
    )
    assert written(again) == written(greedy)


def test_sampling_follows_the_models_probabilities() -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    with torch.no_grad():
        expected = (model(input_ids=torch.tensor([[5, 9, 3]])).logits[0, -1] / 2.0).softmax(-1)
    samples = generate(
        model, NoEnd(), [[5, 9, 3]] * 2000, SamplingParams(max_tokens=1, temperature=2.0, seed=0)
    )
    counts = (
        torch.bincount(torch.tensor([sample.tokens[0] for sample in samples]), minlength=64) / 2000
    )
    assert float((counts - expected).abs().max()) < 0.04
    assert float((counts - expected).abs().sum()) < 0.25


@pytest.mark.parametrize("training", [True, False])
def test_random_state_and_mode_are_as_before(training: bool) -> None:
    model = make_model("llama").train(training)
    torch.manual_seed(4)
    before = torch.get_rng_state()
    generate(model, NoEnd(), [[5, 9, 3]], SamplingParams(max_tokens=4, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training is training


def test_samples_come_in_the_order_of_the_prompts() -> None:
    model = make_model("llama")
    prompts = [[3 + number % 60] * (1 + number % 5) for number in range(140)]  # more than one batch
    samples = generate(model, NoEnd(), prompts, SamplingParams(max_tokens=2, temperature=0))
    for number in (0, 1, 77, 139):
        alone = generate(
            model, NoEnd(), [prompts[number]], SamplingParams(max_tokens=2, temperature=0)
        )
        assert written(samples[number : number + 1]) == written(alone)


def test_no_seed_gives_new_samples_each_time() -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    torch.manual_seed(4)
    samples = []
    for _ in range(3):
        samples += generate(
            model, NoEnd(), [[5, 9, 3]], SamplingParams(max_tokens=16, temperature=1.0, seed=None)
        )
        torch.manual_seed(4)  # nor does the global state decide
    assert len({tuple(sample.tokens) for sample in samples}) == 3


def test_an_empty_text_is_no_stop() -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None

    def sample(stop: Any) -> Any:
        return generate(
            model, NoEnd(), [[5, 9, 3]], SamplingParams(max_tokens=10, temperature=0, stop=stop)
        )[0]

    free = sample(None)
    assert (len(free.tokens), free.stop_reason) == (10, "length")
    assert sample("") == sample([""]) == sample(["", "never"]) == free
    assert sample(["", free.text[4:6]]) == sample(free.text[4:6]) != free


@pytest.mark.parametrize("stop", [None, "string", "token", []])
def test_transformers_generate_stops_where_ours_does(
    stop: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = make_model("llama")
    model.generation_config.eos_token_id = None
    prompts = [[5, 9, 3], [7, 8, 20, 21]]
    params = SamplingParams(max_tokens=10, temperature=0)
    free = generate(model, NoEnd(), prompts, params)
    model.generation_config.eos_token_id = free[1].tokens[6]
    given = {"string": free[0].text[4:6], "token": [free[0].tokens[3]]}
    params = replace(params, stop=given[stop] if isinstance(stop, str) else stop)
    ours = generate(model, NoEnd(), prompts, params)
    monkeypatch.setattr("lorakit.sampling.generate.decoding_problem", lambda model: "none of ours")
    assert written(generate(model, NoEnd(), prompts, params)) == written(ours)
    assert (written(ours) == written(free)) is (stop == [])
