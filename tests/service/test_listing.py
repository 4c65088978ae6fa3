"""What was trained and saved is listed, described, handed out and deleted: by the SDK's own
clients, each user's own alone.
"""

from __future__ import annotations

import json
import os
import signal
import urllib.request
from pathlib import Path
from typing import Any

import httpx
import peft
import preloaded
import pytest
from programs import make_data, train
from serving import Server

from lorakit.model.load import load_model


@pytest.fixture
def client(sdk: Any) -> Any:
    service = sdk.ServiceClient(user_metadata={"project": "ducks"})
    yield service.create_lora_training_client("tiny", rank=4, seed=1).result()
    service.close("success")


def test_runs_and_checkpoints_through_the_rest_client(
    sdk: Any, client: Any, tmp_path: Path
) -> None:
    train(client, sdk.types, make_data(sdk.types, client.get_tokenizer()), 2)
    state = client.save_state("one", ttl_seconds=3600).result().path
    sampler = client.save_weights_for_sampler("two").result().path
    external = client.save_weights_external("three").result().path
    rest, run_id = sdk.RestClient(), client.model_id
    run = rest.get_training_run(run_id).result()
    assert run.base_model == "tiny" and run.lora_rank == 4 and run.is_lora and not run.corrupted
    assert (
        run.last_checkpoint.tinker_path == state
        and run.last_sampler_checkpoint.tinker_path == sampler
    )
    assert run_id in [
        one.training_run_id for one in rest.list_training_runs(limit=50).result().training_runs
    ]
    found = {one.tinker_path: one for one in rest.list_checkpoints(run_id).result().checkpoints}
    assert found.keys() == {state, sampler, external}
    assert {one.checkpoint_type for one in found.values()} == {"training", "sampler", "external"}
    assert found[state].expires_at is not None and found[sampler].expires_at is None
    assert all(one.size_bytes > 100_000 for one in found.values())
    rest.set_checkpoint_ttl_from_tinker_path(state, None).result()
    mine = {
        one.tinker_path: one for one in rest.list_user_checkpoints(limit=1000).result().checkpoints
    }
    assert found.keys() <= mine.keys() and mine[state].expires_at is None
    info = rest.get_weights_info_by_tinker_path(state).result()
    assert (info.base_model, info.lora_rank, info.train_unembed) == ("tiny", 4, True)
    urls = rest.get_external_weights_urls(external).result().urls
    for name, url in urls.items():
        urllib.request.urlretrieve(url, tmp_path / name)
    peft.PeftModel.from_pretrained(load_model("tiny"), str(tmp_path))
    broken = next(iter(urls.values())).replace("signature=", "signature=0")
    assert httpx.get(broken).status_code == 404
    rest.delete_checkpoint_from_tinker_path(sampler).result()
    assert sampler not in [
        one.tinker_path for one in rest.list_checkpoints(run_id).result().checkpoints
    ]
    with pytest.raises(sdk.NotFoundError):
        rest.delete_checkpoint_from_tinker_path(sampler).result()
    session = rest.get_session(run_id.partition(":")[0]).result()
    assert session.training_run_ids == [run_id]
    assert run_id.partition(":")[0] in rest.list_sessions().result().sessions


def test_the_tinker_command_lists_and_downloads(
    sdk: Any, client: Any, server: Server, tmp_path: Path
) -> None:
    train(client, sdk.types, make_data(sdk.types, client.get_tokenizer()), 1)
    path = client.save_state("mine").result().path

    def tinker(*arguments: str) -> Any:
        program = ["-m", "tinker.cli", "-f", "json", *arguments]
        environment = {**os.environ, **server.environment()}
        ran = preloaded.run(program, cwd=tmp_path, env=environment, timeout=120)
        # Its own threads now and then abort the interpreter when all is said and done, beside a
        # busy machine.
        assert ran.returncode in (0, -signal.SIGABRT), ran.stderr + ran.stdout
        return ran.stdout

    assert client.model_id in tinker("run", "list")
    assert json.loads(tinker("run", "info", client.model_id))["base_model"] == "tiny"
    assert path in tinker("checkpoint", "list", "--run-id", client.model_id)
    tinker("checkpoint", "download", path, "--output", str(tmp_path / "here"))
    assert list((tmp_path / "here").rglob("adapter_model.safetensors"))
    tinker("checkpoint", "delete", path, "--yes")
    assert path not in tinker("checkpoint", "list", "--run-id", client.model_id)


