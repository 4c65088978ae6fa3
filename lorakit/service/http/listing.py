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
from pathlib import Path
from typing import IO, Any

from fastapi import APIRouter, HTTPException, Query, Request, Response
from fastapi.responses import RedirectResponse, StreamingResponse
from pydantic import BaseModel, Field

from lorakit.errors import AdapterError, CheckpointError
from lorakit.service.checkpoints import parse_path
from lorakit.service.database import Checkpoint, ClientSession, Run, SamplerRow
from lorakit.service.http.dependencies import State, User
from lorakit.service.http.state import ServerState

router = APIRouter(prefix="/api/v1", tags=["catalogue"])
_TYPES = {"weights": "training", "sampler_weights": "sampler", "external_weights": "external"}
_URL_SECONDS = 3600
_URL_SECRET = secrets.token_bytes(32)  # of this process: URLs end with it


class WeightsInfo(BaseModel):
    tinker_path: str


class Ttl(BaseModel):
    ttl_seconds: int | None = Field(default=None, ge=0, lt=2**31)


@router.get("/training_runs")
async def list_training_runs(
    state: State,
    user: User,
    limit: int = Query(20, ge=1, le=1000),
    offset: int = Query(0, ge=0, lt=2**31),
) -> dict[str, Any]:
    """The user's runs, those that were asked something last first."""
    runs, total = state.database.runs(user, limit=limit, offset=offset)
    saved = state.service.checkpoints.of_runs([run.id for run in runs])
    cursor = {"offset": offset, "limit": limit, "total_count": total}
    return {"training_runs": [_run(state, run, saved) for run in runs], "cursor": cursor}


@router.get("/training_runs/{run_id}")
async def get_training_run(run_id: str, state: State, user: User) -> dict[str, Any]:
    """One run, with the tokens and seconds that it has cost."""
    run = _own(state, run_id, user)
    return _run(state, run, state.service.checkpoints.of_runs([run_id]))


@router.get("/training_runs/{run_id}/checkpoints")
async def list_checkpoints(run_id: str, state: State, user: User) -> dict[str, Any]:
    """The checkpoints of a run, last first."""
    _own(state, run_id, user)
    return {
        "checkpoints": [_checkpoint(saved) for saved in state.service.checkpoints.of_runs([run_id])]
    }


@router.get("/checkpoints")
async def list_user_checkpoints(
    state: State,
    user: User,
    limit: int = Query(100, ge=1, le=1000),
    offset: int = Query(0, ge=0, lt=2**31),
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
async def delete_checkpoint(
    run_id: str, kind: str, name: str, state: State, user: User
) -> Response:
    """Remove a checkpoint and its files."""
    _find(state, run_id, kind, name, user)
    await asyncio.to_thread(
        state.service.checkpoints.delete, f"tinker://{run_id}/{kind}/{name}", user
    )  # another may be being written
    return Response(status_code=204)


@router.put("/training_runs/{run_id}/checkpoints/{kind}/{name}/ttl")
async def set_checkpoint_ttl(
    run_id: str, kind: str, name: str, body: Ttl, state: State, user: User
) -> dict[str, Any]:
    """Let a checkpoint be removed after so many seconds, or, without a number, never."""
    _find(state, run_id, kind, name, user)
    path = f"tinker://{run_id}/{kind}/{name}"
    return _checkpoint(
        await asyncio.to_thread(state.service.checkpoints.set_ttl, path, user, body.ttl_seconds)
    )


@router.post("/weights_info")
async def weights_info(body: WeightsInfo, state: State, user: User) -> dict[str, Any]:
    """What a checkpoint was made of."""
    try:
        run_id, kind, name = parse_path(body.tinker_path)
    except CheckpointError as error:
        raise HTTPException(404, str(error)) from error
    run = _own(state, run_id, user)
    _find(state, run_id, kind, name, user)
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
    run_id: str, kind: str, name: str, request: Request, state: State, user: User
) -> dict[str, Any]:
    """Where each file of a checkpoint can be fetched for an hour, without a key."""
    saved, expires = _find(state, run_id, kind, name, user), int(time.time()) + _URL_SECONDS
    urls = {}
    for file in await asyncio.to_thread(_files, state, run_id, kind, name):
        url = request.url_for("download", run_id=run_id, kind=kind, name=name, file=file)
        urls[file] = str(
            url.include_query_params(expires=expires, signature=_sign(saved, file, expires))
        )
    return {
        "urls": urls,
        "expires": datetime.datetime.fromtimestamp(expires, datetime.UTC).isoformat(),
    }


@router.get("/training_runs/{run_id}/checkpoints/{kind}/{name}/archive")
async def archive(
    run_id: str, kind: str, name: str, request: Request, state: State, user: User
) -> RedirectResponse:
    """A checkpoint's folder as one file, as older SDKs fetch it: leads to an address that needs
    no key.
    """
    saved, expires = _find(state, run_id, kind, name, user), int(time.time()) + _URL_SECONDS
    url = request.url_for("download_archive", run_id=run_id, kind=kind, name=name)
    signature = _sign(saved, "archive", expires)
    return RedirectResponse(
        str(url.include_query_params(expires=expires, signature=signature)), status_code=302
    )


