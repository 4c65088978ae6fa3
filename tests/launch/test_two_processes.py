"""`lorakit train trainer.devices=2` as a user starts it: one voice, one run folder, and an end
that says why.
"""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path

import preloaded
import psutil
import pytest

from lorakit.runs.folder import History, open_run

REPOSITORY = Path(__file__).resolve().parents[2]
SMALL = (
    *(
        "data.batch_size=4",
        "data.window_rows=64",
        "data.val_rows=4",
        "data.check_token_rows=100",
        "data.max_tokens=128",
    ),
    *(
        "trainer.eval_every_steps=3",
        "callbacks.samples.num_prompts=1",
        "callbacks.samples.max_tokens=4",
    ),
    *("lora.rank=4", "lora.alpha=4", "trainer.threads=1", "logger=none"),
)
DEADLINE_S = 60  # within which a job ends when one of its processes has died


def start(*arguments: str, cwd: Path, path: Path = REPOSITORY) -> preloaded.Process:
    environment = {
        **os.environ,
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{path}",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    program = ["-m", "lorakit", "train", *SMALL, *arguments]
    return preloaded.start(program, cwd=cwd, env=environment)


def workers_of(process: preloaded.Process) -> list[psutil.Process]:
    """The processes that train, by rank."""
    everyone = psutil.Process(process.pid).children(recursive=True)
    programs = {"lorakit.cli.worker", str(Path(preloaded.__file__))}
    found = [child for child in everyone if programs & set(child.cmdline())]
    watchers = {child.pid for worker in found for child in worker.children()}
    found = [child for child in found if child.pid not in watchers]
    return sorted(found, key=lambda child: child.pid)  # the first is started first


def wait_for_step(history: History, step: int, process: preloaded.Process) -> None:
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
    assert not any(
        worker.is_running() and worker.status() != psutil.STATUS_ZOMBIE for worker in workers
    )

    # The same command, now in one process.
    history = History(tmp_path / "runs" / "it")
    done = max(record["step"] for record in history.read())
    last = max(
        int(path.name.removeprefix("step-"))
        for path in (tmp_path / "runs" / "it" / "checkpoints").glob("step-*")
    )
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


def test_two_processes_share_rows_and_one_goes_on(tmp_path: Path) -> None:
    settings = (
        "trainer.max_steps=4",
        "trainer.precision=32-true",
        "checkpoint.every_steps=2",
        "data.packing=true",
    )
    for name, more in (
        ("shared", ("trainer.devices=2", "strategy=auto", "strategy.sequence_parallel=2")),
        ("one", ("trainer.devices=1",)),
    ):
        process = start(f"run={name}", *settings, *more, cwd=tmp_path)
        output, errors = process.communicate(timeout=180)
        assert process.returncode == 0, output + errors
    ours, theirs = (History(tmp_path / "runs" / name).read() for name in ("shared", "one"))
    figures = ("train/loss", "train/grad_norm", "val/loss", "expert_load/layer_00_max")
    for our, their in zip(ours, theirs, strict=True):
        assert our.keys() & {*figures} == their.keys() & {*figures}
        assert {name: our[name] for name in figures if name in our} == pytest.approx(
            {name: their[name] for name in figures if name in their}, rel=1e-4
        )
    assert open_run(tmp_path / "runs" / "shared").info["batches_per_step"] == 1
    assert (tmp_path / "runs/shared/samples.jsonl").read_text() == (
        tmp_path / "runs/one/samples.jsonl"
    ).read_text()

    process = start(
        "run=no",
        *settings,
        "trainer.devices=2",
        "strategy=ddp",
        "strategy.sequence_parallel=3",
        cwd=tmp_path,
    )
    _, errors = process.communicate(timeout=120)
    assert (
        process.returncode == 2
        and "it must divide the number of processes, 2; choose 1, 2" in errors
    )
    assert not (tmp_path / "runs" / "no").exists()


def test_a_bad_row_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text(json.dumps({"prompt": 3}) + "\n", encoding="utf-8")
    process = start(
        "data.path=bad.jsonl",
        "model.path=tiny",
        "data.val_rows=null",
        "trainer.devices=2",
        cwd=tmp_path,
    )
    _, errors = process.communicate(timeout=120)
    assert process.returncode == 2
    assert errors.count("columns not recognised") == 1 and "Traceback" not in errors
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_a_stalled_rank_is_named_and_the_job_ends(tmp_path: Path) -> None:
    process = start(
        "run=it", "trainer.max_steps=400", "strategy=ddp", "trainer.devices=2", cwd=tmp_path
    )
    wait_for_step(History(tmp_path / "runs" / "it"), 2, process)
    everyone = psutil.Process(process.pid).children(recursive=True)
    workers_of(process)[1].send_signal(signal.SIGSTOP)
    stopped = time.monotonic()
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2 and time.monotonic() - stopped < DEADLINE_S
    assert "rank 1 (host" in errors and "is stalled" in errors and "Traceback" not in errors
    assert not [
        child for child in everyone if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.slow
def test_a_job_restarts_by_itself_and_ends_with_the_same_loss(tmp_path: Path) -> None:
    settings = (
        "trainer.max_steps=14",
        "checkpoint.every_steps=4",
        "strategy=zero3",
        "trainer.devices=2",
    )
    whole = start("run=whole", *settings, cwd=tmp_path)
    output, errors = whole.communicate(timeout=180)
    assert whole.returncode == 0, output + errors
    process = start("run=it", "launch.max_restarts=1", *settings, cwd=tmp_path)
    wait_for_step(History(tmp_path / "runs" / "it"), 6, process)
    workers_of(process)[1].send_signal(signal.SIGKILL)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, output + errors
    assert "restart 1 of 1" in errors and "resuming from step" in output
    ours, theirs = (History(tmp_path / "runs" / name).read() for name in ("it", "whole"))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs]
    assert abs(ours[-1]["val/loss"] - theirs[-1]["val/loss"]) < 1e-5
    assert (
        max(
            abs(a["train/loss"] - b["train/loss"])
            for a, b in zip(ours, theirs, strict=True)
            if "train/loss" in a
        )
        < 1e-5
    )


@pytest.mark.slow
def test_a_step_that_hangs_has_a_limit_and_an_evaluation_has_none(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, time, lightning as L\n"
        "class Sleep(L.Callback):\n"
        "    def on_validation_start(self, trainer, module):\n"
        "        time.sleep(20 if os.environ['RANK'] == '1' and trainer.global_step == 3 else 0)\n"
        "    def on_before_backward(self, trainer, module, loss):\n"
        "        time.sleep(300 if os.environ['RANK'] == '1' and trainer.global_step == 4 else 0)\n"
    )
    settings = (
        "trainer.devices=2",
        "strategy=ddp",
        "launch.collective_timeout_seconds=8",
        "+callbacks.sleep._target_=mine.Sleep",
    )
    process = start("run=it", "trainer.max_steps=400", *settings, cwd=tmp_path, path=tmp_path)
    output, errors = process.communicate(timeout=150)
    assert process.returncode == 2
    assert "a step has not ended in launch.collective_timeout_seconds=8" in errors, output + errors
    assert "rank 0 (host" in errors and "rank 1 (host" in errors and "in step 5, " in errors
    assert max(record["step"] for record in History(tmp_path / "runs" / "it").read()) == 4


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_at_the_same_step_with_a_checkpoint(tmp_path: Path) -> None:
    process = start(
        "run=it",
        "trainer.max_steps=400",
        "checkpoint.every_steps=0",
        "strategy=ddp",
        "trainer.devices=2",
        cwd=tmp_path,
    )
    wait_for_step(History(tmp_path / "runs" / "it"), 2, process)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 130
    assert "continue with: lorakit train " in output and " run=it resume=true" in output
    run = open_run(tmp_path / "runs" / "it")
    assert run.state == "interrupted"
    assert (run.checkpoints / f"step-{run.info['step']:06d}").is_dir()


@pytest.mark.slow
def test_a_rank_that_is_out_of_memory_is_named_and_the_job_ends(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "import os, resource, lightning as L\n"
        "class Tight(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, *_):\n"
        "        if os.environ['RANK'] == '1' and trainer.global_step == 3:\n"
        "            pages = int(open('/proc/self/statm').read().split()[0])\n"
        "            resource.setrlimit(resource.RLIMIT_AS, (pages * 4096 + 2**20,) * 2)\n"
        "            with open('tight', 'w'): pass\n"
        "            import torch; self.more = [torch.zeros(2**22) for _ in range(40)]\n"
    )
    settings = (
        "run=it",
        "trainer.max_steps=400",
        "strategy=ddp",
        "trainer.devices=2",
        "+callbacks.tight._target_=mine.Tight",
    )
    process = start(*settings, cwd=tmp_path, path=tmp_path)
    end = time.monotonic() + 120
    while not (tmp_path / "tight").exists():
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.1)
    everyone = psutil.Process(process.pid).children(recursive=True)
    begun = time.monotonic()
    _, errors = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 2 and time.monotonic() - begun < DEADLINE_S
    assert (
        "rank 1 (host" in errors and "is out of memory" in errors and "data.batch_size" in errors
    ), errors
    assert not [
        child for child in everyone if child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    ]


