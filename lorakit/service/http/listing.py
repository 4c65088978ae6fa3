"""Routes that list, describe, delete and hand out what was trained and saved."""

from __future__ import annotations

import asyncio
import contextlib
import datetime
import hashlib
import hmac
import os
import secrets
import tarfile
import tempfile
import time
from collections.abc import Iterator
from typing import IO, Annotated, Any

from fastapi import APIRouter, Depends, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field
from starlette.datastructures import URL

from lorakit.errors import CheckpointError
from lorakit.service.database import Checkpoint, ClientSession, SamplerRow, TrainingRun
from lorakit.service.http.dependencies import State, User
from lorakit.service.http.state import ServerState

router = APIRouter(prefix="/api/v1", tags=["listing"])
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_URL_SECONDS = 3600
_URL_SECRET = secrets.token_bytes(32)  # of this process: URLs end with it
Limit = Annotated[int, Query(ge=1, le=1000)]
Offset = Annotated[int, Query(ge=0, lt=2**31)]


@contextlib.contextmanager
def _or_404() -> Iterator[None]:
    """Answers 404 where a run or a checkpoint that is asked for is not there."""
    try:
        yield
    except CheckpointError as error:
        raise HTTPException(404, str(error)) from error


async def _own_run(run_id: str, state: State, user: User) -> TrainingRun:
    with _or_404():
        return state.database.run(run_id, user)


async def _own_checkpoint(
    run_id: str, kind: str, name: str, state: State, user: User
) -> Checkpoint:
    with _or_404():
        return state.service.checkpoints.find(f"tinker://{run_id}/{kind}/{name}", user)


# what a path names, of this user
OwnRun = Annotated[TrainingRun, Depends(_own_run)]
OwnCheckpoint = Annotated[Checkpoint, Depends(_own_checkpoint)]


class WeightsInfo(BaseModel):
    tinker_path: str


class Ttl(BaseModel):
    ttl_seconds: int | None = Field(default=None, ge=0, lt=2**31)


