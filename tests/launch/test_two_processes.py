"""`lorakit train trainer.devices=2` as a user starts it: one voice, one run folder, and an end that says why."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from lorakit.weights.run import History, open_run

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    *("data.batch_size=4", "data.window_rows=64", "data.val_rows=4", "data.check_token_rows=100", "data.max_tokens=128"),
    *("trainer.eval_every_steps=3", "callbacks.samples.num_prompts=1", "callbacks.samples.max_tokens=4"),
    *("lora.rank=4", "lora.alpha=4", "trainer.threads=1", "logger=none"),
)
DEADLINE_S = 60  # within which a job ends when one of its processes has died


def start(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lorakit", "train", *SMALL, *arguments]
    return subprocess.Popen(command, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def workers_of(process: subprocess.Popen[str]) -> list[psutil.Process]:
    """The processes that train, by rank."""
    found = [child for child in psutil.Process(process.pid).children(recursive=True) if "lorakit.cli.worker" in child.cmdline()]
    return sorted(found, key=lambda child: int(child.environ()["RANK"]))


def wait_for_step(history: History, step: int, process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 120
    while not any(record["step"] >= step for record in history.read()):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < end, "no step in two minutes"
        time.sleep(0.2)


def test_a_killed_rank_ends_the_job_and_another_number_of_processes_goes_on(tmp_path: Path) -> None:
    settings = ("run=it", "trainer.max_steps=400", "checkpoint.every_steps=2", "strategy=zero2")
    process = start(*settings, "trainer.devices=2", cwd=tmp_path)
    wait_for_step(History(tmp_path / "runs" / "it"), 5, process)
    workers = workers_of(process)
    assert len(workers) == 2
    workers[1].send_signal(signal.SIGKILL)
    killed = time.monotonic()
    output, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2 and time.monotonic() - killed < DEADLINE_S
    assert "rank 1 was killed by SIGKILL" in errors and "resume=true" in errors
    assert "Traceback" not in errors
    assert output.count("trainable parameters") == 1  # the first process speaks for all
    assert not any(worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers)

    # The same command, now in one process.
    history = History(tmp_path / "runs" / "it")
    done = max(record["step"] for record in history.read())
    last = max(int(path.name.removeprefix("step-")) for path in (tmp_path / "runs" / "it" / "checkpoints").glob("step-*"))
    one = start(*settings[:3], "resume=true", "trainer.devices=1", "strategy=single", cwd=tmp_path)
    wait_for_step(history, done + 2, one)
    one.send_signal(signal.SIGTERM)
    output, errors = one.communicate(timeout=DEADLINE_S)
    assert one.returncode == 128 + signal.SIGTERM, errors
    assert "trainer.accumulate_grad_batches=2: the run has 2 micro-batches in a step" in output
    assert f"resuming from step {last}" in output
    steps = [record["step"] for record in history.read() if "train/loss" in record]
    assert steps == sorted(steps) and len({*steps}) == len(steps) >= done + 2
    assert open_run(tmp_path / "runs" / "it").state == "interrupted"


def test_a_bad_row_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": 3}) + "\n", encoding="utf-8")
    process = start("data.path=bad.jsonl", "model.path=tiny", "data.val_rows=null", "trainer.devices=2", cwd=tmp_path)
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("columns not recognised") == 1 and "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    process = start(
        "run=it", "trainer.max_steps=400", "checkpoint.every_steps=0", "strategy=ddp", "trainer.devices=2", cwd=tmp_path
    )
    wait_for_step(History(tmp_path / "runs" / "it"), 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "continue with: the same command and run=it resume=true" in output
    run = open_run(tmp_path / "runs" / "it")
    assert run.state == "interrupted"
    assert (run.checkpoints / f"step-{run.info['step']:06d}").is_dir()