@pytest.mark.slow
def test_two_minutes_of_loading_writing_or_evaluating_in_one_process_are_waited_for(
    tmp_path: Path,
) -> None:
    """Far longer than a step may take, and than the operations in which the other process waits
    would wait by themselves.
    """
    (tmp_path / "mine.py").write_text(
        "import os, time, lightning as L\n"
        "class Sleep(L.Callback):\n"
        "    def setup(self, trainer, module, stage):\n"
        "        time.sleep(120 if os.environ['RANK'] == '1' else 0)\n"
        "    def on_save_checkpoint(self, trainer, module, checkpoint):\n"
        "        time.sleep(120 if os.environ['RANK'] == '0' and trainer.global_step == 1 else 0)\n"
        "    def on_validation_start(self, trainer, module):\n"
        "        time.sleep(120 if os.environ['RANK'] == '1' and trainer.global_step == 3 else 0)\n"
    )
    settings = (
        "trainer.devices=2",
        "strategy=zero2",
        "launch.collective_timeout_seconds=20",
        "checkpoint.every_steps=1",
    )
    begun = time.monotonic()
    process = start(
        "run=it",
        "trainer.max_steps=4",
        *settings,
        "+callbacks.sleep._target_=mine.Sleep",
        cwd=tmp_path,
        path=tmp_path,
    )
    output, errors = process.communicate(timeout=550)
    assert process.returncode == 0, output + errors
    assert time.monotonic() - begun > 360 and open_run(tmp_path / "runs" / "it").is_finished


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "zero1", "zero2", "zero3", "zero3_offload"])
def test_what_any_strategy_has_trained_is_evaluated_sampled_and_merged(
    tmp_path: Path, strategy: str
) -> None:
    settings = (
        f"strategy={strategy}",
        "trainer.devices=2",
        "trainer.max_steps=4",
        "trainer.precision=32-true",
    )
    process = start("run=it", *settings, cwd=tmp_path)
    output, errors = process.communicate(timeout=180)
    assert process.returncode == 0, output + errors
    run = open_run(tmp_path / "runs" / "it")
    assert (run.folder / "samples.jsonl").read_text().count("\n") >= 1 and run.info["val_loss"] > 0
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    data = ("--data", "pig_latin/heldout", "--limit", "4", "--json", "figures.json")
    for more in (
        ("evaluate", "it", *data),
        ("sample", "it", "--max-tokens", "4", "--", "a"),
        ("merge", "it", "--out", "merged"),
    ):
        done = preloaded.run(["-m", "lorakit", *more], cwd=tmp_path, env=environment)
        assert done.returncode == 0, done.stderr
    figures = json.loads((tmp_path / "figures.json").read_text())
    # the adapter is exported in bf16
    assert figures["loss"] == pytest.approx(run.info["val_loss"], rel=0.02)
