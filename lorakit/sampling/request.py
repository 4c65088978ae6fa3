"""What is asked of the sampler, and how far it has come."""

from __future__ import annotations

import functools
import hashlib
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from lorakit.data.batch.collate import stack_images
from lorakit.data.images import ImageEncoder
from lorakit.errors import DataError, report
from lorakit.lora.adapter_batch import Adapter
from lorakit.sampling.stop_condition import StopCondition
from lorakit.sampling.token_sampler import SampledTokens, sample_key
from lorakit.types import (
    ImageChunk,
    Images,
    ModelInput,
    Sample,
    SampleResponse,
    SamplingParams,
    TensorData,
)

MAX_ALTERNATIVES = 64  # drawn one after the other, within one step


@dataclass(frozen=True, eq=False)
class Shown:
    """The images of a prompt."""

    images: Images
    grid_positions_3L: torch.Tensor  # time, height and width of each of the prompt's positions
    key: bytes  # the same for the same images

    @functools.cached_property
    def shift(self) -> int:
        """What is added to the places of tokens after the prompt for their time, height and
        width: images take few of these.
        """
        return int(self.grid_positions_3L.max()) + 1 - self.grid_positions_3L.shape[1]


def read_prompt(
    prompt: ModelInput | Sequence[int], encoder: ImageEncoder | None
) -> tuple[list[int], Shown | None]:
    """Return a prompt's tokens, and what it shows. Raises DataError where it has images and they
    cannot be read.
    """
    prompt = prompt if isinstance(prompt, ModelInput) else ModelInput.from_ints(prompt)
    if encoder is None and prompt.images:
        raise DataError("the prompt has an image, and this model takes none")
    if encoder is None or not prompt.images:
        if encoder is not None:
            encoder.check(prompt)
        return prompt.to_ints(), None
    chunks = [
        (
            chunk
            if not isinstance(chunk, ImageChunk) or chunk.expected_tokens is not None
            else ImageChunk(chunk.data, chunk.format, encoder.count_tokens(chunk), name=chunk.name)
        )
        for chunk in prompt.chunks
    ]
    prompt = ModelInput(tuple(chunks))
    encoded = encoder.check(prompt)
    key = hashlib.sha256(
        b"".join(image.patches_PD.tobytes() + str(image.grid).encode() for image in encoded)
    ).digest()
    positions_3L = torch.from_numpy(encoder.positions(prompt, encoded))
    return encoder.tokens(prompt), Shown(stack_images(encoded), positions_3L, key)


@dataclass
class Request:
    """What is asked about one prompt. ``params.max_tokens`` 0 only scores it; None generates as
    far as the model goes.
    """

    prompt: list[int]  # with as many placeholders for each image as it takes positions
    params: SamplingParams
    num_samples: int = 1
    first_number: int = 0  # of the samples, by which their random numbers differ
    adapter: Adapter | None = None
    shown: Shown | None = None
    num_best: int = 0  # candidates to name for each generated token
    scores_prompt: bool = False
    num_best_of_prompt: int = 0
    prompt_targets: TensorData | None = None  # (prompt - 1, K) int64, -1 to skip
    # to draw at each place of the prompt after the first, at the request's temperature
    num_alternatives: int = 0
    # prompt's log-probabilities for only this many of its last tokens; None for all
    last_n: int | None = None
    done: Callable[[SampleResponse | BaseException], Any] | None = None
    each: Callable[[SampledSequence], Any] | None = None  # is called with each new token
    is_cancelled: bool = False  # nobody waits for it any more; may be set from any thread

    def __post_init__(self) -> None:
        if self.params.seed is None:
            self.params = replace(self.params, seed=secrets.randbits(63))

    @property
    def is_of_prompt(self) -> bool:
        """Whether log-probabilities of the prompt are asked for."""
        asked = self.scores_prompt or self.num_best_of_prompt or self.num_alternatives
        return bool(asked) or self.prompt_targets is not None

    def check(self, *, vocab_size: int, max_tokens: int) -> None:
        """Raise DataError with everything that the model cannot take."""
        params, problems = self.params, []
        if not self.prompt:
            problems.append("prompt is empty; give at least one token")
        wrong = [
            (place, token) for place, token in enumerate(self.prompt) if not 0 <= token < vocab_size
        ]
        problems += [
            f"prompt[{place}] is token {token}, and the vocabulary has {vocab_size:,}"
            for place, token in wrong[:1]
        ]
        if len(self.prompt) + (params.max_tokens != 0) > max_tokens:
            problems.append(
                f"prompt has {len(self.prompt):,} tokens, and the model takes {max_tokens:,} with"
                " those that follow"
            )
        for name, least, most in (
            ("num_samples", 1, 100_000),
            ("num_best", 0, vocab_size),
            ("num_best_of_prompt", 0, vocab_size),
            ("num_alternatives", 0, MAX_ALTERNATIVES),
        ):
            value = getattr(self, name)
            if not _is_int(value) or not least <= value <= most:
                problems.append(f"{name}={value} must be a whole number from {least} to {most:,}")
        most = max(1, len(self.prompt) - 1)
        if self.last_n is not None and (not _is_int(self.last_n) or not 1 <= self.last_n <= most):
            problems.append(
                f"prompt_logprobs_last_n={self.last_n} must be from 1 to {most:,}, less than the"
                " prompt has tokens"
            )
        if self.prompt_targets is not None:
            problems += self._target_problems(vocab_size)
        if problems := problems + params_problems(params):
            raise DataError(
                problems[0] if len(problems) == 1 else report("this cannot be sampled:", problems)
            )

    def _target_problems(self, vocab_size: int) -> list[str]:
        targets = self.prompt_targets
        assert targets is not None
        if targets.dtype.kind != "i":
            return [f"target_prompt_logprobs has numbers of {targets.dtype}; tokens they must be"]
        if targets.ndim != 2 or len(targets) != len(self.prompt) - 1:
            return [
                f"target_prompt_logprobs has shape {targets.shape}; ({len(self.prompt) - 1}, K) it"
                " must be"
            ]
        if bool(((targets < -1) | (targets >= vocab_size)).any()):
            return [
                f"target_prompt_logprobs has tokens outside of the vocabulary of {vocab_size:,}"
            ]
        return []


