"""What a server holds, and lets go: the application in this process, asked by hand."""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from fastapi.testclient import TestClient
from serving import Server

from lorakit.service.core import Service
from lorakit.service.http import dependencies as common
from lorakit.service.http import state as state_module
from lorakit.service.http.app import create_app
from lorakit.service.http.state import ServerState


@pytest.fixture
def state(tmp_path: Path) -> ServerState:
    return ServerState(
        Service(tmp_path, models={"tiny": "tiny"}, accelerator="cpu"), poll_seconds=0.2
    )


@pytest.fixture
def api(state: ServerState) -> Iterator[TestClient]:
    key = state.keys.make("owner")
    with TestClient(
        create_app(state), base_url="http://test", headers={"x-api-key": key}
    ) as client:
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
    session = post(api, "create_session", tags=[], user_metadata={}, sdk_version="0.38.0")[
        "session_id"
    ]
    asked = post(
        api,
        "create_model",
        session_id=session,
        model_seq_id=0,
        base_model="tiny",
        lora_config={"rank": 2},
    )
    return session, f"{session}:train:0", asked["request_id"]


def test_a_model_whose_session_ends_while_it_is_made_is_freed(
    state: ServerState, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, may_go_on = state.service.create_model, threading.Event()
    monkeypatch.setattr(
        state.service,
        "create_model",
        lambda *args, **options: may_go_on.wait(30) and make(*args, **options),
    )
    session, model, _ = create(api)
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert model not in state.service.trained
    drop, dropped = state.service.drop_model, threading.Event()
    monkeypatch.setattr(
        state.service, "drop_model", lambda model_id: (drop(model_id), dropped.set())
    )
    may_go_on.set()
    until(dropped.is_set)
    until(
        lambda: (
            model not in state.service.trained
            and model not in state.service.engine("tiny").worker.training_states
        )
    )


def test_calls_that_wait_for_one_that_never_came_end_with_their_model(
    state: ServerState, api: TestClient
) -> None:
    _, model, asked = create(api)
    assert result(api, asked)["model_id"] == model
    waiting = post(api, "optim_step", model_id=model, seq_id=3, adam_params={})["request_id"]
    post(api, "unload_model", model_id=model)
    assert (
        "there is no model" in result(api, waiting)["error"]
        or "freed" in result(api, waiting)["error"]
    )
    assert state.num_waiting == 0 and model not in state.order


def test_what_a_session_still_asked_does_not_bring_it_back(
    state: ServerState, api: TestClient
) -> None:
    session, model, asked = create(api)
    result(api, asked)
    held = post(
        api, "save_weights_for_sampler", model_id=model, seq_id=2, sampling_session_seq_id=0
    )["request_id"]
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert "error" in result(api, held)
    assert api.post("/api/v1/session_heartbeat", json={"session_id": session}).status_code == 410
    assert session not in state.sessions


def test_not_more_than_so_many_calls_wait_for_one(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(common, "MAX_HELD", 2)
    _, model, asked = create(api)
    result(api, asked)
    requests = [
        post(api, "optim_step", model_id=model, seq_id=n, adam_params={})["request_id"]
        for n in (2, 3)
    ]
    refused = api.post(
        "/api/v1/optim_step", json={"model_id": model, "seq_id": 4, "adam_params": {}}
    )
    assert refused.status_code == 429 and "wait for call 1" in refused.json()["detail"]
    post(api, "optim_step", model_id=model, seq_id=1, adam_params={})
    assert all("error" not in result(api, request) for request in requests)


def test_an_answer_that_would_be_huge_is_refused(
    api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
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
    refused = api.post(
        "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 9, "n": 50}
    )
    assert refused.status_code == 400 and "log-probabilities" in refused.json()["error"]["message"]


def test_request_ids_that_another_user_made_up_reach_nothing(
    state: ServerState, api: TestClient
) -> None:
    session, model, asked = create(api)
    result(api, asked)
    bob = {"x-api-key": state.keys.make("bob")}
    sample = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": 1},
    }
    sampler = post(
        api,
        "create_sampling_session",
        session_id=session,
        sampling_session_seq_id=0,
        base_model="tiny",
    )
    own = post(
        api, "asample", sampling_session_id=sampler["sampling_session_id"], seq_id=0, **sample
    )["request_id"]
    assert "sequences" in result(api, own)
    state.pending.forget()
    # the answer that is there; a call that will come
    for guess in (sampler["sampling_session_id"], model):
        stolen = {"sampling_session_id": guess, "seq_id": 0 if guess != model else 1, **sample}
        taken = api.post("/api/v1/asample", json=stolen, headers=bob).json()["request_id"]
        until(lambda taken=taken: state.pending.find(taken, "bob").answer is not None)
        answer = api.post("/api/v1/retrieve_future", json={"request_id": taken}, headers=bob).json()
        assert "there is no sampler" in answer["error"]
    made = api.post(
        "/api/v1/create_model",
        json={"session_id": session, "model_seq_id": 1, "base_model": "tiny"},
        headers=bob,
    )
    assert made.status_code == 200
    assert "sequences" in result(api, own)
    assert "metrics" in result(
        api, post(api, "optim_step", model_id=model, seq_id=1, adam_params={})["request_id"]
    )
    again = post(
        api,
        "create_model",
        session_id=session,
        model_seq_id=1,
        base_model="tiny",
        lora_config={"rank": 2},
    )
    assert result(api, again["request_id"])["model_id"] == f"{session}:train:1"


def test_a_session_holds_so_many_adapters_and_those_that_are_sampled_stay(
    state: ServerState, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(state_module, "MAX_SNAPSHOTS", 2)
    monkeypatch.setattr(state_module, "MAX_READ", 2)
    session, model, asked = create(api)
    result(api, asked)
    sample = {
        "prompt": {"chunks": [{"type": "encoded_text", "tokens": [5, 6]}]},
        "sampling_params": {"max_tokens": 1},
    }

    def says(sampler: str, seq_id: int) -> dict[str, Any]:
        return result(
            api,
            post(api, "asample", sampling_session_id=sampler, seq_id=seq_id, **sample)[
                "request_id"
            ],
        )

    def snapshot(number: int) -> str:
        call = post(
            api,
            "save_weights_for_sampler",
            model_id=model,
            seq_id=number + 1,
            sampling_session_seq_id=number,
        )
        found: str = result(api, call["request_id"])["sampling_session_id"]
        return found

    first, second = snapshot(0), snapshot(1)
    assert "sequences" in says(first, 0)
    third = snapshot(2)
    assert "sequences" in says(first, 1) and "sequences" in says(third, 0)
    assert "are gone" in says(second, 0)["error"]
    path = result(
        api, post(api, "save_weights_for_sampler", model_id=model, seq_id=4, path="a")["request_id"]
    )["path"]
    read = [
        post(
            api,
            "create_sampling_session",
            session_id=session,
            sampling_session_seq_id=n,
            model_path=path,
        )
        for n in range(3, 7)
    ]
    samplers = [one["sampling_session_id"] for one in read]
    assert [sampler in state.samplers for sampler in samplers] == [False, False, True, True]
    assert "sequences" in says(samplers[0], 0)  # is read again
    engine = state.service.engine("tiny")
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert "has ended" in says(first, 2)["error"] and not state.samplers
    until(lambda: not engine.worker.snapshots)


def test_a_session_that_cannot_be_ended_now_is_ended_later(
    state: ServerState, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    session, model, asked = create(api)
    result(api, asked)
    add = state.database.add
    monkeypatch.setattr(
        state.database, "add", lambda *rows: (_ for _ in ()).throw(OSError("the disk is full"))
    )
    with pytest.raises(OSError):
        state.end_session(state.sessions[session])
    assert session in state.sessions and model in state.service.trained
    monkeypatch.setattr(state.database, "add", add)
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert model not in state.service.trained


def test_answers_that_a_full_disk_refused_are_written_later(
    state: ServerState, api: TestClient, monkeypatch: pytest.MonkeyPatch
) -> None:
    add = state.database.add_results
    monkeypatch.setattr(
        state.database,
        "add_results",
        lambda rows: (_ for _ in ()).throw(OSError("the disk is full")),
    )
    _, _, asked = create(api)
    assert "model_id" in result(api, asked)
    monkeypatch.setattr(state.database, "add_results", add)
    state.pending.forget()
    assert state.database.result(asked, "owner") is not None
    assert "model_id" in result(api, asked)


def test_what_queued_calls_cost_is_written_behind_them(state: ServerState, api: TestClient) -> None:
    session, model, asked = create(api)
    result(api, asked)
    data = [
        {
            "model_input": {"chunks": [{"type": "encoded_text", "tokens": [5, 6, 7]}]},
            "loss_fn_inputs": {
                "target_tokens": {"dtype": "int64", "data": [6, 7, 8]},
                "weights": {"dtype": "float32", "data": [1.0, 1.0, 1.0]},
            },
        }
    ]
    call = {"forward_backward_input": {"data": data, "loss_fn": "cross_entropy"}}
    requests = [
        post(api, "forward_backward", model_id=model, seq_id=n, **call)["request_id"]
        for n in range(1, 6)
    ]
    assert api.post(f"/api/v1/sessions/{session}/finish").status_code == 204
    assert all("error" not in result(api, request) for request in requests)
    until(lambda: api.get(f"/api/v1/training_runs/{model}").json()["user_metadata"] is not None)
    until(lambda: state.database.run(model, "owner").tokens == 15)
    assert model not in state.service.engine("tiny").usage


@pytest.mark.parametrize(
    ("route", "body", "message"),
    [
        ("forward_backward", {"forward_backward_input": [1]}, "not an object"),
        (
            "forward_backward",
            {"forward_backward_input": {"loss_fn": "cross_entropy", "loss_fn_config": [1]}},
            "an object",
        ),
        (
            "forward_backward",
            {"forward_backward_input": {"loss_fn": "cross_entropy", "data": [5]}},
            "data\\[0\\]",
        ),
        ("optim_step", {"adam_params": {"eps": 0}}, "eps=0"),
        ("optim_step", {"optimizer_params": {"type": "adamw", "beta1": 2}}, "beta1=2"),
        ("optim_step", {"optimizer_params": {"type": "dimuon"}}, "dimuon"),
        (
            "load_weights",
            {"path": "tinker://a/weights/b", "optimizer_config": {"type": "dimuon"}},
            "dimuon",
        ),
    ],
)
def test_what_a_body_says_wrong_fails_its_call_and_keeps_the_order(
    api: TestClient, route: str, body: dict[str, Any], message: str
) -> None:
    _, model, asked = create(api)
    result(api, asked)
    failed = result(api, post(api, route, model_id=model, seq_id=1, **body)["request_id"])
    assert re.search(message, failed["error"]) and failed["category"] == "user"
    assert "metrics" in result(
        api, post(api, "optim_step", model_id=model, seq_id=2, adam_params={})["request_id"]
    )


def test_an_engine_that_has_ended_is_said_by_healthz_and_is_no_fault_of_a_client(
    state: ServerState, api: TestClient
) -> None:
    assert api.get("/api/v1/healthz").json()["status"] == "ok"
    assert (
        api.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}
        ).status_code
        == 200
    )
    state.service.engine("tiny")._end_by(RuntimeError("another process is gone"))
    assert api.get("/api/v1/healthz").json()["problems"] == ["tiny: another process is gone"]
    assert (
        api.post(
            "/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 1}
        ).status_code
        == 503
    )


def test_whoever_does_not_wait_for_a_whole_answer_ends_the_generation(server: Server) -> None:
    body = {
        "model": "tiny",
        "prompt": ["a"] * 64,
        "max_tokens": 900,
        "temperature": 2.0,
        "n": 64,
        "stop": [],
    }
    with httpx.Client(
        base_url=server.url, headers={"Authorization": f"Bearer {server.key}"}
    ) as http:
        with pytest.raises(httpx.ReadTimeout):
            http.post("/v1/completions", json=body, timeout=0.7)
        until(lambda: http.get("/api/v1/healthz", timeout=20).json()["open_requests"] == 0)