@router.get("/archives/{run_id}/{kind}/{name}", name="download_archive")
async def download_archive(
    run_id: str, kind: str, name: str, state: State, expires: int = 0, signature: str = ""
) -> StreamingResponse:
    """A checkpoint's folder as a tar file, by an address that ``archive`` has signed."""
    _check_signature(state, signature, run_id, kind, name, "archive", expires)
    return _send(await asyncio.to_thread(_write_tar, state, run_id, kind, name), f"{name}.tar")


def _write_tar(state: ServerState, run_id: str, kind: str, name: str) -> IO[bytes]:
    """Return a file that has no name, and is gone when it is closed."""
    with contextlib.ExitStack() as stack, _reading(state, run_id, kind, name) as folder:
        file = stack.enter_context(tempfile.TemporaryFile())
        with tarfile.open(fileobj=file, mode="w") as tar:
            for path in sorted(folder.iterdir()):
                tar.add(path, arcname=path.name)
        file.seek(0)
        stack.pop_all()  # open until it is sent
        return file


@contextlib.contextmanager
def _reading(state: ServerState, run_id: str, kind: str, name: str) -> Iterator[Path]:
    """The folder of a checkpoint, which stays as it is meanwhile. 404 where there is none."""
    try:
        with state.service.checkpoints.reading(run_id, kind, name) as folder:
            yield folder
    except CheckpointError as error:
        raise HTTPException(404, str(error)) from error


def _send(file: IO[bytes], name: str) -> StreamingResponse:
    """All of an open file, which may be removed or written over meanwhile."""

    def parts() -> Iterator[bytes]:
        with file:
            while part := file.read(1 << 20):
                yield part

    size = os.fstat(file.fileno()).st_size
    headers = {"content-length": str(size), "content-disposition": f'attachment; filename="{name}"'}
    return StreamingResponse(parts(), headers=headers, media_type="application/octet-stream")


def _files(state: ServerState, run_id: str, kind: str, name: str) -> list[str]:
    """The names of a checkpoint's files."""
    with _reading(state, run_id, kind, name) as folder:
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
    with _reading(state, run_id, kind, name) as folder:
        found = next((path for path in folder.iterdir() if path.name == file), None)
        if found is None:
            raise HTTPException(404, f"there is no file {file}")
        return found.open("rb")


@router.get("/sessions")
async def list_sessions(
    state: State,
    user: User,
    limit: int = Query(20, ge=1, le=1000),
    offset: int = Query(0, ge=0, lt=2**31),
) -> dict[str, Any]:
    """The user's sessions, last first."""
    rows = sorted(
        state.database.select(ClientSession, owner=user), key=lambda row: row.created, reverse=True
    )
    return {"sessions": [row.id for row in rows[offset : offset + limit]]}


@router.get("/sessions/{session_id}")
async def get_session(session_id: str, state: State, user: User) -> dict[str, Any]:
    """What a session has made."""
    row = state.database.get(ClientSession, session_id)
    if row is None or row.owner != user:
        raise HTTPException(404, f"there is no session {session_id}")
    return {
        "training_run_ids": [run.id for run in state.database.select(Run, session_id=session_id)],
        "sampler_ids": [
            sampler.id for sampler in state.database.select(SamplerRow, session_id=session_id)
        ],
        "user_metadata": _texts(row.user_metadata),
        "display_name": row.display_name,
    }


# ---- pieces


def _own(state: ServerState, run_id: str, user: str) -> Run:
    try:
        return state.database.run(run_id, user)
    except CheckpointError as error:
        raise HTTPException(404, str(error)) from error


def _find(state: ServerState, run_id: str, kind: str, name: str, user: str) -> Checkpoint:
    _own(state, run_id, user)
    try:
        parse_path(f"tinker://{run_id}/{kind}/{name}")
        found = state.service.checkpoints.get(run_id, kind, name)
    except (CheckpointError, AdapterError) as error:
        raise HTTPException(404, str(error)) from error
    if found is None:
        raise HTTPException(404, f"there is no checkpoint tinker://{run_id}/{kind}/{name}")
    return found


def _run(state: ServerState, run: Run, saved: list[Checkpoint]) -> dict[str, Any]:
    own = [one for one in saved if one.run_id == run.id]
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
        "last_checkpoint": next((_checkpoint(one) for one in own if one.kind == "weights"), None),
        "last_sampler_checkpoint": next(
            (_checkpoint(one) for one in own if one.kind == "sampler_weights"), None
        ),
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


def _check_signature(
    state: ServerState, signature: str, run_id: str, kind: str, name: str, file: str, expires: int
) -> None:
    saved = state.service.checkpoints.get(run_id, kind, name)
    expected = _sign(saved, file, expires) if saved is not None else ""
    if (
        not expected
        or not hmac.compare_digest(signature.encode(), expected.encode())
        or time.time() > expires
    ):
        raise HTTPException(404, "this address is not valid (any more)")


def _sign(saved: Checkpoint, file: str, expires: int) -> str:
    """A signature of a file of this save: files of two saves under one name are not handed out
    as one.
    """
    text = "\n".join((saved.path, saved.created.isoformat(), file, str(expires)))
    return hmac.new(_URL_SECRET, text.encode(), hashlib.sha256).hexdigest()