def params_problems(params: SamplingParams) -> list[str]:
    """What is wrong with sampling params by themselves."""
    problems = []
    if params.max_tokens is not None and (not _is_int(params.max_tokens) or params.max_tokens < 0):
        problems.append(f"max_tokens={params.max_tokens} must be a whole number, not negative")
    if not _is_number(params.temperature) or not 0 <= params.temperature < 1e6:
        problems.append(f"temperature={params.temperature} must be at least 0")
    if not _is_number(params.top_p) or not 0 < params.top_p <= 1:
        problems.append(f"top_p={params.top_p} must be more than 0 and at most 1")
    if not _is_int(params.top_k) or params.top_k < -1 or params.top_k == 0 or params.top_k >= 2**31:
        problems.append(f"top_k={params.top_k} must be at least 1, or -1 for all tokens")
    if params.seed is not None and not _is_int(params.seed):
        problems.append(f"seed={params.seed!r} must be a whole number")
    stop = params.stop if isinstance(params.stop, (list, tuple)) else [params.stop]
    if not all(one is None or isinstance(one, str) or _is_int(one) for one in stop) or _is_int(
        params.stop
    ):
        problems.append(
            f"stop={params.stop!r} must be a text, a list of texts, or a list of tokens"
        )
    return problems


def _is_int(value: Any) -> bool:
    return isinstance(value, (int, np.integer)) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float, np.number)) and not isinstance(value, bool)


@dataclass(eq=False)
class RunningRequest:
    """A request that was accepted."""

    request: Request
    stop_condition: StopCondition
    max_tokens: int  # to generate
    samples: list[Sample | None] = field(default_factory=list)
    prompt_logprobs: list[float | None] | None = None
    best_of_prompt: list[list[tuple[int, float]] | None] | None = None
    target_logprobs: TensorData | None = None
    alternatives: tuple[TensorData, TensorData] | None = None

    def finish_if_done(self) -> None:
        """Answer when every sample is there."""
        done = [sample for sample in self.samples if sample is not None]
        if len(done) == len(self.samples):
            of_prompt = self._last(self.prompt_logprobs), self._last(self.best_of_prompt)
            self.answer(SampleResponse(done, *of_prompt, self.target_logprobs, self.alternatives))

    def _last(self, values: list[Any] | None) -> list[Any] | None:
        if values is None or self.request.last_n is None:
            return values
        num_left_out = max(0, len(values) - self.request.last_n)
        return [None] * num_left_out + values[num_left_out:]

    def answer(self, outcome: SampleResponse | BaseException) -> None:
        """Give the answer."""
        if self.request.done is not None:
            self.request.done(outcome)


@dataclass(eq=False)
class SampledSequence:
    """One sample that is being generated."""

    running: RunningRequest
    number: int
    key: int  # of its random numbers
    length: int  # tokens in the cache
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    best: list[list[tuple[int, float]]] = field(default_factory=list)
    stop_reason: str = ""

    @classmethod
    def of(cls, running: RunningRequest, number: int) -> SampledSequence:
        request = running.request
        key = sample_key(request.params.seed or 0, request.first_number + number)
        return cls(running, number, key, len(request.prompt))

    def add(self, token: int, logprob: float, best: list[tuple[int, float]] | None) -> bool:
        """Take a token; return whether it was the last."""
        self.tokens.append(token)
        self.logprobs.append(logprob)
        if best is not None:
            self.best.append(best)
        if self.running.stop_condition.is_reached(self.tokens):
            self.stop_reason = "stop"
        elif len(self.tokens) >= self.running.max_tokens:
            self.stop_reason = "length"
        if self.running.request.each is not None:
            self.running.request.each(self)
        return bool(self.stop_reason)

    def sample(self) -> Sample:
        """What has come of it."""
        text = self.running.stop_condition.text(self.tokens, is_stopped=self.stop_reason == "stop")
        best = self.best if self.running.request.num_best else None
        return Sample(self.tokens, text, self.stop_reason, self.logprobs, best)


def best_of_row(picked: SampledTokens, wanted: list[int]) -> list[list[tuple[int, float]] | None]:
    """The candidates that each row asked for, best first."""
    if picked.best is None:
        return [None] * len(wanted)
    values, tokens = picked.best[0].tolist(), picked.best[1].tolist()
    return [
        list(zip(tokens[i][:num], values[i][:num], strict=True)) if num else None
        for i, num in enumerate(wanted)
    ]
