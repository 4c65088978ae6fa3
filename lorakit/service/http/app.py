"""The HTTP server: Tinker's protocol and OpenAI's over one Service."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import FastAPI, HTTPException, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException as StarletteHTTPException

from lorakit import __version__
from lorakit.errors import LorakitError
from lorakit.service.http import connection, listing, openai, sampling, training
from lorakit.service.http.dependencies import NO_KEY, USER, name_problems, status_of
from lorakit.service.http.state import ServerState

METHODS = ["GET", "POST", "PUT", "DELETE"]
# What the SDK can ask for and is answered 404: 501 it would try for a minute and more.
NOT_OFFERED = {
    "billing/{path:path}": "your own hardware sends no bills",
    "audit": "there is no audit log",
    "auth/{path:path}": "keys are all there is",
    "sessions/search": "list the sessions instead",
    "sessions/{id}/trace_export": "times of calls are logged by the server",
    "sessions/{id}/project": "there are no projects",
    "create_custom_loss": "custom losses run in the client, by forward_backward_custom",
    "retrieve_futures": "results are fetched one by one, by retrieve_future",
    "join_sampling_session": "sampling clients can be copied without it",
    "copy_weights": "there are no projects to copy between",
    "training_runs/{id}/checkpoints/{kind}/{name}/publish": (
        "files of one user are not shown to others"
    ),
}


def create_app(state: ServerState) -> FastAPI:
    """Return the application over ``state``."""

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        state.start()
        try:
            yield
        finally:
            await state.stop()

    app = FastAPI(title="lorakit", version=__version__, lifespan=lifespan)
    app.state.lorakit = state
    app.add_middleware(AuthMiddleware, state=state)
    for pattern, reason in NOT_OFFERED.items():
        app.add_api_route(
            f"/api/v1/{pattern}", _refuse(pattern, reason), methods=METHODS, include_in_schema=False
        )
    for module in (connection, training, sampling, listing, openai):
        app.include_router(module.router)
    app.add_exception_handler(RequestValidationError, _on_bad_body)
    app.add_exception_handler(LorakitError, _on_error)
    app.add_exception_handler(StarletteHTTPException, _on_error)

    app.add_api_route(
        "/api/v1/{path:path}",
        _refuse("this", "there is no such route"),
        methods=METHODS,
        include_in_schema=False,
    )
    return app


# healthz, and what is signed
OPEN = ("/api/v1/healthz", "/api/v1/files/", "/api/v1/archives/", "/docs", "/openapi.json")


class AuthMiddleware:
    """Lets nobody in without a key, before a body is read; nor with a body over the limit, where
    no route takes it with a pending request.
    """

    def __init__(self, app: Any, state: ServerState) -> None:
        self.app, self.state = app, state

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and not scope["path"].startswith(OPEN):
            headers = Headers(scope=scope)
            bearer = headers.get("authorization", "").removeprefix("Bearer ")
            key = headers.get("x-api-key") or bearer
            user = scope[USER] = self.state.keys.user_of(key)
            problem = None if user else (401, NO_KEY)
            # Tinker's routes count for themselves
            if problem is None and scope["path"].startswith("/v1/"):
                length = headers.get("content-length", "0" if scope["method"] == "GET" else "")
                limit = self.state.max_body_bytes
                if not length.isdigit() or int(length) > limit:
                    problem = (413, f"say content-length, of at most {limit:,} bytes")
            if problem is not None:
                answer = _say(Request(scope), HTTPException(*problem))
                await answer(scope, receive, send)
                return
        await self.app(scope, receive, send)


def _refuse(what: str, reason: str) -> Callable[[], Any]:
    async def not_offered() -> None:
        raise HTTPException(404, f"lorakit does not offer {what}: {reason}")

    return not_offered


async def _on_bad_body(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError)
    return _say(request, HTTPException(400, name_problems(error)))


async def _on_error(request: Request, error: Exception) -> JSONResponse:
    if not isinstance(error, StarletteHTTPException):
        error = HTTPException(status_of(error), str(error))
    return _say(request, error)


def _say(request: Request, error: StarletteHTTPException) -> JSONResponse:
    """An error in the shape of the interface that was asked."""
    if request.url.path.startswith("/v1/"):
        return openai.error_response(error)
    return JSONResponse({"detail": error.detail}, status_code=error.status_code)
