"""OpenAI's completions over any base or adapter: ``model`` is a served name, or the
``tinker://`` path of a checkpoint.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.exceptions import HTTPException as StarletteHTTPException

from lorakit.data.render.tokenizer import Encoder
from lorakit.errors import DataError
from lorakit.sampling.request import SampledSequence
from lorakit.sampling.stop_condition import stop_strings
from lorakit.sampling.text_stream import TextStream
from lorakit.service.http.dependencies import State, User, refuse_huge, status_of
from lorakit.service.http.openai_requests import Asked, ChatCompletion, Completion, read_messages
from lorakit.service.http.state import ServerState, as_future
from lorakit.service.model import Weights
from lorakit.types import ModelInput, Sample, SampleResponse, SamplingParams

router = APIRouter(prefix="/v1", tags=["openai"])
NOTHING = Sample([], "", "length", [], [])  # what max_tokens=0 generates
POLL_SECONDS = 1.0  # for clients that are gone
MAX_KNOWN = 32  # adapters that are held for it


class _Token(NamedTuple):
    """A token of a stream, its log-probabilities, and where in the text of all tokens it begins."""

    sample: Sample
    offset: int


@dataclass
class _Choice:
    """One completion as it comes."""

    index: int
    prompt: ModelInput
    stream: TextStream
    text: str = ""
    offset: int = 0  # of the next token in the text of all tokens

    def name(self, row: SampledSequence, tokenizer: Any) -> _Token:
        """The last token of ``row``, and where it begins."""
        token = _Token(
            Sample(row.tokens[-1:], "", "", row.logprobs[-1:], row.best[-1:]), self.offset
        )
        self.offset += len(tokenizer.decode(row.tokens[-1:]))
        return token


@dataclass
class _Job:
    """What one HTTP request asks: the completions of its prompts."""

    weights: Weights
    prompts: list[ModelInput]
    params: SamplingParams
    n: int
    asked: dict[str, Any]
    says_logprobs: bool = False  # of each token
    id: str = field(default_factory=lambda: secrets.token_hex(12))
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def tokenizer(self) -> Any:
        return self.weights.engine.base.tokenizer


@router.get("/models")
async def list_models(state: State, user: User) -> dict[str, Any]:
    """The served names."""
    return {"object": "list", "data": [_describe(name) for name in state.service.models]}


@router.get("/models/{model:path}")
async def get_model(model: str, state: State, user: User) -> dict[str, Any]:
    """One of them."""
    if model not in state.service.models:
        raise HTTPException(404, f"there is no model {model!r}")
    return _describe(model)


@router.post("/completions", response_model=None)
async def completions(
    body: Completion, request: Request, state: State, user: User
) -> JSONResponse | StreamingResponse:
    """Continue text or tokens."""
    body.check()
    if body.stream and body.echo:
        raise DataError("not offered here: echo of a stream")
    weights = await _weights(state, user, body.model)
    encoder = Encoder(weights.engine.base.tokenizer)
    given: Any = body.prompt if isinstance(body.prompt, list) else [body.prompt]
    if given and isinstance(given[0], int):
        given = [given]
    prompts = [
        ModelInput.from_ints(encoder.encode_prompt(one) if isinstance(one, str) else one)
        for one in given
    ]
    asked = {
        "num_best": body.logprobs or 0,
        "scores_prompt": body.echo and body.logprobs is not None,
    }
    params = body.params(16 if body.max_tokens is None else body.max_tokens)
    job = _Job(weights, prompts, params, body.n, asked, body.logprobs is not None)

    def whole(choice: _Choice, sample: Sample, response: SampleResponse) -> dict[str, Any]:
        echoed = choice.prompt.to_ints() if body.echo else []
        logprobs = None
        if body.logprobs is not None:
            of_prompt = response.prompt_logprobs or [None] * len(echoed)
            before = list(zip(echoed, of_prompt, strict=True))
            logprobs = _named_logprobs(job, sample, before, has_best=bool(body.logprobs))
        return {
            "index": choice.index,
            "text": (job.tokenizer.decode(echoed) if body.echo else "") + sample.text,
            "logprobs": logprobs,
            "finish_reason": sample.stop_reason,
        }

    def piece(
        choice: _Choice, text: str, reason: str | None, token: _Token | None
    ) -> dict[str, Any]:
        logprobs = None
        if body.logprobs is not None and token is not None:
            logprobs = _named_logprobs(
                job, token.sample, has_best=bool(body.logprobs), offset=token.offset
            )
        return {"index": choice.index, "text": text, "logprobs": logprobs, "finish_reason": reason}

    return await _answer(state, request, body, job, "text_completion", "cmpl", whole, piece)


@router.post("/chat/completions", response_model=None)
async def chat_completions(
    body: ChatCompletion, request: Request, state: State, user: User
) -> JSONResponse | StreamingResponse:
    """Answer a conversation, by the model's chat template."""
    body.check()
    weights = await _weights(state, user, body.model)
    tokenizer = weights.engine.base.tokenizer
    if not getattr(tokenizer, "chat_template", None):
        raise DataError(f"{body.model} has no chat template; use /v1/completions")
    prompt = await asyncio.to_thread(
        read_messages, body.messages, Encoder(tokenizer), weights.engine.base.images
    )
    max_tokens = (
        body.max_completion_tokens if body.max_completion_tokens is not None else body.max_tokens
    )
    asked = {"num_best": max(1, body.top_logprobs) if body.logprobs else 0}
    job = _Job(weights, [prompt], body.params(max_tokens), body.n, asked, body.logprobs)

    def logprobs(sample: Sample | None) -> dict[str, Any] | None:
        if not body.logprobs or sample is None:
            return None
        return {"content": _chat_logprobs(job, sample, body.top_logprobs)}

    def whole(choice: _Choice, sample: Sample, response: SampleResponse) -> dict[str, Any]:
        return {
            "index": choice.index,
            "message": {"role": "assistant", "content": sample.text},
            "logprobs": logprobs(sample),
            "finish_reason": sample.stop_reason,
        }

    def piece(
        choice: _Choice, text: str, reason: str | None, token: _Token | None
    ) -> dict[str, Any]:
        return {
            "index": choice.index,
            "delta": {} if reason else {"role": "assistant", "content": text},
            "logprobs": logprobs(token.sample if token else None),
            "finish_reason": reason,
        }

    return await _answer(state, request, body, job, "chat.completion", "chatcmpl", whole, piece)


