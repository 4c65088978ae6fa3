"""What a server holds, and lets go: the application in this process, asked by hand."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import Server
from fastapi.testclient import TestClient

from lorakit.service.core import Service
from lorakit.service.http import common
from lorakit.service.http.app import create_app
from lorakit.service.http.state import ServerState


@pytest.fixture
def state(tmp_path: Path) -> ServerState:
    return ServerState(Service(tmp_path, models={"tiny": "tiny"}, accelerator="cpu"), poll_seconds=0.2)


@pytest.fixture
def api(state: ServerState) -> Iterator[TestClient]:
    key = state.keys.make("owner")
    with TestClient(create_app(state), base_url="http://test", headers={"x-api-key": key}) as client:
        yield client


def post(api: TestClient, route: str, **body: Any) -> dict[str, Any]:
    answer = api.post(f"/api/v1/{route}", json=body)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def result(api: TestClient, request_id: str) -> dict[str, Any]:
    for _ in range(300):
        answer = api.post("/api/v1/retrieve_future", json={"request_id": request_id})
        if answer.status_code != 408:
            found: dict[str, Any] = answer.json()
            return found
    raise TimeoutError(request_id)


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def create(api: TestClient) -> tuple[str, str, str]:
    """Session, model and request of a new model."""
    session = post(api, "create_session", tags=[], user_metadata={}, sdk_version="0.38.0")["session_id"]
    asked = post(api, "create_model", session_id=session, model_seq_id=0, base_model="tiny", lora_config={"rank": 2})
    return session, f"{session}:train:0", asked["request_id"]


def test_a_model_whose_session_ends_while_it_is_made_is_freed(
    state: ServerState, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, may_go_on = state.service.create_model, threading.Event()
    monkeypatch.setattr(state.service, "create_model", lambda *args, **options: may_go_on.wait(30) and make(*args, **options))
    session, model, _ = create(api)
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert model not in state.service.trained
    may_go_on.set()
    until(lambda: model in state.service.engine("tiny").usage or model in state.service.engine("tiny").replica.trainees)
    until(lambda: model not in state.service.trained and model not in state.service.engine("tiny").replica.trainees)


def test_calls_that_wait_for_one_that_never_came_end_with_their_model(state: ServerState, api: TestClient) -> None:
    _, model, asked = create(api)
    assert result(api, asked)["model_id"] == model
    waiting = post(api, "optim_step", model_id=model, seq_id=3, adam_params={})["request_id"]
    post(api, "unload_model", model_id=model)
    assert "there is no model" in result(api, waiting)["error"] or "freed" in result(api, waiting)["error"]
    assert state.num_waiting == 0 and model not in state.order


def test_what_a_session_still_asked_does_not_bring_it_back(state: ServerState, api: TestClient) -> None:
    session, model, asked = create(api)
    result(api, asked)
    held = post(api, "save_weights_for_sampler", model_id=model, seq_id=2, sampling_session_seq_id=0)["request_id"]
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert "error" in result(api, held)
    assert api.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    assert session not in state.sessions


def test_not_more_than_so_many_calls_wait_for_one(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_HELD", 2)
    _, model, asked = create(api)
    result(api, asked)
    requests = [post(api, "optim_step", model_id=model, seq_id=n, adam_params={})["request_id"] for n in (2, 3)]
    refused = api.post("/api/v1/optim_step", json={"model_id": model, "seq_id": 4, "adam_params": {}})
    assert refused.status_code == 429 and "wait for call 1" in refused.json()["detail"]
    post(api, "optim_step", model_id=model, seq_id=1, adam_params={})
    assert all("error" not in result(api, request) for request in requests)


def test_an_answer_that_would_be_huge_is_refused(api: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(common, "MAX_ANSWER_NUMBERS", 100)
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]}
    ask: dict[str, Any] = {
        "base_model": "tiny",
        "prompt": prompt,
        "sampling_params": {"max_tokens": 1},
        "prompt_logprobs": True,
    }
    assert "error" not in result(api, post(api, "asample", **ask)["request_id"])
    for more in ({"topk_prompt_logprobs": 200}, {"sampling_params": {}}, {"num_samples": 99}):
        failed = result(api, post(api, "asample", **{**ask, **more})["request_id"])
        assert "log-probabilities" in failed["error"] and failed["category"] == "user"
    refused = api.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 9, "n": 50})
    assert refused.status_code == 400 and "log-probabilities" in refused.json()["error"]["message"]


def test_whoever_does_not_wait_for_a_whole_answer_ends_the_generation(server: Server) -> None:
    body = {"model": "tiny", "prompt": ["a"] * 64, "max_tokens": 900, "temperature": 2.0, "n": 64, "stop": []}
    with httpx.Client(base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.7)
        until(lambda: http.get("/api/v1/healthz", timeout=20).json()["open_requests"] == 0)
