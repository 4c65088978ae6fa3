"""Routes that train: models, the verbs, saving and loading."""

from __future__ import annotations

import functools
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import pydantic
from fastapi import APIRouter, HTTPException, Request
from fastapi.responses import JSONResponse
from pydantic import BaseModel, Field

from lorakit.errors import DataError
from lorakit.service.checkpoints import SaveOptions, check_name
from lorakit.service.database import Checkpoint
from lorakit.service.futures import finished
from lorakit.service.http import codec
from lorakit.service.http.dependencies import (
    JsonBody,
    State,
    TooLarge,
    User,
    accept,
    parsed,
    read_body,
    read_json,
)
from lorakit.service.http.pending import encode_forward_backward, encode_json
from lorakit.service.http.state import EPHEMERAL, ServerState, chained
from lorakit.service.model import Model
from lorakit.types import AdamParams

router = APIRouter(prefix="/api/v1", tags=["training"])


class LoraConfig(BaseModel):
    rank: int = Field(default=32, ge=1, le=4096)
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    train_unembed: bool = True
    train_mlp: bool = True
    train_attn: bool = True


class CreateModel(BaseModel):
    session_id: str
    model_seq_id: int
    base_model: str
    user_metadata: dict[str, Any] | None = None
    lora_config: LoraConfig = LoraConfig()
    optimizer_config: dict[str, Any] | None = None


class ModelCall(BaseModel):
    model_id: str
    seq_id: int


class OptimStep(ModelCall):
    adam_params: AdamParams | None = None
    optimizer_params: dict[str, Any] | None = None

    @pydantic.model_validator(mode="before")
    @classmethod
    def _name_adam(cls, given: Any) -> Any:
        """``optimizer_params`` of the type adamw are ``adam_params`` by another name."""
        named = given.get("optimizer_params") if isinstance(given, dict) else None
        if not isinstance(named, dict) or given.get("adam_params") is not None:
            return given
        if (kind := named.get("type", "adamw")) != "adamw":
            raise ValueError(f"optimizer_params {kind!r} are not offered; adamw is")
        adam = {name: value for name, value in named.items() if name != "type"}
        return {**given, "adam_params": adam}


class SaveWeights(ModelCall):
    path: str | None = None
    ttl_seconds: int | None = Field(default=None, ge=0, lt=2**31)
    overwrite: bool = False
    user_metadata: dict[str, str] | None = None
    sampling_session_seq_id: int | None = None
    kind: str = "snapshot"
    age_encryption_recipients: list[str] | None = None

    def refuse_what_is_not_offered(self) -> None:
        """Raise DataError for what would be ignored."""
        if self.age_encryption_recipients:
            raise DataError(
                "age_encryption_recipients are not offered: files are written as they are"
            )
        if self.kind != "snapshot":
            raise DataError(
                f"kind={self.kind!r} is not offered; snapshot is: make a new sampling client for"
                " new weights"
            )


class LoadWeights(BaseModel):
    path: str
    optimizer: bool = False
    model_id: str | None = None
    seq_id: int | None = None
    session_id: str | None = None
    model_seq_id: int | None = None
    base_model: str | None = None
    user_metadata: dict[str, Any] | None = None
    optimizer_config: dict[str, Any] | None = None
    weights_access_token: str | None = None


class GetInfo(BaseModel):
    model_id: str