def test_users_see_load_and_delete_their_own_alone(
    sdk: Any, client: Any, server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = client.save_state("secret").result().path
    run_id = client.model_id
    data = ["--data", str(server.folder / "data")]
    program = ["-m", "lorakit", "serve", *data, "--new-user", "somebody else"]
    other = preloaded.run(program, check=True).stdout.split()[-1]
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": other}, timeout=60
    ) as http:
        assert http.get(f"/training_runs/{run_id}").status_code == 404
        assert http.get(f"/training_runs/{run_id}/checkpoints").status_code == 404
        assert http.delete(f"/training_runs/{run_id}/checkpoints/weights/secret").status_code == 404
        assert (
            http.get(
                f"/training_runs/{run_id}/checkpoints/weights/secret/external_weights_urls"
            ).status_code
            == 404
        )
        assert http.post("/weights_info", json={"tinker_path": path}).status_code == 404
        assert http.post("/get_info", json={"model_id": run_id}).status_code == 404
        assert (
            http.post(
                "/optim_step", json={"model_id": run_id, "seq_id": 99, "adam_params": {}}
            ).status_code
            == 404
        )
        assert http.get("/training_runs").json()["training_runs"] == []
        assert http.get("/checkpoints").json()["checkpoints"] == []
        assert http.get(f"/sessions/{run_id.partition(':')[0]}").status_code == 404
        session = http.post("/create_session", json={}).json()["session_id"]
        load = {"session_id": session, "model_seq_id": 0, "path": path, "optimizer": False}
        answer = http.post(
            "/retrieve_future", json=http.post("/load_weights", json=load).json()
        ).json()
        assert "there is no run" in answer["error"]
        steal = {
            "session_id": session,
            "model_seq_id": 1,
            "path": str(server.folder / "data"),
            "optimizer": False,
        }
        answer = http.post(
            "/retrieve_future", json=http.post("/load_weights", json=steal).json()
        ).json()
        assert "no path of a checkpoint" in answer["error"]
        sampling = {"session_id": session, "sampling_session_seq_id": 0, "model_path": path}
        assert http.post("/create_sampling_session", json=sampling).status_code == 404
        first = client.forward_backward(
            make_data(sdk.types, client.get_tokenizer()), "cross_entropy"
        )
        first.result()
        assert http.post("/retrieve_future", json={"request_id": f"{run_id}:2"}).status_code == 410
    # it is all there
    assert sdk.RestClient().get_training_run(run_id).result().training_run_id == run_id


@pytest.mark.parametrize("path", ["%2e%2e", "..%2f..%2f..", "a%00b", "%2fetc%2fpasswd", "x" * 3000])
def test_names_in_addresses_lead_nowhere_else(server: Server, client: Any, path: str) -> None:
    with httpx.Client(
        base_url=f"{server.url}/api/v1", headers={"X-API-Key": server.key}, timeout=60
    ) as http:
        for address in (
            f"/training_runs/{client.model_id}/checkpoints/weights/{path}/external_weights_urls",
            f"/training_runs/{path}/checkpoints",
            f"/files/{client.model_id}/weights/{path}/adapter_config.json",
            f"/files/{client.model_id}/weights/x/{path}",
            f"/samplers/{path}",
        ):
            assert http.get(address).status_code in (400, 404), address


def test_keys_are_kept_as_digests(server: Server) -> None:
    folder = server.folder / "data"
    assert (folder / "api-key").stat().st_mode & 0o777 == 0o600
    assert server.log.count("tml-") == 1  # shown once
    for path in folder.glob("lorakit.db*"):
        assert server.key.encode() not in path.read_bytes()
