"""Routes by which a program connects, and gets the results of its requests."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, HTTPException, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from lorakit import __version__
from lorakit.service.http.dependencies import State, User

router = APIRouter(prefix="/api/v1", tags=["connection"])


class CreateSession(BaseModel):
    tags: list[str] | None = None
    user_metadata: dict[str, Any] | None = None
    sdk_version: str = ""
    project_id: str | None = None
    display_name: str | None = None


class Heartbeat(BaseModel):
    session_id: str


class RetrieveFuture(BaseModel):
    request_id: str
    allow_metadata_only: bool = False


class CancelFuture(BaseModel):
    request_id: str | None = None
    request_ids: list[str] = []


@router.get("/healthz")
async def healthz(state: State) -> dict[str, Any]:
    """Whether the server is there and its engines run, and how much waits. Needs no key."""
    problems = state.service.problems()
    status = {"status": "failed", "problems": problems} if problems else {"status": "ok"}
    return {
        **status,
        "version": __version__,
        "open_requests": state.num_waiting,
        "max_waiting": state.max_waiting,
    }


@router.get("/get_server_capabilities")
async def get_server_capabilities(state: State, user: User) -> dict[str, Any]:
    """The models that can be asked for."""
    return {"supported_models": state.service.describe_models()}


@router.post("/client/config")
async def client_config(user: User) -> dict[str, Any]:
    """Flags of the SDK: its own defaults do."""
    return {}


@router.post("/client/dynamic_config")
async def client_dynamic_config(user: User) -> dict[str, Any]:
    """Flags that may change: sampling that nobody waits for is cancelled."""
    return {"sample_cancel_enabled": True}


@router.post("/create_session")
async def create_session(body: CreateSession, state: State, user: User) -> dict[str, Any]:
    """Open a session; it ends without heartbeats, and its adapters are freed."""
    session = state.open_session(
        user, display_name=body.display_name, user_metadata=body.user_metadata or {}
    )
    return {"session_id": session.id}


@router.post("/session_heartbeat")
async def session_heartbeat(body: Heartbeat, state: State, user: User) -> dict[str, Any]:
    """Keep a session. 410 where it has ended."""
    if state.session(body.session_id, user) is None:
        raise HTTPException(410, f"session {body.session_id} has ended")
    return {}


@router.post("/sessions/{session_id}/finish", status_code=204)
async def finish_session(session_id: str, state: State, user: User) -> Response:
    """End a session, and free its adapters."""
    if (session := state.session(session_id, user)) is not None:
        state.end_session(session)
    return Response(status_code=204)


@router.post("/telemetry")
async def telemetry(user: User) -> dict[str, Any]:
    """Accepted and dropped: nothing is kept of it."""
    return {"status": "accepted"}


@router.post("/retrieve_future")
async def retrieve_future(
    body: RetrieveFuture, request: Request, state: State, user: User
) -> Response:
    """Return a request's result. 408: not yet, ask again. 410: not known (any more)."""
    pending = state.pending.find(body.request_id, user)
    if pending is None:
        raise HTTPException(
            410, f"request {body.request_id} is not known; the server may have been started anew"
        )
    answer = await state.pending.wait(pending, state.poll_seconds)
    if answer is None:
        waiting = {"type": "try_again", "request_id": body.request_id, "queue_state": "active"}
        return JSONResponse(waiting, status_code=408)
    accepts_protobuf = "application/x-protobuf" in request.headers.get("accept", "")
    media_type, payload = answer.body(accepts_protobuf=accepts_protobuf)
    return Response(payload, media_type=media_type)


@router.post("/cancel_future")
async def cancel_future(body: CancelFuture, state: State, user: User) -> dict[str, Any]:
    """Give up samples, and other requests that have not begun."""
    wanted = [*body.request_ids, *([body.request_id] if body.request_id else [])]
    pending = [state.pending.find(request_id, user) for request_id in wanted]
    cancelled = [
        p.request_id
        for p in pending
        if p is not None and p.future is not None and p.future.cancel()
    ]
    return {"cancelled": cancelled}
