"""The same program on several processes: the same losses, and a clean end where one of them is
gone.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import preloaded
import pytest
from serving import Server, free_port

HERE = Path(__file__).parent


def run_program(folder: Path, strategy: str, processes: int) -> dict[str, Any]:
    folder.mkdir()
    program = [str(HERE / "executor_program.py"), str(folder), strategy]
    if processes > 1:
        ran = preloaded.run_ranks(program, processes, timeout=180, cwd=HERE)
    else:
        ran = preloaded.run(program, timeout=180, cwd=HERE)
    assert ran.returncode == 0, ran.stderr[-3000:]
    return dict(json.loads((folder / "found.json").read_text()))


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return run_program(tmp_path_factory.mktemp("alone") / "run", "single", 1)


@pytest.mark.parametrize(
    "strategy",
    [
        "zero2",
        "zero3",
        pytest.param("ddp", marks=pytest.mark.slow),
        pytest.param("zero1", marks=pytest.mark.slow),
    ],
)
def test_two_processes_find_what_one_does(
    strategy: str, alone: dict[str, Any], tmp_path: Path
) -> None:
    found = run_program(tmp_path / "run", strategy, 2)
    assert found.keys() == alone.keys()
    for name, value in alone.items():
        if name in ("sample", "error"):
            assert found[name] == value
        elif name == "logprobs":
            assert all(
                np.allclose(ours, theirs, atol=1e-5)
                for ours, theirs in zip(found[name], value, strict=True)
            )
        else:
            assert found[name] == pytest.approx(value, rel=1e-5, abs=2e-6), name
    assert found["resumed"] == found["after"]  # to the bit, in as many processes


@pytest.mark.slow
def test_a_server_of_two_processes_serves_and_ends_where_one_is_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import tinker
    from programs import make_data, train

    port = free_port()
    log = (tmp_path / "serve.log").open("w")
    process = subprocess.Popen(
        [
            *(
                sys.executable,
                "-m",
                "torch.distributed.run",
                "--nproc-per-node=2",
                f"--master-port={free_port()}",
                "-m",
                "lorakit",
            ),
            *(
                "serve",
                "--model",
                "tiny",
                "--strategy",
                "zero3",
                "--data",
                str(tmp_path / "data"),
                "--port",
                str(port),
            ),
        ],
        stdout=log,
        stderr=log,
    )
    server = Server(tmp_path, port, process, "")  # type: ignore[arg-type]
    deadline = time.monotonic() + 120
    while "programs for the tinker SDK" not in server.log and time.monotonic() < deadline:
        time.sleep(0.1)
    assert "programs for the tinker SDK" in server.log, server.log
    for name, value in server.environment().items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", f"{os.environ['HF_HOME']}/hub")
    service = tinker.ServiceClient()
    client = service.create_lora_training_client("tiny", rank=4, seed=1).result()
    data = make_data(tinker.types, client.get_tokenizer())
    losses = train(client, tinker.types, data, 3)
    assert losses[-1] < losses[0]
    sampler = client.save_weights_and_get_sampling_client().result()
    params = tinker.types.SamplingParams(max_tokens=3, stop=[])
    assert len(sampler.sample(data[0].model_input, 1, params).result(60).sequences[0].tokens) == 3
    children = subprocess.run(
        ["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True
    ).stdout.split()
    followers = [
        pid
        for pid in children
        if b"RANK=1" in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
    ]
    os.kill(int(followers[0]), signal.SIGKILL)
    began = time.monotonic()
    with pytest.raises(Exception):  # noqa: B017 - an error of the server's, or of a connection that is gone
        for _ in range(100):
            client.forward_backward(data, "cross_entropy").result(30)
    assert time.monotonic() - began < 60
    assert process.wait(60) != 0
