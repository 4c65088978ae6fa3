"""Killed at any moment, then resumed: the same losses and the same bytes as a run that nobody
killed.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import preloaded
import pytest
from program import REPOSITORY, start
from small import SMALL

from lorakit.errors import CheckpointError
from lorakit.pipeline.resume import _find_unfinished, command_to_continue
from lorakit.runs.folder import Run, create_run, hold, list_runs, open_run

Call = Callable[..., tuple[int, str, str]]
SETTINGS = (
    *SMALL,
    *(
        "trainer.max_steps=10",
        "trainer.accumulate_grad_batches=2",
        "trainer.threads=1",
        "checkpoint.every_steps=1",
    ),
    *("lora.dropout=0.1", "lora.experts=false", "trainer.eval_every_steps=4"),
)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that nobody killed."""
    folder = tmp_path_factory.mktemp("whole")
    process = start("train", "run=whole", *SETTINGS, cwd=folder)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    return folder / "runs/whole"


def test_a_killed_run_ends_as_if_it_had_not_been(whole: Path, tmp_path: Path) -> None:
    _kill_when(
        start("train", "run=cut", *SETTINGS, cwd=tmp_path),
        lambda: len(_history(tmp_path / "runs/cut")) >= 5,
    )
    run = open_run(tmp_path / "runs/cut")
    assert run.info["status"] == "running" and run.state == "killed"
    with hold(run):
        assert run.state == "running"
    process = start("train", "run=cut", *SETTINGS, "resume=true", cwd=tmp_path)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert "resuming from step" in out
    _assert_same(whole, tmp_path / "runs/cut")


def test_a_run_that_ended_before_its_first_step_gives_its_name_back(tmp_path: Path) -> None:
    run = create_run(tmp_path, "early", config_text="a: 1", info={})
    lock = hold(run)
    with pytest.raises(CheckpointError, match="never overwritten"):  # a process is at it
        create_run(tmp_path, "early", config_text="a: 2", info={})
    lock.close()
    assert create_run(tmp_path, "early", config_text="a: 2", info={}).config_text() == "a: 2"
    (run.folder / "run.json").unlink()  # killed while the folder was made
    run = create_run(tmp_path, "early", config_text="a: 3", info={})
    (run.folder / "history.jsonl").write_text("{}")
    with pytest.raises(CheckpointError, match="never overwritten"):
        create_run(tmp_path, "early", config_text="a: 4", info={})


def test_resume_passes_over_a_newer_run_that_never_made_a_step(tmp_path: Path) -> None:
    made = create_run(tmp_path, "made", config_text="", info={"experiment": "x", "created": "1"})
    (made.folder / "history.jsonl").write_text('{"step": 1}\n')
    create_run(tmp_path, "failed", config_text="", info={"experiment": "x", "created": "2"})
    found = _find_unfinished(tmp_path, None, "x")
    assert found is not None and found.name == "made"