@router.get("/training_runs")
async def list_training_runs(
    state: State, user: User, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """The user's runs, those that were asked something last first."""
    runs, total = state.database.runs(user, limit=limit, offset=offset)
    saved = state.service.checkpoints.of_runs([run.id for run in runs])
    cursor = {"offset": offset, "limit": limit, "total_count": total}
    return {"training_runs": [_run(state, run, saved) for run in runs], "cursor": cursor}


@router.get("/training_runs/{run_id}")
async def get_training_run(run: OwnRun, state: State) -> dict[str, Any]:
    """One run, with the tokens and seconds that it has cost."""
    return _run(state, run, state.service.checkpoints.of_runs([run.id]))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(run: OwnRun, state: State) -> dict[str, Any]:
    """The checkpoints of a run, last first."""
    saved = state.service.checkpoints.of_runs([run.id])
    return {"checkpoints": [_checkpoint(one) for one in saved]}


@router.get("/checkpoints")
async def list_user_checkpoints(
    state: State, user: User, limit: Limit = 100, offset: Offset = 0
) -> dict[str, Any]:
    """The checkpoints of all runs, last first."""
    runs, _ = state.database.runs(user, limit=1_000_000)
    saved = state.service.checkpoints.of_runs([run.id for run in runs])
    cursor = {"offset": offset, "limit": limit, "total_count": len(saved)}
    return {
        "checkpoints": [_checkpoint(one) for one in saved[offset : offset + limit]],
        "cursor": cursor,
    }


@router.delete("/training_runs/{run_id}/checkpoints/{kind}/{name}", status_code=204)
async def delete_checkpoint(saved: OwnCheckpoint, state: State, user: User) -> Response:
    """Remove a checkpoint and its files."""
    # another may be being written
    await asyncio.to_thread(state.service.checkpoints.delete, saved.path, user)
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
async def set_checkpoint_ttl(
    run_id: str, kind: str, name: str, body: Ttl, state: State, user: User
) -> dict[str, Any]:
    """Set after how many seconds a checkpoint is removed; without a number it stays."""
    # no dependency: a wrong body is reported first
    saved = await _own_checkpoint(run_id, kind, name, state, user)
    set_ttl = state.service.checkpoints.set_ttl
    return _checkpoint(await asyncio.to_thread(set_ttl, saved.path, user, body.ttl_seconds))


@router.post("/weights_info")
async def weights_info(body: WeightsInfo, state: State, user: User) -> dict[str, Any]:
    """What a checkpoint was made of."""
    with _or_404():
        saved = state.service.checkpoints.find(body.tinker_path, user)
        run = state.database.run(saved.run_id, user)
    flags = {name: run.lora.get(name) for name in ("train_unembed", "train_mlp", "train_attn")}
    return {
        "base_model": run.base_model,
        "is_lora": True,
        "lora_rank": run.lora.get("rank"),
        "optimizer_config": {"type": "adamw"},
        **flags,
    }


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/external_weights_urls")
async def external_weights_urls(
    saved: OwnCheckpoint, request: Request, state: State
) -> dict[str, Any]:
    """Where each file of a checkpoint can be fetched for an hour, without a key."""
    expires = int(time.time()) + _URL_SECONDS
    urls = {}
    for file in await asyncio.to_thread(_files, state, saved):
        url = request.url_for("download", **_place(saved), file=file)
        urls[file] = _signed(url, saved, file, expires)
    return {
        "urls": urls,
        "expires": datetime.datetime.fromtimestamp(expires, datetime.UTC).isoformat(),
    }


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/archive")
async def archive(saved: OwnCheckpoint, request: Request) -> RedirectResponse:
    """A checkpoint as one file, for older SDKs: redirects to an address that needs no key."""
    expires = int(time.time()) + _URL_SECONDS
    url = request.url_for("download_archive", **_place(saved))
    return RedirectResponse(_signed(url, saved, "archive", expires), status_code=302)


@router.get("/archives/{run_id}/{kind}/{name}", name="download_archive")
async def download_archive(
    run_id: str, kind: str, name: str, state: State, expires: int = 0, signature: str = ""
) -> StreamingResponse:
    """A checkpoint's folder as a tar file, by an address that ``archive`` has signed."""
    _check_signature(state, signature, run_id, kind, name, "archive", expires)
    return _send(await asyncio.to_thread(_write_tar, state, run_id, kind, name), f"{name}.tar")


def _write_tar(state: ServerState, run_id: str, kind: str, name: str) -> IO[bytes]:
    """Return a file that has no name, and is gone when it is closed."""
    reading = state.service.checkpoints.reading(run_id, kind, name)
    with contextlib.ExitStack() as stack, _or_404(), reading as folder:
        file = stack.enter_context(tempfile.TemporaryFile())
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=path.name)
        file.seek(0)
        stack.pop_all()  # open until it is sent
        return file


def _send(file: IO[bytes], name: str) -> StreamingResponse:
    """All of an open file, which may be removed or written over meanwhile."""

    def parts() -> Iterator[bytes]:
        with file:
            while part := file.read(1 << 20):
                yield part

    size = os.fstat(file.fileno()).st_size
    headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(parts(), headers=headers, media_type="application/octet-stream")


def _files(state: ServerState, saved: Checkpoint) -> list[str]:
    """The names of a checkpoint's files."""
    with _or_404(), state.service.checkpoints.reading(**_place(saved)) as folder:
        return sorted(path.name for path in folder.iterdir())


@router.get("/files/{run_id}/{kind}/{name}/{file}", name="download")
async def download(
    run_id: str,
    kind: str,
    name: str,
    file: str,
    state: State,
    expires: int = 0,
    signature: str = "",
) -> StreamingResponse:
    """One file of a checkpoint, by a URL that ``external_weights_urls`` has signed."""
    _check_signature(state, signature, run_id, kind, name, file, expires)
    return _send(await asyncio.to_thread(_open, state, run_id, kind, name, file), file)


