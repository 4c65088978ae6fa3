"""Routes that sample."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from typing import Any

from fastapi import APIRouter, HTTPException
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from lorakit.errors import DataError, LorakitError
from lorakit.service.database import SamplerRow
from lorakit.service.http import codec
from lorakit.service.http.dependencies import JsonBody, State, User, parsed, refuse_huge
from lorakit.service.http.pending import encode_sample
from lorakit.service.http.state import EPHEMERAL, ServerState, as_future, chained
from lorakit.service.model import Weights
from lorakit.types import TensorData

router = APIRouter(prefix="/api/v1", tags=["sampling"])


class CreateSamplingSession(BaseModel):
    session_id: str
    sampling_session_seq_id: int
    base_model: str | None = None
    model_path: str | None = None


class Sample(BaseModel):
    prompt: dict[str, Any]
    sampling_params: dict[str, Any] = {}
    num_samples: int = 1
    sampling_session_id: str | None = None
    seq_id: int | None = None
    base_model: str | None = None
    model_path: str | None = None
    prompt_logprobs: bool | None = None
    topk_prompt_logprobs: int = 0
    topk_sample_logprobs: int = 0
    target_prompt_logprobs: dict[str, Any] | None = None
    prompt_alt_tokens_k: int = 0
    prompt_logprobs_last_n: int | None = None
    record_stability_info: bool | None = None


@router.post("/create_sampling_session")
async def create_sampling_session(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Name what is sampled from. A checkpoint that cannot be read fails the samples."""
    body = parsed(CreateSamplingSession, given)
    if isinstance(body, str):
        raise HTTPException(400, body)
    if (session := state.session(body.session_id, user)) is None:
        raise HTTPException(404, f"there is no session {body.session_id}; make a new ServiceClient")
    sampler_id = f"{session.id}:sample:{body.sampling_session_seq_id}"
    if sampler_id not in state.samplers:
        base_of = state.service.checkpoints.base_of
        try:
            base_model = body.base_model or base_of(body.model_path or "", user)
        except LorakitError as error:
            raise HTTPException(404, str(error)) from error
        future = state.in_background(
            lambda: state.service.weights(base_model=base_model, path=body.model_path, owner=user)
        )
        state.add_sampler(
            session, sampler_id, future, base_model=base_model, model_path=body.model_path
        )
    return JSONResponse({"sampling_session_id": sampler_id})


@router.get("/samplers/{sampler_id}")
async def get_sampler(sampler_id: str, state: State, user: User) -> dict[str, Any]:
    """What a sampler samples from."""
    row = state.database.get(SamplerRow, sampler_id)
    if row is None or row.owner != user:
        raise HTTPException(404, f"there is no sampler {sampler_id}")
    path = None if row.model_path == EPHEMERAL else row.model_path
    return {"sampler_id": row.id, "base_model": row.base_model, "model_path": path}


@router.post("/asample")
async def asample(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Generate completions of a prompt."""
    state.refuse_too_many()
    body = parsed(Sample, given)
    session_id, seq_id = given.get("sampling_session_id"), given.get("seq_id")
    has_ids = isinstance(session_id, str) and isinstance(seq_id, int)
    if isinstance(body, str) and not has_ids:
        raise HTTPException(400, body)
    request_id = f"{session_id}:{seq_id}" if has_ids else f"sample:{secrets.token_hex(12)}"
    pending, is_new = state.pending.open(request_id, user)
    if is_new:
        if isinstance(body, str):
            state.pending.fail(pending, body)
        else:
            future = as_future(lambda: _sample(state, user, body))
            state.pending.settle(pending, future, encode_sample)
    num_samples = given.get("num_samples", 1)
    count = num_samples if isinstance(num_samples, int) and 0 < num_samples <= 100_000 else 1
    sequence_ids = [f"{request_id}:{number}" for number in range(count)]
    return JSONResponse({"request_id": request_id, "sample_sequence_ids": sequence_ids})


def _sample(state: ServerState, user: str, body: Sample) -> Future[Any]:
    if body.sampling_session_id is not None:
        weights = state.weights(body.sampling_session_id, user)
        state.session(body.sampling_session_id.partition(":")[0], user)  # it is alive
    else:
        weights = state.service.weights(
            base_model=body.base_model, path=body.model_path, owner=user
        )
    try:
        prompt = codec.model_input_from_json(body.prompt)
        params = codec.sampling_params_from_json(body.sampling_params)
        wanted = body.target_prompt_logprobs
        targets = None if wanted is None else TensorData(codec.tensor_from_json(wanted))
    except (DataError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise DataError(f"the request cannot be read: {error}") from error
    if body.record_stability_info:
        raise DataError("record_stability_info is not offered: its loss is not public")
    num_positions = len(prompt.text_tokens())
    num_positions += sum(image.expected_tokens or 0 for image in prompt.images)
    num_of_prompt = num_positions * (1 + body.topk_prompt_logprobs + body.prompt_alt_tokens_k)

    def start(loaded: Weights) -> Future[Any]:
        refuse_huge(
            loaded, num_of_prompt, body.num_samples, params.max_tokens, body.topk_sample_logprobs
        )
        return state.service.sample(
            loaded,
            prompt,
            params,
            body.num_samples,
            num_best=body.topk_sample_logprobs,
            scores_prompt=bool(body.prompt_logprobs),
            num_best_of_prompt=body.topk_prompt_logprobs,
            prompt_targets=targets,
            num_alternatives=body.prompt_alt_tokens_k,
            last_n=body.prompt_logprobs_last_n,
        )

    return chained(weights, start)
