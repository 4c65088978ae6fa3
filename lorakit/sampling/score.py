"""How good a model is on a data set: loss, perplexity, exact match."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from lorakit.data.batch.collate import collate
from lorakit.data.images import ImageEncoder
from lorakit.data.render.tokenizer import Encoder
from lorakit.loss.logprobs import target_logprobs
from lorakit.sampling.generate import generate
from lorakit.sampling.stop_condition import before_stop, stop_strings
from lorakit.types import Datum, ModelInput, Sample, SamplingParams


@dataclass(frozen=True)
class Answer:
    """What the model wrote for a prompt, and what it should have written."""

    prompt: str
    expected: str
    sample: Sample

    @property
    def is_exact(self) -> bool:
        """Whether text and ending are as they should be; a sample cut by length is never exact."""
        return self.sample.text == self.expected and self.sample.stop_reason == "stop"


@torch.no_grad()
def score_loss(
    model: Any,
    datums: Sequence[Datum],
    *,
    pad_token_id: int,
    batch_size: int = 32,
    images: ImageEncoder | None = None,
) -> tuple[float, float]:
    """Return (sum of -weight * logprob, sum of |weight|) over ``datums``."""
    was_training = model.training
    model.eval()
    loss_sum = weight_sum = 0.0
    ordered = sorted(datums, key=len)
    for start in range(0, len(ordered), batch_size):
        batch = collate(
            [[datum] for datum in ordered[start : start + batch_size]], pad_token_id, images
        ).to(model.device)
        loss_sum -= float((batch.weights * target_logprobs(model, batch)).sum())
        weight_sum += batch.weight
    model.train(was_training)
    return loss_sum, weight_sum


def answer_all(
    model: Any,
    tokenizer: Any,
    datums: Sequence[Datum],
    params: SamplingParams,
    progress: Callable[[int], Any] | None = None,
    images: ImageEncoder | None = None,
) -> list[Answer]:
    """Generate from each Datum's prompt (what comes before its first trained token) and pair it
    with its first trained span.
    """
    pairs = [_split(datum) for datum in datums]
    stop = stop_strings(params)
    answers: list[Answer] = []
    for start in range(0, len(pairs), 100):
        chunk = pairs[start : start + 100]
        samples = generate(model, tokenizer, [prompt for prompt, _ in chunk], params, images)
        for (prompt, expected), sample in zip(chunk, samples, strict=True):
            tokens = images.tokens(prompt) if images else prompt.to_ints()
            wanted = _cut(tokenizer, expected, stop)
            answers.append(Answer(tokenizer.decode(tokens), wanted, sample))
        if progress:
            progress(len(chunk))
    return answers


def perplexity(loss: float) -> float:
    """``exp(loss)``; infinite where that overflows."""
    return math.exp(loss) if loss < 700 else math.inf


def _split(datum: Datum) -> tuple[ModelInput, list[int]]:
    trained = datum.weights != 0
    first = int(trained.argmax())
    rest = trained[first:]
    end = first + (int((~rest).argmax()) if not rest.all() else len(rest))
    return datum.model_input.first(first + 1), datum.targets[first:end].tolist()


def _cut(tokenizer: Any, tokens: list[int], stop: Sequence[str]) -> str:
    """The expected text as ``generate`` would return it: without end token and stop string."""
    if tokens and tokens[-1] in Encoder(tokenizer).special_ids:
        tokens = tokens[:-1]
    return before_stop(str(tokenizer.decode(tokens)), stop)