@router.post("/create_model")
async def create_model(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Make a new adapter. Its id is ``{session_id}:train:{model_seq_id}``."""
    body = parsed(CreateModel, given)
    if isinstance(body, str):
        raise HTTPException(400, body)

    def start(model_id: str) -> Future[Any]:
        _refuse_optimizer(body.optimizer_config)
        lora = body.lora_config
        return state.service.create_model(
            model_id,
            body.base_model,
            rank=lora.rank,
            seed=lora.seed,
            train_attn=lora.train_attn,
            train_mlp=lora.train_mlp,
            train_unembed=lora.train_unembed,
            owner=user,
            user_metadata=body.user_metadata,
        )

    facts = {"type": "create_model"}
    return _make_model(state, user, body.session_id, body.model_seq_id, start, facts)


def _make_model(
    state: ServerState,
    user: str,
    session_id: str,
    model_seq_id: int,
    start: Callable[[str], Future[Any]],
    facts: dict[str, Any],
) -> JSONResponse:
    session = state.session(session_id, user)
    model_id = f"{session_id}:train:{model_seq_id}"
    pending, is_new = state.pending.open(f"{model_id}:create", user)
    if is_new and session is None:
        state.pending.fail(
            pending, f"there is no session {session_id} (any more); make a new ServiceClient"
        )
    elif is_new and session is not None:
        session.model_ids.add(model_id)
        made = state.in_background(lambda: start(model_id))
        made.add_done_callback(lambda done: state.drop_if_ended(session, model_id))
        state.pending.settle(
            pending, made, lambda model: encode_json({"model_id": model.id, **facts})
        )
    return JSONResponse({"request_id": pending.request_id})


@router.post("/unload_model")
async def unload_model(body: GetInfo, state: State, user: User) -> dict[str, Any]:
    """Free an adapter, as older SDKs ask for it."""
    _own_model(state, body.model_id, user)
    pending, _ = state.pending.open(f"{body.model_id}:unload", user)
    state.drop_model(body.model_id)
    answer = {"model_id": body.model_id, "type": "unload_model"}
    state.pending.settle(pending, finished(answer), encode_json)
    return {"request_id": pending.request_id, "model_id": body.model_id}


@router.post("/get_info")
async def get_info(body: GetInfo, state: State, user: User) -> dict[str, Any]:
    """Facts about a model under training, and what it has cost so far."""
    model = _own_model(state, body.model_id, user)
    usage = state.service.usage(model)
    data = {
        "arch": model.engine.base.model.config.model_type,
        "model_name": model.base_model,
        "tokenizer_id": model.base_model,
    }
    return {
        "type": "get_info",
        "model_data": data,
        "model_id": model.id,
        "model_name": model.base_model,
        "is_lora": True,
        "lora_rank": model.lora.get("rank"),
        "optimizer_config": {"type": "adamw"},
        "usage": {"tokens": usage.tokens, "seconds": usage.seconds, "calls": usage.calls},
    }


@router.post("/forward_backward")
async def forward_backward(request: Request, state: State, user: User) -> JSONResponse:
    """Add a loss's gradient, or only compute it. Protobuf, or the JSON of older SDKs."""
    return await _forward_backward(request, state, user, forward_only=False)


@router.post("/forward")
async def forward(request: Request, state: State, user: User) -> JSONResponse:
    """Compute a loss without gradient, as older SDKs ask for it."""
    return await _forward_backward(request, state, user, forward_only=True)


async def _forward_backward(
    request: Request, state: ServerState, user: str, *, forward_only: bool
) -> JSONResponse:
    if "json" in request.headers.get("content-type", "json"):
        body = await read_json(request, state)
        _require_ids(body)
        if body.get("_too_large"):
            return accept(state, user, body["model_id"], body["seq_id"], _over(state), encode_json)
        call = codec.read_forward_backward_json(body, forward_only=forward_only)
    else:
        try:
            call = codec.read_forward_backward(await read_body(request, state.max_body_bytes))
        except TooLarge as error:
            if (ids := codec.peek_ids(error.head)) is None:
                raise HTTPException(
                    400, "the body is too large, and does not begin with model_id and seq_id"
                ) from error
            return accept(state, user, *ids, _over(state), encode_json)
        except DataError as error:
            raise HTTPException(400, str(error)) from error
        _require_ids({"model_id": call.model_id, "seq_id": call.seq_id})

    def start(model: Model) -> Future[Any]:
        return state.service.forward_backward(
            model,
            call.data(),
            call.loss_fn,
            call.loss_fn_config,
            needs_gradient=not (call.forward_only or forward_only),
        )

    return accept(state, user, call.model_id, call.seq_id, start, encode_forward_backward)


@router.post("/optim_step")
async def optim_step(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Make one step of AdamW."""

    def start(body: OptimStep, model: Model) -> Future[Any]:
        return state.service.optim_step(model, body.adam_params or AdamParams())

    return _model_call(state, user, given, OptimStep, start, lambda found: {"metrics": found})


@router.post("/save_weights")
async def save_weights(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Save weights and optimiser."""
    return _save(state, user, given, "weights", "save_weights")


@router.post("/save_weights_external")
async def save_weights_external(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Save weights as a PEFT folder to download."""
    return _save(state, user, given, "external_weights", "save_weights_external")


@router.post("/save_weights_for_sampler")
async def save_weights_for_sampler(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Save weights to sample from, by name; or hold them in memory for a sampling session."""
    if given.get("path") is not None:
        return _save(state, user, given, "sampler_weights", "save_weights_for_sampler")

    def start(call: SaveWeights, model: Model) -> Future[Any]:
        call.refuse_what_is_not_offered()
        session = state.session(model.id.partition(":")[0], user)
        if session is None or call.sampling_session_seq_id is None:
            raise DataError("give a path, or a sampling_session_seq_id of a session that is open")
        sampler_id = f"{session.id}:sample:{call.sampling_session_seq_id}"
        future = state.service.snapshot(model)
        state.add_sampler(
            session, sampler_id, future, base_model=model.base_model, model_path=EPHEMERAL
        )
        return chained(future, lambda weights: finished(sampler_id))

    def answer(sampler_id: str) -> dict[str, Any]:
        return {"sampling_session_id": sampler_id, "type": "save_weights_for_sampler"}

    return _model_call(state, user, given, SaveWeights, start, answer)


def _save(
    state: ServerState, user: str, given: dict[str, Any], kind: str, route: str
) -> JSONResponse:
    def start(call: SaveWeights, model: Model) -> Future[Any]:
        call.refuse_what_is_not_offered()
        if call.path is None:
            raise DataError("path is missing: the checkpoint's name")
        check_name(call.path)
        return state.service.save(
            model,
            SaveOptions(kind, call.path, call.overwrite, call.ttl_seconds, call.user_metadata),
        )

    def answer(saved: Checkpoint) -> dict[str, Any]:
        return {"path": saved.path, "size_bytes": saved.size_bytes, "type": route}

    return _model_call(state, user, given, SaveWeights, start, answer)


@router.post("/load_weights")
async def load_weights(given: JsonBody, state: State, user: User) -> JSONResponse:
    """Make a model that starts from a checkpoint (``session_id``), or let one continue from it
    (``model_id``).
    """
    body = parsed(LoadWeights, given)
    if isinstance(body, str) and not ("model_id" in given and "seq_id" in given):
        raise HTTPException(400, body)
    if isinstance(body, str) or body.model_id is not None:

        def start(call: LoadWeights, model: Model) -> Future[Any]:
            _refuse_optimizer(call.optimizer_config)
            return state.service.load_state(model, call.path, with_optimizer=call.optimizer)

        def answer(path: str) -> dict[str, Any]:
            return {"path": path, "type": "load_weights"}

        return _model_call(state, user, given, LoadWeights, start, answer)
    if body.session_id is None or body.model_seq_id is None:
        raise HTTPException(
            400, "load_weights needs session_id and model_seq_id, or model_id and seq_id"
        )

    def make(model_id: str) -> Future[Any]:
        _refuse_optimizer(body.optimizer_config)
        return state.service.create_model_from(
            model_id,
            body.path,
            base_model=body.base_model,
            with_optimizer=body.optimizer,
            owner=user,
            user_metadata=body.user_metadata,
        )

    facts = {"path": body.path, "type": "load_weights"}
    return _make_model(state, user, body.session_id, body.model_seq_id, make, facts)


# ---- pieces


def _own_model(state: ServerState, model_id: str, user: str) -> Model:
    model = state.service.trained.get(model_id)
    if model is None or model.owner != user:
        raise HTTPException(404, f"there is no model {model_id}")
    return model


def _refuse_optimizer(config: dict[str, Any] | None) -> None:
    """Raise DataError for an optimiser that is not the one there is."""
    if (kind := (config or {}).get("type", "adamw")) != "adamw":
        raise DataError(f"optimizer_config {kind!r} is not offered; adamw is")


def _model_call(
    state: ServerState,
    user: str,
    given: dict[str, Any],
    kind: type[pydantic.BaseModel],
    start: Callable[[Any, Model], Future[Any]],
    answer: Callable[[Any], dict[str, Any]],
) -> JSONResponse:
    """A JSON call that names a model and its place in the model's order; ``answer`` is what is
    given its result.
    """
    _require_ids(given)
    call = _over(state) if given.get("_too_large") else parsed(kind, given)
    begin = call if isinstance(call, str) else functools.partial(start, call)

    def encode(result: Any) -> tuple[str, bytes]:
        return encode_json(answer(result))

    return accept(state, user, given["model_id"], given["seq_id"], begin, encode)


def _require_ids(body: dict[str, Any]) -> None:
    model_id, seq_id = body.get("model_id"), body.get("seq_id")
    has_seq_id = isinstance(seq_id, int) and not isinstance(seq_id, bool) and seq_id >= 1
    if not isinstance(model_id, str) or not model_id or not has_seq_id:
        raise HTTPException(400, "the body names no model_id and seq_id (from 1)")


def _over(state: ServerState) -> str:
    return f"the request has more than {state.max_body_bytes:,} bytes; send fewer Datums at a time"
