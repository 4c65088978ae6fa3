"""The bundled vision-language model sees: its answers to questions held out depend on the
picture.
"""

from __future__ import annotations

import random
from collections import Counter
from typing import Any

import pytest
import torch
from scenes import Question, draw_question
from tiny_vl import make_config
from vision import png

from lorakit.data.images import ImageEncoder
from lorakit.model.load import (
    BUNDLED,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from lorakit.sampling.generate import generate
from lorakit.types import ImageChunk, ModelInput, SamplingParams

NUM_QUESTIONS = 400


@pytest.fixture(scope="module")
def parts() -> tuple[Any, Any, ImageEncoder]:
    tokenizer, config = load_tokenizer("tiny-vl"), load_config("tiny-vl")
    return load_model("tiny-vl"), tokenizer, ImageEncoder(load_image_processor("tiny-vl"), config)


def prompt_of(question: Question, tokenizer: Any, encoder: ImageEncoder) -> ModelInput:
    content = [
        *({"type": "image"} for _ in question.images),
        {"type": "text", "text": question.text},
    ]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    chunks = [ImageChunk(png(image)) for image in question.images]
    counted = [ImageChunk(chunk.data, "png", encoder.count_tokens(chunk)) for chunk in chunks]
    return encoder.place(tokenizer.encode(text, add_special_tokens=False), counted)


def share_right(parts: tuple[Any, Any, ImageEncoder], questions: list[Question]) -> float:
    model, tokenizer, encoder = parts
    prompts = [prompt_of(question, tokenizer, encoder) for question in questions]
    samples = generate(
        model, tokenizer, prompts, SamplingParams(max_tokens=12, temperature=0.0), encoder
    )
    return sum(s.text == q.answer for s, q in zip(samples, questions, strict=True)) / len(questions)


def test_it_answers_held_out_questions_and_by_chance_where_it_sees_nothing(
    parts: tuple[Any, Any, ImageEncoder],
) -> None:
    draw = random.Random(2026)  # no seed of pretraining
    questions = [draw_question(draw) for _ in range(NUM_QUESTIONS)]
    assert share_right(parts, questions) >= 0.9
    chance = sum(question.chance for question in questions) / len(questions)
    assert share_right(parts, [question.blanked() for question in questions]) <= chance + 0.05


def test_answers_are_equally_likely_so_that_whoever_does_not_look_guesses() -> None:
    draw = random.Random(1)
    answers: dict[str, Counter[str]] = {}
    for _ in range(6000):
        question = draw_question(draw)
        answers.setdefault(question.kind, Counter())[question.answer] += 1
    for kind, counted in answers.items():
        (_, most), *_ = counted.most_common(1)
        assert (
            most / counted.total()
            < {"color": 0.2, "shape": 0.2, "count": 0.29, "where": 0.29, "which": 0.54}[kind]
        )


def test_it_is_what_the_script_makes_with_widths_that_no_loader_can_mistake(
    parts: tuple[Any, Any, ImageEncoder],
) -> None:
    model, tokenizer, _ = parts
    config, made = model.config, make_config(tokenizer)
    assert (
        config.text_config.to_dict().items()
        >= {
            name: value
            for name, value in made.text_config.to_dict().items()
            if name in ("hidden_size", "moe_intermediate_size")
        }.items()
    )
    widths = {
        config.text_config.hidden_size,
        config.text_config.moe_intermediate_size,
        2 * config.text_config.moe_intermediate_size,
    }
    assert len(widths) == 3 and 2.5e6 < sum(p.numel() for p in model.parameters()) < 3.5e6
    size = sum(file.stat().st_size for file in BUNDLED["tiny-vl"].iterdir())
    assert size < 7e6 and all(bool(torch.isfinite(p).all()) for p in model.parameters())
