"""A server that is killed at any moment and started again keeps what it has acknowledged, and
leaves nobody waiting.
"""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import httpx
import preloaded
import pytest
from serving import Server, free_port

PROGRAM = Path(__file__).with_name("resuming_program.py")


@pytest.mark.parametrize("num_kills", [2, pytest.param(20, marks=pytest.mark.slow)])
def test_a_program_of_the_sdk_reaches_its_last_step_through_kills(
    num_kills: int, tmp_path: Path
) -> None:
    """The program resumes by its last save_state; its losses are those of a run that was never
    killed.
    """
    draw, port = random.Random(num_kills), free_port()
    server = Server.start(tmp_path, port=port)
    environment = {**os.environ, **server.environment()}
    steps = 20 * num_kills  # more than are made between the kills
    losses = {}
    for name in ("whole", "killed"):
        log = (tmp_path / f"{name}.log").open("w")
        program = preloaded.start(
            [
                str(PROGRAM),
                str(steps),
                str(tmp_path / f"{name}.txt"),
            ],
            stdout=log,
            stderr=log,
            env=environment,
            cwd=tmp_path,
        )
        kills = 0
        while name == "killed" and kills < num_kills and program.poll() is None:
            time.sleep(draw.uniform(0.1, 0.8))
            server.process.send_signal(signal.SIGKILL)
            server.process.wait()
            server = Server.start(tmp_path, port=port)
            kills += 1
        assert program.wait(300) == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
        losses[name] = (tmp_path / f"{name}.txt").read_text().split()
        assert kills == (num_kills if name == "killed" else 0)
    assert losses["killed"] == losses["whole"] and len(losses["whole"]) == steps
    server.stop()


def test_results_and_checkpoints_outlive_the_server(tmp_path: Path) -> None:
    port = free_port()
    server = Server.start(tmp_path, port=port)
    headers = {"X-API-Key": server.key}
    with httpx.Client(base_url=f"{server.url}/api/v1", headers=headers, timeout=60) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny",
            "lora_config": {"rank": 4, "seed": 1},
        }
        model_id = http.post(
            "/retrieve_future", json=http.post("/create_model", json=body).json()
        ).json()["model_id"]
        save = http.post(
            "/save_weights", json={"model_id": model_id, "seq_id": 1, "path": "kept"}
        ).json()
        saved = http.post("/retrieve_future", json=save).json()
        step = http.post(
            "/optim_step", json={"model_id": model_id, "seq_id": 2, "adam_params": {}}
        ).json()
        http.post("/retrieve_future", json=step)
        sampler = {"session_id": session, "sampling_session_seq_id": 0, "model_path": saved["path"]}
        sampler_id = http.post("/create_sampling_session", json=sampler).json()[
            "sampling_session_id"
        ]
        server.process.send_signal(signal.SIGKILL)
        server.process.wait()
        server = Server.start(tmp_path, port=port)
        assert "the key is in" in server.log.splitlines()[-3]
        assert http.post("/retrieve_future", json=save).json() == saved
        assert "metrics" in http.post("/retrieve_future", json=step).json()
        repeated = http.post(
            "/optim_step", json={"model_id": model_id, "seq_id": 2, "adam_params": {}}
        ).json()
        assert repeated["request_id"] == step["request_id"]
        lost = http.post(
            "/optim_step", json={"model_id": model_id, "seq_id": 3, "adam_params": {}}
        ).json()
        assert "save_state" in http.post("/retrieve_future", json=lost).json()["error"]
        assert (
            http.post("/retrieve_future", json={"request_id": f"{model_id}:9"}).status_code == 410
        )
        assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 200
        ask = {
            "sampling_session_id": sampler_id,
            "seq_id": 0,
            "prompt": {"chunks": [{"tokens": [5, 6]}]},
            "num_samples": 1,
        }
        ask["sampling_params"] = {"max_tokens": 3}
        answer = http.post("/asample", json=ask).json()
        assert http.post("/retrieve_future", json={"request_id": answer["request_id"]}).json()[
            "sequences"
        ]
        assert [one["tinker_path"] for one in http.get("/checkpoints").json()["checkpoints"]] == [
            saved["path"]
        ]
    server.stop()


def test_a_silent_session_ends_and_frees_its_adapter(tmp_path: Path) -> None:
    server = Server.start(tmp_path, "--session-timeout", "1")
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": server.key}, timeout=60
    ) as http:
        session = http.post("/create_session", json={}).json()["session_id"]
        body = {
            "session_id": session,
            "model_seq_id": 0,
            "base_model": "tiny",
            "lora_config": {"rank": 4},
        }
        model_id = http.post(
            "/retrieve_future", json=http.post("/create_model", json=body).json()
        ).json()["model_id"]
        # waits for 1 to 4
        early = http.post(
            "/optim_step", json={"model_id": model_id, "seq_id": 5, "adam_params": {}}
        ).json()
        deadline = time.monotonic() + 30
        while (
            http.post("/get_info", json={"model_id": model_id}).status_code == 200
            and time.monotonic() < deadline
        ):
            time.sleep(0.2)
        assert http.post("/get_info", json={"model_id": model_id}).status_code == 404
        assert http.post("/session_heartbeat", json={"session_id": session}).status_code == 410
        assert "error" in http.post("/retrieve_future", json=early).json()
    server.stop()