def test_a_folder_that_is_no_run_does_not_hide_the_others(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    create_run(tmp_path, "good", config_text="", info={})
    for name, text in (("list", "[]"), ("torn", "{"), ("other", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text(text)
    assert [run.name for run in list_runs(tmp_path)] == ["good"]
    assert capsys.readouterr().err.count("left out: ") == 3


def test_paths_run_is_filled_in_wherever_it_is_used(tmp_path: Path) -> None:
    mine = ("callbacks.samples.prompts=['${paths.run}/y']", "logger=null", "trainer.max_steps=4")
    process = start("train", "run=other", *SETTINGS, *mine, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    samples = (tmp_path / "runs/other/samples.jsonl").read_text()
    assert "runs/other/y" in samples
    assert "{the run" not in (tmp_path / "runs/other/config.yaml").read_text()


@pytest.mark.slow
def test_a_run_that_had_decided_to_stop_early_stops_when_resumed(tmp_path: Path) -> None:
    stopping = (
        *SETTINGS,
        "optim.lr=1e-12",
        "trainer.max_steps=40",
        "callbacks=[default,early_stopping]",
        "checkpoint.every_steps=0",
    )
    stopping += ("callbacks.early_stopping.patience=1", "callbacks.early_stopping.min_delta=1.0")
    process = start("train", "run=early", *stopping, cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    file = tmp_path / "runs/early/run.json"
    step = json.loads(file.read_text())["step"]
    # as a kill behind the last checkpoint leaves it
    file.write_text(file.read_text().replace('"finished"', '"running"'))
    process = start("train", "run=early", *stopping, "resume=true", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    assert json.loads(file.read_text())["step"] == step == 8


@pytest.mark.parametrize(
    "signum", [signal.SIGINT, pytest.param(signal.SIGTERM, marks=pytest.mark.slow)]
)
def test_a_signal_ends_it_cleanly_with_a_checkpoint(
    whole: Path, tmp_path: Path, signum: signal.Signals
) -> None:
    process = start("train", "run=cut", *SETTINGS, "checkpoint.every_steps=0", cwd=tmp_path)
    _wait_for(lambda: len(_history(tmp_path / "runs/cut")) >= 2, process)
    process.send_signal(signum)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 128 + signum and "Traceback" not in err, err
    assert "interrupted after" in out and "resume=true" in out
    assert json.loads((tmp_path / "runs/cut/run.json").read_text())["status"] == "interrupted"
    assert list((tmp_path / "runs/cut/checkpoints").glob("step-*"))
    # the newest unfinished one
    process = start("train", *SETTINGS, "checkpoint.every_steps=0", "resume=true", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0, err
    _assert_same(whole, tmp_path / "runs/cut")


@pytest.mark.slow
@pytest.mark.parametrize("delay", [0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5])
def test_a_storm_of_kills_changes_nothing(whole: Path, tmp_path: Path, delay: float) -> None:
    run = tmp_path / "runs/cut"
    for count in (2, 4, 6, 8, 10, 12):
        process = start("train", "run=cut", *SETTINGS, "resume=auto", cwd=tmp_path)
        reached = _kill_when(process, lambda count=count: len(_history(run)) >= count, delay=delay)
        if not reached:
            break
    process = start("train", "run=cut", *SETTINGS, "resume=auto", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 or "is finished" in err, err
    _assert_same(whole, run)


@pytest.mark.slow
def test_killed_within_the_writing_of_a_checkpoint_the_last_one_stays(
    whole: Path, tmp_path: Path
) -> None:
    run = tmp_path / "runs/cut"
    for _ in range(6):
        process = start("train", "run=cut", *SETTINGS, "resume=auto", cwd=tmp_path)
        if not _kill_when(
            process, lambda: bool(list(run.glob("checkpoints/.writing-*"))), poll=0.0
        ):
            break
    process = start("train", "run=cut", *SETTINGS, "resume=auto", cwd=tmp_path)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 0 or "is finished" in err, err
    _assert_same(whole, run)


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["on_train_batch_start", "on_validation_start"])
def test_interrupted_in_its_last_step_or_evaluation_a_run_is_evaluated_once(
    whole: Path, tmp_path: Path, moment: str
) -> None:
    (tmp_path / "mine.py").write_text(
        f"import os, signal, lightning as L\nclass Press(L.Callback):\n    def {moment}(self,"
        " trainer, *_):\n        if trainer.global_step == (10 if 'validation' in"
        " os.environ['MOMENT'] else 9) and not os.path.exists('pressed'):\n           "
        " open('pressed', 'w').close(); os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    environment = {"PYTHONPATH": f"{REPOSITORY}{os.pathsep}{tmp_path}", "MOMENT": moment}
    settings = (
        "train",
        "run=cut",
        *SETTINGS,
        "+callbacks.press._target_=mine.Press",
        "resume=auto",
    )
    run, codes = tmp_path / "runs/cut", []
    for _ in range(2):
        process = start(*settings, cwd=tmp_path, env=environment)
        _, err = process.communicate(timeout=120)
        codes.append(process.returncode)
    # In the last evaluation there is nothing left to interrupt: the run is finished, and the second
    # try is told so.
    assert codes == ([143, 0] if moment == "on_train_batch_start" else [0, 2]), err
    _assert_same(whole, run)
    info = json.loads((run / "run.json").read_text())
    assert info["status"] == "finished" and info["loss"] > 0 and info["val_loss"] > 0


def test_another_config_is_refused_and_the_keys_are_named(workplace: Path, lorakit: Call) -> None:
    settings = (*SMALL, "trainer.max_steps=2", "run=one", "callbacks.samples=null")
    assert lorakit("train", *settings)[0] == 0
    file = workplace / "runs/one/run.json"
    # as a kill right at the end leaves it
    file.write_text(file.read_text().replace('"finished"', '"running"'))
    code, _, err = lorakit("train", *settings, "resume=true", "lora.rank=8", "optim.lr=1e-3")
    assert (
        code == 2 and "lora.rank: 4 then, 8 now" in err and "optim.lr: 0.005 then, 0.001 now" in err
    )
    file.write_text(file.read_text().replace('"data_fingerprint": "', '"data_fingerprint": "0'))
    code, _, err = lorakit("train", *settings, "resume=true")
    assert code == 2 and "are not those that the run began with" in err


def test_a_damaged_checkpoint_is_passed_over_and_said(workplace: Path, lorakit: Call) -> None:
    settings = (
        *SMALL,
        "trainer.max_steps=4",
        "run=one",
        "callbacks.samples=null",
        "checkpoint.every_steps=1",
    )
    assert lorakit("train", *settings)[0] == 0
    before = (workplace / "runs/one/adapter/adapter_model.safetensors").read_bytes()
    file = workplace / "runs/one/run.json"
    file.write_text(file.read_text().replace('"finished"', '"running"'))
    state = workplace / "runs/one/checkpoints/step-000004/training_state.ckpt"
    state.write_bytes(state.read_bytes()[:1000])
    code, out, _ = lorakit("train", *settings, "resume=true")
    assert (
        code == 0
        and "step-000004/training_state.ckpt is not as it was written" in out
        and "resuming from step 3" in out
    )
    assert (workplace / "runs/one/adapter/adapter_model.safetensors").read_bytes() == before


def _history(run: Path) -> list[dict[str, Any]]:
    file = run / "history.jsonl"
    return (
        [json.loads(line) for line in file.read_text().splitlines() if line.endswith("}")]
        if file.exists()
        else []
    )


def _wait_for(
    condition: Callable[[], bool], process: preloaded.Process, poll: float = 0.01
) -> bool:
    deadline = time.monotonic() + 120
    while process.poll() is None and time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(poll)
    return False


def _kill_when(
    process: preloaded.Process,
    condition: Callable[[], bool],
    *,
    delay: float = 0,
    poll: float = 0.01,
) -> bool:
    reached = _wait_for(condition, process, poll)
    time.sleep(delay)
    process.kill()
    process.communicate()
    return reached


def _assert_same(whole: Path, cut: Path) -> None:
    def figures(run: Path) -> list[tuple[Any, ...]]:
        return [
            (
                line["step"],
                line.get("train/loss"),
                line.get("train/grad_norm"),
                line.get("val/loss"),
            )
            for line in _history(run)
        ]

    assert figures(cut) == figures(whole)
    for name in (
        "adapter/adapter_model.safetensors",
        "checkpoints/step-000010/adapter_model.safetensors",
    ):
        assert (cut / name).read_bytes() == (whole / name).read_bytes()


def test_two_processes_never_train_one_run(tmp_path: Path) -> None:
    run = create_run(tmp_path, "one", config_text="", info={})
    with hold(run), pytest.raises(CheckpointError, match="being trained by another process"):
        hold(run)
    hold(run).close()


def test_what_auto_came_to_is_part_of_the_run(workplace: Path, lorakit: Call) -> None:
    settings = (*SMALL, "trainer.max_steps=1", "run=one", "callbacks.samples=null")
    assert lorakit("train", *settings)[0] == 0
    file = workplace / "runs/one/run.json"
    here = json.loads(file.read_text())["resolved"]["trainer.precision"]
    other = "bf16-mixed" if here == "32-true" else "32-true"
    file.write_text(
        file.read_text().replace('"finished"', '"running"').replace(f'"{here}"', f'"{other}"')
    )
    code, _, err = lorakit("train", *settings, "resume=true")
    assert (
        code == 2
        and f"trainer.precision: auto was {other} then, and is {here} on this machine" in err
    )


def test_what_can_go_on_is_said_with_the_line_to_type(workplace: Path, lorakit: Call) -> None:
    info = {"status": "interrupted", "experiment": "run", "data_fingerprint": "f"}
    command = "lorakit train 'data.path=my rows.jsonl' model.path=tiny run=mine resume=auto"
    run = create_run(
        workplace / "runs", "mine", config_text="a: 1", info={**info, "command": command}
    )
    typed = "lorakit train 'data.path=my rows.jsonl' model.path=tiny run=mine resume=true"
    assert command_to_continue(run) == typed
    for asked in (("resume=true",), ("resume=true", "run=other")):
        code, _, err = lorakit("train", *asked)
        assert code == 2 and f"mine (interrupted): {typed}" in err, err
    script = workplace / "runs/.slurm/mine.sh"
    script.parent.mkdir()
    script.touch()
    queued = run.update(command="lorakit train -m lora.rank=4,8 launch=slurm")
    # of a sweep, too, whose other jobs are not touched
    assert command_to_continue(queued) == f"sbatch {script}"
    sweep = run.update(command="lorakit train -m lora.rank=4,8")
    named = Run(sweep.folder.with_name("sweep-1127-3"), sweep.info)
    assert (
        command_to_continue(named) == "lorakit train -m lora.rank=4,8 group=sweep-1127 resume=auto"
    )
    ours = run.update(command="torchrun … -m lorakit train lora.rank=4")
    assert (
        command_to_continue(ours) == "torchrun … -m lorakit train lora.rank=4 run=mine resume=true"
    )
