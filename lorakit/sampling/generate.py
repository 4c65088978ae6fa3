"""Generate from a model for a list of prompts: by our sampler, or by transformers where a model
is of another kind.
"""

from __future__ import annotations

import contextlib
import functools
import logging
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.data.images import ImageEncoder
from lorakit.errors import ConfigError
from lorakit.model.attention import attending_by_document
from lorakit.sampling.check import decoding_problem
from lorakit.sampling.request import Request, read_prompt
from lorakit.sampling.sampler import Sampler
from lorakit.sampling.stop_condition import StopCondition, end_token_ids
from lorakit.types import ModelInput, Sample, SamplingParams

log = logging.getLogger("lorakit")

MAX_BATCH = 128
Prompt = Sequence[int] | ModelInput


def generate(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    images: ImageEncoder | None = None,
) -> list[Sample]:
    """Return one Sample for each of ``prompts``: token ids, or inputs with images, which ``images``
    encodes.

    Temperature 0 is greedy. The global random state and the model's mode are as before. The same
    ``seed`` gives the same samples, whatever else is sampled with them, and None gives new ones.
    """
    if not prompts:
        return []
    was_training = model.training
    model.eval()
    try:
        with _uncompiled(model), attending_by_document(model) as problem:
            if (problem := problem or decoding_problem(model)) is None:
                return _generate_in_rows(model, tokenizer, prompts, params, images)
        if any(isinstance(prompt, ModelInput) and prompt.images for prompt in prompts):
            raise ConfigError(f"prompts with images cannot be sampled from this model: {problem}")
        log.debug("sampling with transformers' generate: %s", problem)
        plain = [read_prompt(prompt, None)[0] for prompt in prompts]
        with _uncompiled(model), _seeded(params.seed, model), torch.no_grad():
            return _generate_padded(model, tokenizer, plain, params)
    finally:
        model.train(was_training)


def _generate_in_rows(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Prompt],
    params: SamplingParams,
    images: ImageEncoder | None,
) -> list[Sample]:
    """By our own sampler."""
    params = replace(params, seed=secrets.randbits(63) if params.seed is None else params.seed)
    sampler = Sampler(model, tokenizer, max_rows=MAX_BATCH)
    samples: dict[int, Sample] = {}

    def keep(number: int, outcome: Any) -> None:
        samples[number] = outcome.sequences[0]

    for number, prompt in enumerate(prompts):
        tokens, shown = read_prompt(prompt, images)
        sampler.add(
            Request(
                tokens,
                params,
                first_number=number,
                shown=shown,
                done=functools.partial(keep, number),
            )
        )
    while sampler.is_busy:
        sampler.step()
    return [samples[number] for number in range(len(prompts))]


def _generate_padded(
    model: Any, tokenizer: Any, prompts: Sequence[Sequence[int]], params: SamplingParams
) -> list[Sample]:
    """By transformers, for models whose attention or layers are of another kind."""
    samples: dict[int, Sample] = {}
    by_length = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    for start in range(0, len(prompts), MAX_BATCH):
        indices = by_length[start : start + MAX_BATCH]
        given = [list(prompts[index]) for index in indices]
        batch = _generate_batch(model, tokenizer, given, params)
        samples.update(zip(indices, batch, strict=True))
    return [samples[index] for index in range(len(prompts))]


def _uncompiled(model: Any) -> contextlib.AbstractContextManager[Any]:
    """Layers that were compiled for training run as they are: each new length of the cache would
    be compiled anew.
    """
    if any(module._compiled_call_impl for module in model.modules()):
        return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _generate_batch(
    model: Any, tokenizer: Any, prompts: list[list[int]], params: SamplingParams
) -> list[Sample]:
    from transformers import GenerationConfig

    width = max(len(prompt) for prompt in prompts)
    stop = StopCondition(params, tokenizer, end_token_ids(model, tokenizer))
    end_ids = sorted(stop.tokens)
    pad = tokenizer.pad_token_id
    if pad is None:
        pad = end_ids[0] if end_ids else 0
    # Generation continues at the right end, so here, and only here, padding stands on the left,
    # under a mask.
    input_ids = torch.tensor(
        [[pad] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device
    )
    mask = torch.tensor(
        [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device
    )

    def is_stopped(input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        rows = input_ids[:, width:].tolist()
        return torch.tensor([stop.is_reached(row) for row in rows], device=input_ids.device)

    options: dict[str, Any] = {"do_sample": params.temperature > 0}
    if params.temperature > 0:
        top_k = params.top_k if params.top_k > 0 else 0
        options |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": top_k}
    config = GenerationConfig(
        max_new_tokens=params.max_tokens,
        pad_token_id=pad,
        eos_token_id=end_ids or None,
        **options,
    )
    with _without_own_settings(model):
        output = model.generate(
            input_ids=input_ids,
            attention_mask=mask,
            generation_config=config,
            stopping_criteria=[is_stopped] if stop.strings else None,
        )
    return [_finish(stop, row[width:].tolist()) for row in output]


def _finish(stop: StopCondition, tokens: list[int]) -> Sample:
    """Cut a row at what ends it; what generation padded after it goes."""
    for length in range(1, len(tokens) + 1):
        if stop.is_reached(tokens[:length]):
            return Sample(tokens[:length], stop.text(tokens[:length], is_stopped=True), "stop")
    return Sample(tokens, stop.text(tokens, is_stopped=False), "length")


@contextlib.contextmanager
def _without_own_settings(model: Any) -> Iterator[None]:
    """Put the model's generation config aside: transformers takes from it whatever ours leaves
    open, a repetition penalty, say.
    """
    from transformers import GenerationConfig

    models = [model] if not hasattr(model, "get_base_model") else [model, model.get_base_model()]
    before = [one.generation_config for one in models]
    for one in models:
        one.generation_config = GenerationConfig()
    try:
        yield
    finally:
        for one, config in zip(models, before, strict=True):
            one.generation_config = config


@contextlib.contextmanager
def _seeded(seed: int | None, model: Any) -> Iterator[None]:
    """Draw from a random state of our own: sampling leaves that of the training as it is."""
    devices = [model.device] if model.device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed if seed is not None else secrets.randbits(63))
        yield