def _open(state: ServerState, run_id: str, kind: str, name: str, file: str) -> IO[bytes]:
    with _or_404(), state.service.checkpoints.reading(run_id, kind, name) as folder:
        found = next((path for path in folder.iterdir() if path.name == file), None)
        if found is None:
            raise HTTPException(404, f"there is no file {file}")
        return found.open("rb")


@router.get("/sessions")
async def list_sessions(
    state: State, user: User, limit: Limit = 20, offset: Offset = 0
) -> dict[str, Any]:
    """The user's sessions, last first."""
    rows = state.database.select(ClientSession, owner=user)
    rows.sort(key=lambda row: row.created, reverse=True)
    return {"sessions": [row.id for row in rows[offset : offset + limit]]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, state: State, user: User) -> dict[str, Any]:
    """What a session has made."""
    row = state.database.get(ClientSession, session_id)
    if row is None or row.owner != user:
        raise HTTPException(404, f"there is no session {session_id}")
    return {
        "training_run_ids": [
            run.id for run in state.database.select(TrainingRun, session_id=session_id)
        ],
        "sampler_ids": [
            sampler.id for sampler in state.database.select(SamplerRow, session_id=session_id)
        ],
        "user_metadata": _texts(row.user_metadata),
        "display_name": row.display_name,
    }


# ---- pieces


def _place(saved: Checkpoint) -> dict[str, str]:
    """What names a checkpoint, as the database's and the routes' parameters."""
    return {"run_id": saved.run_id, "kind": saved.kind, "name": saved.name}


def _run(state: ServerState, run: TrainingRun, saved: list[Checkpoint]) -> dict[str, Any]:
    # by kind; what was saved last stands first
    last = {one.kind: _checkpoint(one) for one in reversed(saved) if one.run_id == run.id}
    model = state.service.trained.get(run.id)
    usage = state.service.usage(model) if model else None
    return {
        "training_run_id": run.id,
        "base_model": run.base_model,
        "model_owner": run.owner,
        "is_lora": True,
        "corrupted": False,
        "lora_rank": run.lora.get("rank"),
        "last_request_time": _time(run.last_request),
        "last_checkpoint": last.get("weights"),
        "last_sampler_checkpoint": last.get("sampler_weights"),
        "user_metadata": _texts(run.user_metadata),
        "tokens": usage.tokens if usage else run.tokens,
        "seconds": usage.seconds if usage else run.seconds,
    }


def _checkpoint(saved: Checkpoint) -> dict[str, Any]:
    return {
        "checkpoint_id": f"{saved.kind}/{saved.name}",
        "checkpoint_type": _TYPES[saved.kind],
        "time": _time(saved.created),
        "tinker_path": saved.path,
        "size_bytes": saved.size_bytes,
        "public": False,
        "user_metadata": _texts(saved.user_metadata),
        "expires_at": None if saved.expires is None else _time(saved.expires),
    }


def _time(time: datetime.datetime) -> str:
    return time.replace(tzinfo=datetime.UTC).isoformat()  # SQLite forgets that it is UTC


def _texts(metadata: dict[str, Any]) -> dict[str, str]:
    return {str(name): str(value) for name, value in metadata.items()}


def _signed(url: URL, saved: Checkpoint, file: str, expires: int) -> str:
    return str(url.include_query_params(expires=expires, signature=_sign(saved, file, expires)))


def _check_signature(
    state: ServerState, signature: str, run_id: str, kind: str, name: str, file: str, expires: int
) -> None:
    saved = state.service.checkpoints.get(run_id, kind, name)
    expected = "" if saved is None else _sign(saved, file, expires)
    is_same = hmac.compare_digest(signature.encode(), expected.encode())
    if not expected or not is_same or time.time() > expires:
        raise HTTPException(404, "this address is not valid (any more)")


def _sign(saved: Checkpoint, file: str, expires: int) -> str:
    """Signs a file of this save: that of another save of the same name is not handed out for it."""
    text = "\n".join((saved.path, saved.created.isoformat(), file, str(expires)))
    return hmac.new(_URL_SECRET, text.encode(), hashlib.sha256).hexdigest()
