"""What routes have in common: who asks, what a body says, how a call becomes a pending request."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from concurrent.futures import Future
from typing import Annotated, Any, TypeVar

import pydantic
from fastapi import Depends, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from lorakit.errors import DataError, LorakitError, TrainingError
from lorakit.service.http.pending import Encode
from lorakit.service.http.state import SequenceBuffer, ServerState, as_future
from lorakit.service.model import Model, Weights

Body = TypeVar("Body", bound=pydantic.BaseModel)
USER = "lorakit.user"  # in a request's scope
MAX_ANSWER_NUMBERS = 1 << 26  # half a gigabyte
MAX_HELD = 1024  # calls of a model that came before those before them
NO_KEY = "this key is not known here; `lorakit serve` names the file of its key"


def refuse_huge(
    weights: Weights, num_of_prompt: int, num_samples: int, max_tokens: int | None, num_best: int
) -> None:
    """Raise DataError where an answer would have more numbers than are sent."""
    limit = weights.engine.base.max_tokens
    longest = min(n for n in (max_tokens, limit, 1 << 20) if n is not None)
    count = num_of_prompt + num_samples * longest * (1 + num_best)
    if count > MAX_ANSWER_NUMBERS:
        raise DataError(
            f"the answer may have {count:,} log-probabilities; {MAX_ANSWER_NUMBERS:,} are sent at"
            " most: set max_tokens"
        )


def status_of(error: BaseException) -> int:
    """The status of an error that a route answers at once: a client's own, or a server's, after
    which it may try again.
    """
    return 400 if isinstance(error, LorakitError) and not isinstance(error, TrainingError) else 503


class TooLarge(Exception):
    """A body over the limit, of which the first bytes were kept."""

    def __init__(self, head: bytes) -> None:
        super().__init__("the body is too large")
        self.head = head


async def state_of(request: Request) -> ServerState:  # async, for else a thread would be asked
    """The server's state."""
    state = request.app.state.lorakit
    assert isinstance(state, ServerState)
    return state


async def user_of(request: Request) -> str:
    """Whose key the request bears. 401 where it is nobody's."""
    user: str | None = request.scope.get(USER)  # of AuthMiddleware, which lets nobody in without
    if user is None:
        raise HTTPException(401, NO_KEY)
    return user


State = Annotated[ServerState, Depends(state_of)]
User = Annotated[str, Depends(user_of)]


async def read_body(request: Request, limit: int, keep: int = 4096) -> bytes:
    """Return the body. Raises TooLarge, when all of it was received: a client that is still
    sending would see a broken pipe.
    """
    parts: list[bytes] = []
    size = 0
    async for part in request.stream():
        if size <= max(limit, keep):
            parts.append(part)
        size += len(part)
    body = b"".join(parts)
    if size > limit:
        raise TooLarge(body[:keep])
    if request.headers.get("content-encoding") == "zstd":
        import zstandard

        try:
            with zstandard.ZstdDecompressor().stream_reader(body) as reader:
                body = reader.read(limit + 1)  # whatever the frame says of its size
        except zstandard.ZstdError as error:
            raise HTTPException(400, f"the body is not zstd: {error}") from error
        if len(body) > limit:
            raise TooLarge(body[:keep])
    return body


async def read_json(request: Request, state: State) -> dict[str, Any]:
    """Return a JSON object. 400 where the body is none."""
    limit = state.max_body_bytes
    try:
        body = json.loads(await read_body(request, limit))
    except TooLarge as error:
        if (ids := _ids_in_head(error.head)) is None:
            raise HTTPException(400, f"the body has more than {limit:,} bytes") from error
        return {**ids, "_too_large": True}
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, f"the body is not JSON: {error}") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body is not a JSON object")
    return body


JsonBody = Annotated[dict[str, Any], Depends(read_json)]


def _ids_in_head(head: bytes) -> dict[str, Any] | None:
    """model_id and seq_id, as far as the beginning of a JSON object names them."""
    model_id = re.search(rb'"model_id"\s*:\s*"([^"\\]+)"', head)
    seq_id = re.search(rb'"seq_id"\s*:\s*(\d+)', head)
    if not model_id or not seq_id:
        return None
    return {"model_id": model_id[1].decode("utf-8", "replace"), "seq_id": int(seq_id[1])}


def parsed(kind: type[Body], body: dict[str, Any]) -> Body | str:
    """Return ``body`` as a ``kind``, or what is wrong with it."""
    try:
        return kind.model_validate(body)
    except pydantic.ValidationError as error:
        return name_problems(error)


def name_problems(error: pydantic.ValidationError | RequestValidationError) -> str:
    """Return which fields are wrong, and how."""
    return "; ".join(f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors())


def accept(
    state: ServerState,
    user: str,
    model_id: str,
    seq_id: int,
    start: Callable[[Model], Future[Any]] | str,
    encode: Encode,
) -> JSONResponse:
    """Answer a call of a model at once with its request_id, and start it when those before it were
    started.

    Args:
        start: makes the call's future; or what is wrong with the call, which then fails when its
            turn comes.
    """
    if state.is_others(model_id, user):
        raise HTTPException(404, f"there is no model {model_id}")
    order = state.order.get(model_id)
    if (
        order is not None
        and len(order.held) >= MAX_HELD
        and seq_id > order.next_seq_id
        and seq_id not in order.held
    ):
        raise HTTPException(
            429,
            f"{MAX_HELD:,} calls wait for call {order.next_seq_id} of {model_id}; send that one"
            " first",
        )
    pending, is_new = state.pending.open(f"{model_id}:{seq_id}", user)
    answer = JSONResponse({"request_id": pending.request_id, "model_id": model_id})
    if not is_new:
        return answer
    if (model := state.service.trained.get(model_id)) is None:
        state.pending.fail(
            pending,
            f"there is no model {model_id} (any more): its session ended, or the server was"
            " started anew; continue from its last save_state with"
            " create_training_client_from_state_with_optimizer",
        )
        return answer
    if (session := state.session(model_id.partition(":")[0], user)) is not None:
        session.model_ids.add(model_id)

    def dispatch() -> None:
        if isinstance(start, str):
            state.pending.fail(pending, start)
        else:
            state.pending.settle(pending, as_future(lambda: start(model)), encode)

    order = state.order.setdefault(model_id, SequenceBuffer())
    if seq_id < order.next_seq_id:
        state.pending.fail(
            pending,
            f"call {seq_id} was done before, and its result is not known any more",
            "server",
        )
    else:
        order.put(seq_id, dispatch)
    return answer