# ---- pieces


def _describe(model: str) -> dict[str, Any]:
    return {"id": model, "object": "model", "created": 0, "owned_by": "lorakit"}


# of a stream: text, why it ends, the token itself
_Piece = Callable[[_Choice, str, str | None, _Token | None], dict[str, Any]]


async def _weights(state: ServerState, user: str, model: str) -> Weights:
    """What ``model`` names; read once for each user."""
    is_path = model.startswith("tinker://")
    # one that was written over is another
    made = state.service.checkpoints.find(model, user).created if is_path else ""
    name = f"openai:{user}:{model}:{made}"
    _, read = state.samplers.get(name, (user, None))
    if read is None or (read.done() and read.exception()):
        if model not in state.service.models and not is_path:
            raise HTTPException(
                404, f"there is no model {model!r}; there are: {', '.join(state.service.models)}"
            )
        options = {"path": model} if is_path else {"base_model": model}
        known = [key for key in state.samplers if key.startswith("openai:")]
        for old in known[: max(0, len(known) + 1 - MAX_KNOWN)]:
            del state.samplers[old]
        read = as_future(lambda: state.service.weights(owner=user, **options))
        state.samplers[name] = (user, read)
    weights = await asyncio.wrap_future(read)
    assert isinstance(weights, Weights)
    return weights


async def _answer(
    state: ServerState,
    request: Request,
    body: Asked,
    job: _Job,
    kind: str,
    prefix: str,
    whole: Callable[[_Choice, Sample, SampleResponse], dict[str, Any]],
    piece: _Piece,
) -> JSONResponse | StreamingResponse:
    state.refuse_too_many(len(job.prompts))
    num_prompt, num_best = sum(prompt.length for prompt in job.prompts), int(job.asked["num_best"])
    refuse_huge(job.weights, num_prompt, len(job.prompts) * job.n, job.params.max_tokens, num_best)
    head = {"id": f"{prefix}-{job.id}", "created": job.created, "model": body.model}
    if body.stream:
        include_usage = bool((body.stream_options or {}).get("include_usage"))
        name = kind if kind == "text_completion" else f"{kind}.chunk"
        return StreamingResponse(
            _events(state, job, {**head, "object": name}, piece, include_usage=include_usage),
            media_type="text/event-stream",
        )
    futures = _start(state, job, None)
    responses = await _all(request, [future for _, future in futures])
    choices = [
        whole(choice, sample, response)
        for (asked, _), response in zip(futures, responses, strict=True)
        for choice, sample in zip(asked, response.sequences or [NOTHING] * job.n, strict=True)
    ]
    generated = sum(len(sample.tokens) for response in responses for sample in response.sequences)
    return JSONResponse(
        {**head, "object": kind, "choices": choices, "usage": _usage(job, generated)}
    )


async def _all(request: Request, futures: list[Future[Any]]) -> list[SampleResponse]:
    """Wait for all, or for the first error; a client that disconnects ends the generation, as
    an error does.
    """
    waiting = {asyncio.ensure_future(asyncio.wrap_future(future)) for future in futures}
    try:
        while waiting:
            done, waiting = await asyncio.wait(
                waiting, timeout=POLL_SECONDS, return_when=asyncio.FIRST_EXCEPTION
            )
            for error in [one.exception() for one in done]:
                if error is not None:
                    raise error
            if waiting and await request.is_disconnected():
                raise HTTPException(499, "the client is gone")
        return [future.result() for future in futures]
    finally:
        for one in waiting:
            one.cancel()
        for future in futures:
            future.cancel()


