"""Two hosts with a network between them, and a real SLURM over both: scripts/cluster sets them up.

Where that cannot be done, without root or SLURM, these tests fail and say what is missing; `pytest
-m "not cluster"` leaves them out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from lorakit.runs.folder import History, open_run

REPOSITORY = Path(__file__).resolve().parents[2]
HOSTS, SLURM = REPOSITORY / "scripts/cluster/hosts.sh", REPOSITORY / "scripts/cluster/slurm.sh"
SMALL = (
    *("data.batch_size=4", "data.window_rows=64", "data.val_rows=4", "data.check_token_rows=100"),
    *(
        "lora.rank=4",
        "lora.alpha=4",
        "trainer.threads=1",
        "logger=none",
        "trainer.precision=32-true",
    ),
)
pytestmark = [pytest.mark.slow, pytest.mark.cluster]


def on(host: str, *command: str, cwd: Path, **environment: str) -> subprocess.Popen[str]:
    variables = {
        **os.environ,
        "PYTHONPATH": str(REPOSITORY),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
        "TORCH_CPP_LOG_LEVEL": "ERROR",
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        **environment,
    }
    return subprocess.Popen(
        [str(HOSTS), "run", host, *command],
        cwd=cwd,
        env=variables,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )


def read(process: subprocess.Popen[str], timeout: float = 120) -> str:
    return process.communicate(timeout=timeout)[0]


def train_on_both(
    cwd: Path, *arguments: str, second: tuple[str, ...] = ()
) -> list[subprocess.Popen[str]]:
    """Type what `lorakit launch` prints, on each host."""
    printed = read(
        on(
            "n1",
            sys.executable,
            "-m",
            "lorakit",
            "launch",
            "nodes=2",
            "train",
            *SMALL,
            *arguments,
            cwd=cwd,
        )
    )
    lines = [line for line in printed.splitlines() if line.startswith("torchrun")]
    assert len(lines) == 2, printed
    ends = ("", " ".join(["", *second]))
    return [on(f"n{n}", "bash", "-c", f"exec {lines[n - 1]}{ends[n - 1]}", cwd=cwd) for n in (1, 2)]


def wait_for_step(folder: Path, step: int, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not any(record["step"] >= step for record in History(folder).read()):
        assert time.monotonic() < end, f"no step {step} in {seconds} s"
        time.sleep(0.3)


@pytest.fixture
def hosts() -> Iterator[None]:
    subprocess.run([HOSTS, "down"], check=True)
    subprocess.run([HOSTS, "up"], check=True)
    yield
    subprocess.run([HOSTS, "down"], check=True)


@pytest.fixture
def slurm(hosts: None, tmp_path: Path) -> Iterator[str]:
    subprocess.run([SLURM, "up", tmp_path / "slurm"], check=True, timeout=60)
    yield str(tmp_path / "slurm" / "slurm.conf")
    subprocess.run([SLURM, "down", tmp_path / "slurm"], check=True)


def test_two_hosts_train_one_run(hosts: None, tmp_path: Path) -> None:
    outputs = [
        read(process) for process in train_on_both(tmp_path, "run=it", "trainer.max_steps=4")
    ]
    assert "4 steps, 32-true on cpu, 2 processes" in outputs[0], outputs
    run = open_run(tmp_path / "runs" / "it")
    assert run.is_finished and run.info["batches_per_step"] == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["it"]


def test_hosts_that_differ_are_refused_before_the_first_step(hosts: None, tmp_path: Path) -> None:
    processes = train_on_both(tmp_path, "run=it", "trainer.max_steps=4", second=("lora.alpha=7",))
    outputs = [read(process) for process in processes]
    assert "lora.alpha: 4 on rank 0 (host n1); 7 on rank 1 (host n2)" in outputs[0]
    assert (
        all(process.returncode for process in processes) and not (tmp_path / "runs" / "it").exists()
    )


def test_a_cut_network_ends_the_job_on_both_hosts(hosts: None, tmp_path: Path) -> None:
    processes = train_on_both(tmp_path, "run=it", "trainer.max_steps=4000")
    wait_for_step(tmp_path / "runs" / "it", 2)
    subprocess.run([HOSTS, "cut"], check=True)
    cut = time.monotonic()
    outputs = [read(process, timeout=60) for process in processes]
    assert time.monotonic() - cut < 60 and all(process.returncode for process in processes)
    assert "rank 1 (host n2)" in outputs[0] and "its machine or the network is gone" in outputs[0]
    assert "cannot reach rank 0 (host n1): its machine or the network is gone" in outputs[1]


def test_a_rank_that_is_killed_is_started_again_on_both_hosts(hosts: None, tmp_path: Path) -> None:
    settings = ("trainer.max_steps=20", "checkpoint.every_steps=4")
    assert all(
        "Error" not in read(process) for process in train_on_both(tmp_path, "run=whole", *settings)
    )
    processes = train_on_both(tmp_path, "run=it", *settings, "launch.max_restarts=1")
    wait_for_step(tmp_path / "runs" / "it", 6)
    everyone = psutil.Process(processes[1].pid).children(recursive=True)
    workers = [
        child
        for child in everyone
        if child.environ().get("RANK") == "1" and child.parent().environ().get("RANK") is None
    ]
    workers[0].kill()
    outputs = [read(process, timeout=180) for process in processes]
    ours, theirs = (History(tmp_path / "runs" / name).read() for name in ("it", "whole"))
    assert "restart 1 of 1" in outputs[0] and "resuming from step" in outputs[0], outputs
    assert [process.returncode for process in processes] == [0, 0]
    assert abs(ours[-1]["val/loss"] - theirs[-1]["val/loss"]) < 1e-5 and len(ours) == len(theirs)


def test_slurm_trains_on_two_nodes_and_goes_on_when_it_queues_again(
    slurm: str, tmp_path: Path
) -> None:
    settings = (
        "environment={OMP_NUM_THREADS: 1}",
        "train",
        *SMALL,
        "trainer.max_steps=30",
        "checkpoint.every_steps=0",
    )
    launch = (sys.executable, "-m", "lorakit", "launch", "slurm", "nodes=2")
    said = read(on("n1", *launch, *settings, "run=it", cwd=tmp_path, SLURM_CONF=slurm))
    assert "\njob 1: it, " in f"\n{said}", said
    folder = tmp_path / "runs" / "it"
    wait_for_step(folder, 4)
    read(on("n1", "scancel", "--signal=TERM", "1", cwd=tmp_path, SLURM_CONF=slurm))
    end = time.monotonic() + 300  # SLURM itself waits for two minutes before it starts a job again
    while not open_run(folder).is_finished:
        assert time.monotonic() < end, (tmp_path / "runs/.slurm/it-1.out").read_text()
        time.sleep(1)
    output = (tmp_path / "runs/.slurm/it-1.out").read_text()
    assert "30 steps, 32-true on cpu, 2 processes" in output
    assert (
        "interrupted after" in output
        and "resuming from step" in output
        and "finished 30 steps" in output
    )
    assert (
        "job 1 queues again" in output
        and "rank 1 (host n2) follows rank 0 on n1" in output
        and "Traceback" not in output
    )
    steps = [record["step"] for record in History(folder).read() if "train/loss" in record]
    assert steps == [*range(1, 31)]
