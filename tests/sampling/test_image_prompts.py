"""Samples of prompts with images are those of transformers' generate, in any company."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from vision import draw_image, make_encoder, make_reference, make_tokenizer, make_vl_model, png

from lorakit.errors import DataError
from lorakit.model.attention import attend_by_document
from lorakit.sampling.generate import generate
from lorakit.sampling.request import Request, read_prompt
from lorakit.sampling.sampler import Sampler
from lorakit.types import EncodedTextChunk, ImageChunk, ModelInput, SamplingParams

OPEN = SamplingParams(max_tokens=24, temperature=0.0, stop=[])


def prompt_of(*parts: str | Any) -> tuple[ModelInput, str, list[Any]]:
    """A prompt as chunks, as text with one placeholder each, and its images."""
    chunks: list[Any] = []
    text, images = "", []
    for part in parts:
        if isinstance(part, str):
            chunks.append(
                EncodedTextChunk(tuple(make_tokenizer().encode(part, add_special_tokens=False)))
            )
            text += part
        else:
            image = ImageChunk(png(part))
            chunks.append(ImageChunk(image.data, "png", make_encoder().count_tokens(image)))
            text += "<|image_pad|>"
            images.append(part)
    return ModelInput(tuple(chunks)), text, images


PROMPTS = [
    prompt_of("a<|vision_start|>", draw_image(1, (48, 32)), "<|vision_end|>How many?"),
    prompt_of("copy: abc\n"),
    prompt_of(draw_image(2, (32, 40)), "x", draw_image(3, (24, 24)), "and then?"),
]


@torch.no_grad()
def by_transformers(model: Any, text: str, images: list[Any]) -> list[int]:
    inputs = make_reference()(text=[text], images=images or None, return_tensors="pt")
    model.model.rope_deltas = None
    out = model.generate(
        **inputs, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    return list(out[0, inputs["input_ids"].shape[1] :].tolist())


def test_greedy_samples_are_those_of_transformers_alone_and_together() -> None:
    model = make_vl_model()
    expected = [by_transformers(model, text, images) for _, text, images in PROMPTS]
    inputs = [model_input for model_input, _, _ in PROMPTS]
    together = generate(model, make_tokenizer(), inputs, OPEN, make_encoder())
    assert [sample.tokens for sample in together] == expected
    for model_input, tokens in zip(inputs, expected, strict=True):
        assert (
            generate(model, make_tokenizer(), [model_input], OPEN, make_encoder())[0].tokens
            == tokens
        )
    assert len({tuple(tokens) for tokens in expected}) == 3


def test_the_same_words_about_other_images_are_another_prompt_and_the_same_are_computed_once() -> (
    None
):
    model = make_vl_model()
    assert attend_by_document(model) is None
    sampler, answers = Sampler(model, make_tokenizer()), {}
    for number, seed in enumerate((1, 2, 1)):
        tokens, shown = read_prompt(
            prompt_of(draw_image(seed, (32, 32)), "What?")[0], make_encoder()
        )
        sampler.add(
            Request(
                tokens,
                OPEN,
                shown=shown,
                done=lambda found, number=number: answers.__setitem__(number, found),
            )
        )
    sampler.step()
    assert sampler.passes.num_forwards == 2
    while sampler.is_busy:
        sampler.step()
    found = [answers[number].sequences[0] for number in range(3)]
    assert found[0].tokens == found[2].tokens and found[0].logprobs != found[1].logprobs


def test_what_cannot_be_shown_is_an_error() -> None:
    model_input = PROMPTS[0][0]
    with pytest.raises(DataError, match="this model takes none"):
        read_prompt(model_input, None)
    wrong = ModelInput((ImageChunk(png(draw_image(1)), "png", 3),))
    with pytest.raises(DataError, match="expected_tokens=3"):
        read_prompt(wrong, make_encoder())
    model = make_vl_model()
    assert attend_by_document(model) is None
    tokens, shown = read_prompt(model_input, make_encoder())
    with pytest.raises(DataError, match="batch_invariant"):
        Sampler(model, make_tokenizer(), batch_invariant=True).add(
            Request(tokens, OPEN, shown=shown)
        )