def _start(
    state: ServerState, job: _Job, each: Callable[[_Choice, SampledSequence], None] | None
) -> list[tuple[list[_Choice], Future[Any]]]:
    """Ask for each prompt's completions; ``each`` gets every token, in the engine's thread."""
    stop, found = stop_strings(job.params), []
    for number, prompt in enumerate(job.prompts):
        choices = [
            _Choice(number * job.n + i, prompt, TextStream(job.tokenizer, stop))
            for i in range(job.n)
        ]

        def tell(row: SampledSequence, choices: list[_Choice] = choices) -> None:
            assert each is not None
            each(choices[row.number], row)

        future = state.service.sample(
            job.weights, prompt, job.params, job.n, each=tell if each else None, **job.asked
        )
        state.completions.add(future)
        future.add_done_callback(state.completions.discard)
        found.append((choices, future))
    return found


async def _events(
    state: ServerState, job: _Job, head: dict[str, Any], piece: _Piece, *, include_usage: bool
) -> AsyncIterator[str]:
    """Server-sent events, a piece of text each; a client that disconnects ends the generation."""
    loop = asyncio.get_running_loop()
    queue = asyncio.Queue[tuple[str, Any, str | None, _Token | None]]()
    num_generated = 0

    def on_token(choice: _Choice, row: SampledSequence) -> None:
        if row.stop_reason:  # what was held back, up to the stop string
            text = row.sample().text[len(choice.text) :]
        else:
            text = choice.stream.add(row.tokens)
        choice.text += text
        token = choice.name(row, job.tokenizer) if job.says_logprobs else None
        loop.call_soon_threadsafe(queue.put_nowait, (text, choice, row.stop_reason or None, token))

    def on_done(future: Future[Any]) -> None:
        error = DataError("it was cancelled") if future.cancelled() else future.exception()
        if error is not None:
            loop.call_soon_threadsafe(queue.put_nowait, ("", error, None, None))

    left = len(job.prompts) * job.n
    started = _start(state, job, on_token)
    futures = [future for _, future in started]
    for future in futures:
        future.add_done_callback(on_done)
    if job.params.max_tokens == 0:  # there will be no token
        left = 0
        for choice in (choice for choices, _ in started for choice in choices):
            yield _event({**head, "choices": [piece(choice, "", "length", None)]})
    try:
        while left:
            text, choice, reason, token = await queue.get()
            if isinstance(choice, BaseException):
                yield _event({"error": _error_body(str(choice), status_of(choice))})
                return
            num_generated += 1
            if text or token is not None:
                yield _event({**head, "choices": [piece(choice, text, None, token)]})
            if reason:
                left -= 1
                yield _event({**head, "choices": [piece(choice, "", reason, None)]})
        if include_usage:
            yield _event({**head, "choices": [], "usage": _usage(job, num_generated)})
        yield "data: [DONE]\n\n"
    finally:
        for future in futures:
            future.cancel()


def _event(body: dict[str, Any]) -> str:
    return f"data: {json.dumps(body)}\n\n"


def _usage(job: _Job, generated: int) -> dict[str, int]:
    prompt = sum(prompt.length for prompt in job.prompts)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": generated,
        "total_tokens": prompt + generated,
    }


def _named_logprobs(
    job: _Job,
    sample: Sample,
    before: Sequence[tuple[int, float | None]] = (),
    *,
    has_best: bool,
    offset: int = 0,
) -> dict[str, Any]:
    """Tokens as text, with their log-probabilities, and where in the text they begin."""
    tokens = [*(token for token, _ in before), *sample.tokens]
    logprobs = [*(logprob for _, logprob in before), *(sample.logprobs or ())]
    best: list[Any] = [None] * len(before)
    best += sample.topk_logprobs or [None] * len(sample.tokens)
    texts = [job.tokenizer.decode([token]) for token in tokens]
    named = [
        None if row is None else {job.tokenizer.decode([token]): value for token, value in row}
        for row in best
    ]
    return {
        "tokens": texts,
        "token_logprobs": logprobs,
        "top_logprobs": named if has_best else None,
        "text_offset": list(itertools.accumulate(map(len, texts[:-1]), initial=offset)),
    }


def _chat_logprobs(job: _Job, sample: Sample, num_best: int) -> list[dict[str, Any]]:
    def named(token: int, logprob: float) -> dict[str, Any]:
        text = job.tokenizer.decode([token])
        return {"token": text, "logprob": logprob, "bytes": list(text.encode())}

    rows = zip(sample.tokens, sample.logprobs or (), sample.topk_logprobs or (), strict=True)
    return [
        {**named(token, logprob), "top_logprobs": [named(*one) for one in best[:num_best]]}
        for token, logprob, best in rows
    ]


def error_response(error: StarletteHTTPException) -> JSONResponse:
    """An error in OpenAI's shape."""
    return JSONResponse(
        {"error": _error_body(str(error.detail), error.status_code)}, status_code=error.status_code
    )


def _error_body(message: str, status: int) -> dict[str, Any]:
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"message": message, "type": kind, "param": None, "code": status}
