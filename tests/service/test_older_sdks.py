"""Programs for older SDKs, each SDK in a folder of its own that comes before the installed one."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
from pathlib import Path

import httpx
import pytest
from serving import Server

RECIPE = Path(__file__).resolve().parents[2] / "recipes" / "pig_latin.py"
MORE = """
path = training.save_state("a").result().path
training.load_state(path).result()
print("loss", training.forward(data, "cross_entropy").result().metrics["loss:sum"])
print("scored", len(sampling.compute_logprobs(prompt).result()))
service.create_training_client_from_state(path)
print("path", path)
"""


@pytest.mark.slow
@pytest.mark.parametrize("version", ["0.24.1", "0.13.1"])
def test_an_older_sdk_runs_its_program(version: str, server: Server, tmp_path: Path) -> None:
    folder = tmp_path / "sdk"
    install = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "--quiet",
        "--no-deps",
        "--target",
        str(folder),
        f"tinker=={version}",
    ]
    if (
        installed := subprocess.run(install, capture_output=True, text=True, check=False)
    ).returncode:
        pytest.skip(f"tinker {version} cannot be installed: {installed.stderr[-200:]}")
    program = tmp_path / "program.py"
    program.write_text(RECIPE.read_text() + MORE)
    environment = {**os.environ, **server.environment(), "PYTHONPATH": str(folder)}
    ran = subprocess.run(
        [sys.executable, "-W", "ignore", str(program), "--server"],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env=environment,
        timeout=300,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.count(" ubber-ray uck-day") == 4 and "scored" in ran.stdout
    run_id, kind, name = ran.stdout.split()[-1].removeprefix("tinker://").split("/")
    with httpx.Client(headers={"X-API-Key": server.key}, follow_redirects=True, timeout=60) as http:
        answer = http.get(
            f"{server.url}/api/v1/training_runs/{run_id}/checkpoints/{kind}/{name}/archive"
        )
    (tmp_path / "a.tar").write_bytes(answer.content)
    with tarfile.open(tmp_path / "a.tar") as tar:
        assert "adapter_model.safetensors" in tar.getnames()
