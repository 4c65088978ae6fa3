"""Sweeps with the real program: every combination, trials by Optuna, a file for W&B's agent, and
the report.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from program import start
from small import SMALL

from lorakit.sweep.study import open_storage

Call = Callable[..., tuple[int, str, str]]
EXACT = (
    *SMALL,
    "trainer.precision=32-true",
    "trainer.max_steps=4",
    "callbacks.samples=null",
    "trainer.threads=1",
)
OPTUNA = (
    "train",
    "sweep=optuna",
    "optim.lr=tag(log,interval(1e-5,1e-1))",
    "lora.dropout=0,0.1",
    "sweep.sampler.n_startup_trials=3",
)


def trials_of(root: Path, name: str, storage: str = "sqlite") -> list[tuple[Any, ...]]:
    study = optuna.load_study(
        study_name=name, storage=open_storage(root / "runs" / ".sweep" / name, storage)
    )
    return [
        (trial.state.name, trial.value, trial.params, trial.intermediate_values)
        for trial in study.trials
    ]


def test_trials_are_chosen_from_what_came_before_and_pruned(workplace: Path, lorakit: Call) -> None:
    pruner = ("sweep.pruner.n_startup_trials=1", "sweep.trials=5")
    code, out, err = lorakit(*OPTUNA, *EXACT, *pruner, "group=hunt")
    assert code == 0, err
    trials = trials_of(workplace, "hunt")
    assert len(trials) == 5 and {state for state, *_ in trials} == {"COMPLETE", "PRUNED"}
    for number, (state, value, params, reported) in enumerate(trials):
        run = json.loads((workplace / f"runs/hunt-{number}/run.json").read_text())
        config = yaml.safe_load((workplace / f"runs/hunt-{number}/config.yaml").read_text())
        assert config["optim"]["lr"] == params["optim.lr"] and config["lora"]["dropout"] == float(
            params["lora.dropout"]
        )
        assert config["group"] == "hunt" and run["val_loss"] == value == reported[max(reported)]
        assert run["pruned"] == (state == "PRUNED") and run["step"] == (
            2 if state == "PRUNED" else 4
        ) == max(reported)
        if state == "PRUNED":  # the median of those before it was better
            earlier = sorted(others[2] for *_, others in trials[:number])
            assert reported[2] > earlier[(len(earlier) - 1) // 2]
    best = min(
        range(5), key=lambda number: trials[number][1] if trials[number][0] == "COMPLETE" else 99
    )
    assert f"best: hunt-{best} with val/loss {trials[best][1]:.4f}" in out
    assert "lorakit report sweep=hunt" in out

    code, _, err = lorakit(*OPTUNA, *EXACT, *pruner, "group=hunt")
    assert code == 2 and "holds a sweep already; continue it with resume=true" in err
    code, _, err = lorakit(*OPTUNA, *EXACT, *pruner, "group=hunt", "resume=true", "lora.rank=8")
    assert code == 2 and "begun with other settings:\n  lora.rank: 4 then, 8 now" in err
    code, out, _ = lorakit(*OPTUNA, *EXACT, *pruner, "resume=true")  # the last sweep
    assert code == 0 and f"best: hunt-{best}" in out and len(trials_of(workplace, "hunt")) == 5


@pytest.mark.slow
def test_a_sweep_that_is_killed_goes_on_to_the_same_trials(workplace: Path, lorakit: Call) -> None:
    """One kill in a trial, one between two, behind which the run is finished and the study does
    not know.
    """
    settings = (
        *OPTUNA,
        *EXACT,
        "sweep.trials=4",
        "sweep.pruner.n_startup_trials=1",
        "checkpoint.every_steps=1",
    )
    assert lorakit(*settings, "group=whole")[0] == 0
    first = start(*settings, "group=cut", cwd=workplace)
    _wait_for(workplace / "runs/cut-1/checkpoints/step-000001")
    first.kill()
    first.communicate()
    assert [state for state, *_ in trials_of(workplace, "cut")] == ["COMPLETE", "RUNNING"]
    code, out, err = lorakit(*settings, "group=cut", "resume=true")
    assert code == 0, err
    assert "trial 1 of 4 continues: " in out and "resuming from step" in out
    assert trials_of(workplace, "cut") == trials_of(workplace, "whole")


def test_what_ended_before_the_study_knew_is_not_trained_again(
    workplace: Path, lorakit: Call, monkeypatch: Any
) -> None:
    from lorakit.sweep.study import Study

    def die(*_: Any) -> str:
        raise KeyboardInterrupt

    settings = (*OPTUNA, *EXACT, "sweep.trials=1", "group=once")
    with monkeypatch.context() as patch:
        patch.setattr(Study, "close_trial", die)
        code, out, _ = lorakit(*settings)
    assert code == 130 and "group=once resume=true" in out
    made = (workplace / "runs/once-0/run.json").stat().st_mtime_ns
    code, out, err = lorakit(*settings, "resume=true")
    assert code == 0, err
    assert (workplace / "runs/once-0/run.json").stat().st_mtime_ns == made
    assert [state for state, *_ in trials_of(workplace, "once")] == ["COMPLETE"]


def test_a_trial_that_fails_does_not_end_the_sweep_but_three_alike_at_its_start_do(
    workplace: Path, lorakit: Call
) -> None:
    quick = (*SMALL, "trainer.max_steps=1", "trainer.eval_every_steps=1", "callbacks.samples=null")
    code, _, err = lorakit(
        "train",
        "sweep=optuna",
        "optim.lr=-1,1e-3",
        "sweep.trials=4",
        "seed=1",
        "group=some",
        *quick,
    )
    states = [state for state, *_ in trials_of(workplace, "some")]
    assert code == 2 and len(states) == 4 and set(states) == {"COMPLETE", "FAIL"}, err
    failed = states.index("FAIL")
    assert f"job {failed} failed: optim.lr=-1 must be" in err and "of 4 jobs failed" in err
    assert (
        json.loads((workplace / f"runs/some-{failed}/run.json").read_text())["status"] == "failed"
    )

    code, out, err = lorakit(
        "train",
        "sweep=optuna",
        "lora.dropout=0,0.1",
        "optim.lr=-1",
        "sweep.trials=9",
        "group=none",
        *quick,
    )
    assert code == 2 and "the first 3 trials have failed alike" in err
    assert len(trials_of(workplace, "none")) == 3
    code, out, _ = lorakit("report", "sweep=none")
    assert code == 0 and "none-2 failed: optim.lr=-1 must be" in out


def test_a_figure_that_no_run_has_ends_the_sweep_at_its_first_trial(
    workplace: Path, lorakit: Call
) -> None:
    quick = (*SMALL, "trainer.max_steps=1", "callbacks.samples=null", "sweep.trials=4")
    code, _, err = lorakit(
        "train", "sweep=optuna", "lora.dropout=0,0.1", "sweep.metric=val/los", "group=a", *quick
    )
    assert (
        code == 2
        and "sweep.metric=val/los: a-0 has no such figure; there are: " in err
        and "val/loss" in err
    )
    code, _, err = lorakit(
        "train",
        "sweep=optuna",
        "lora.dropout=0,0.1",
        "group=b",
        "data.val_path=null",
        *quick,
        "data.val_rows=null",
    )
    assert code == 2 and "sweep.metric=val/loss needs rows to evaluate on" in err


def test_trials_are_never_runs_that_others_have_made(workplace: Path, lorakit: Call) -> None:
    quick = (*SMALL, "trainer.max_steps=1", "trainer.eval_every_steps=1", "callbacks.samples=null")
    assert lorakit("train", *quick, "run=mine-1")[0] == 0
    code, _, err = lorakit("train", "sweep=optuna", "lora.dropout=0,0.1", "group=mine", *quick)
    assert code == 2 and "runs/mine-1 is a run already, and not of this sweep" in err
    assert (
        lorakit(
            "train", "sweep=optuna", "lora.dropout=0,0.1", "sweep.trials=1", "group=own", *quick
        )[0]
        == 0
    )
    assert lorakit("train", *quick, "run=own-1")[0] == 0  # made behind the sweep's back
    code, _, err = lorakit(
        "train",
        "sweep=optuna",
        "lora.dropout=0,0.1",
        "sweep.trials=3",
        "group=own",
        "resume=true",
        *quick,
    )
    states = [state for state, *_ in trials_of(workplace, "own")]
    assert code == 2 and states == ["COMPLETE", "FAIL", "COMPLETE"] and "own-1" in err


def test_a_sampler_that_has_tried_everything_ends_the_sweep(workplace: Path, lorakit: Call) -> None:
    quick = (
        *SMALL,
        "trainer.max_steps=1",
        "trainer.eval_every_steps=1",
        "callbacks.samples=null",
        "~sweep.sampler.n_startup_trials",
    )
    everything = ("sweep.sampler._target_=optuna.samplers.BruteForceSampler", "sweep.trials=9")
    code, out, err = lorakit(
        "train", "sweep=optuna", "lora.dropout=0,0.1", "group=all", *everything, *quick
    )
    assert code == 0, err
    trials = trials_of(workplace, "all")
    assert (
        sorted(params["lora.dropout"] for *_, params, _ in trials) == ["0", "0.1"]
        and "best: all-" in out
    )


@pytest.mark.slow
def test_failed_jobs_let_go_of_their_models_and_are_named(
    workplace: Path, lorakit: Call, monkeypatch: Any
) -> None:
    (workplace / "mine.py").write_text(
        "import gc, lightning as L\nfrom lorakit.training.module import LoRAModule\nclass"
        " Greedy(L.Callback):\n    def on_train_start(self, trainer, module):\n       "
        " gc.collect()\n        alive = [x for x in gc.get_objects() if isinstance(x, LoRAModule)"
        " and x.model is not None]\n        print('alive', len(alive))\n        raise MemoryError\n"
    )
    monkeypatch.syspath_prepend(workplace)
    quick = (
        *SMALL,
        "trainer.max_steps=1",
        "callbacks.samples=null",
        "+callbacks.greedy._target_=mine.Greedy",
    )
    code, out, err = lorakit("train", "-m", "lora.dropout=0,0.1,0.2", *quick, "group=big")
    assert (
        code == 2
        and "3 of 3 jobs failed" in err
        and "job 1 (lora.dropout=0.1): the run is out of memory" in err
    )
    counts = [int(line.split()[1]) for line in out.splitlines() if line.startswith("alive")]
    # of the last one Lightning may hold a reference still
    assert len(counts) == 3 and counts[2] <= counts[0] + 1


@pytest.mark.slow
def test_two_workers_share_a_journal(workplace: Path) -> None:
    settings = (
        *OPTUNA,
        *EXACT,
        "sweep.trials=6",
        "sweep.storage=journal",
        "group=shared",
        "resume=auto",
    )
    workers = [start(*settings, cwd=workplace) for _ in range(2)]
    outputs = [worker.communicate(timeout=240) for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0], outputs
    trials = trials_of(workplace, "shared", "journal")
    assert [state for state, *_ in trials] == ["COMPLETE"] * 6  # each made once
    done = [
        {line.split()[1] for line in out.splitlines() if line.startswith("trial ")}
        for out, _ in outputs
    ]
    assert (
        done[0] | done[1] == {str(number) for number in range(6)}
        and not done[0] & done[1]
        and all(done)
    )


@pytest.mark.slow
@pytest.mark.parametrize("storage", ["sqlite", "journal"])
def test_a_storm_of_kills_changes_no_trial(workplace: Path, lorakit: Call, storage: str) -> None:
    settings = (
        *OPTUNA,
        *EXACT,
        "sweep.trials=8",
        "sweep.pruner.n_startup_trials=2",
        f"sweep.storage={storage}",
    )
    assert lorakit(*settings, "group=whole")[0] == 0
    generator, kills, begun = random.Random(storage), 0, time.monotonic()
    while True:
        assert time.monotonic() - begun < 500
        worker = start(*settings, "group=cut", "resume=auto", cwd=workplace)
        try:
            worker.communicate(timeout=generator.uniform(1, 4) if kills < 8 else 200)
        except BaseException:
            worker.send_signal(signal.SIGKILL)
            worker.communicate()
            kills += 1
            continue
        break
    assert worker.returncode == 0 and kills >= 3
    assert trials_of(workplace, "cut", storage) == trials_of(workplace, "whole", storage)


@pytest.mark.slow
def test_trials_of_two_processes_are_pruned_together(workplace: Path) -> None:
    settings = (
        *OPTUNA,
        *EXACT,
        "trainer.devices=2",
        "trainer.accelerator=cpu",
        "sweep.pruner.n_startup_trials=1",
        "group=two",
    )
    worker = start(*settings, "sweep.trials=5", cwd=workplace)
    out, err = worker.communicate(timeout=400)
    assert worker.returncode == 0, err
    assert {state for state, *_ in trials_of(workplace, "two")} == {"COMPLETE", "PRUNED"}
    assert "pruned after 2 steps" in out


@pytest.mark.slow
def test_a_job_of_two_processes_that_fails_does_not_end_the_sweep(workplace: Path) -> None:
    quick = (
        *SMALL,
        "trainer.max_steps=1",
        "callbacks.samples=null",
        "trainer.devices=2",
        "trainer.accelerator=cpu",
    )
    worker = start("train", "-m", "group=pair", "data.max_tokens=8,256", *quick, cwd=workplace)
    _, err = worker.communicate(timeout=200)
    assert worker.returncode == 2 and "1 of 2 jobs failed; the other 1 finished" in err
    states = [
        json.loads((workplace / f"runs/pair-{number}/run.json").read_text())["status"]
        for number in (0, 1)
    ]
    assert states == ["failed", "finished"]


def test_every_combination_is_a_run_and_a_second_call_makes_only_what_is_missing(
    workplace: Path, lorakit: Call
) -> None:
    quick = (*SMALL, "trainer.max_steps=2", "callbacks.samples=null", "group=grid")
    code, _, err = lorakit("train", "-m", "optim.lr=1e-3,-1", "lora.dropout=0,0.1", *quick)
    assert code == 2 and "2 of 4 jobs failed" in err
    code, out, _ = lorakit("report", "sweep=grid")
    assert code == 0, out
    lines = out.splitlines()
    assert [line.split()[1] for line in lines[2:6]] == ["finished", "finished", "failed", "failed"]
    assert all(head in lines[1] for head in ("lora.dropout", "optim.lr", "val/loss", "tokens/s"))
    assert (workplace / "runs/.sweep/grid/report.csv").read_text().count("\n") == 5
    assert (workplace / "runs/.sweep/grid/report.html").read_text().startswith("<!doctype html>")

    made = (workplace / "runs/grid-0/run.json").stat().st_mtime_ns
    code, out, err = lorakit(
        "train", "-m", "optim.lr=1e-3,2e-3", "lora.dropout=0,0.1", *quick, "resume=auto"
    )
    assert code == 0, err
    assert (
        "grid-0 is finished" in out
        and (workplace / "runs/grid-0/run.json").stat().st_mtime_ns == made
    )
    assert json.loads((workplace / "runs/grid-3/run.json").read_text())["status"] == "finished"

    # in another order
    code, _, err = lorakit(
        "train", "-m", "optim.lr=7e-3,1e-3", "lora.dropout=0,0.1", *quick, "resume=auto"
    )
    assert (
        code == 2
        and "grid-0 is finished, with other settings:\n  optim.lr: 0.001 then, 0.007 now" in err
    )
    code, _, err = lorakit("train", "-m", "optim.lr=1e-3,2e-3", *quick[:-1], "resume=auto")
    assert code == 2 and "add group=NAME" in err


@pytest.mark.slow
def test_wandbs_agent_runs_what_the_sweep_file_says(
    workplace: Path, lorakit: Call, monkeypatch: Any
) -> None:
    """No server is at hand: the agent's own code is given the command that a server would send."""
    from wandb.wandb_agent import Agent

    (workplace / "rows, and more.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {n}", "completion": f" {n}"}) + "\n" for n in range(40))
    )
    code, out, err = lorakit(
        *(
            "train",
            "sweep=wandb",
            "group=my sweep",
            "data.path=rows, and more.jsonl",
            "model.path=tiny",
            "data.val_fraction=0.1",
        ),
        *(
            "data.stop=\n",
            "optim.lr=tag(log,interval(1e-5,1e-2))",
            "lora.rank=2,4",
            "trainer.max_steps=2",
            "callbacks.samples=null",
        ),
    )
    assert code == 0, err
    file = workplace / "runs/.sweep/my sweep/wandb.yaml"
    assert "wandb sweep --project lorakit 'runs/.sweep/my sweep/wandb.yaml'" in out
    described = yaml.safe_load(file.read_text())
    assert (
        described["metric"] == {"name": "val/loss", "goal": "minimize"}
        and described["method"] == "bayes"
    )
    assert described["parameters"] == {
        "optim.lr": {"distribution": "log_uniform_values", "min": 1e-5, "max": 1e-2},
        "lora.rank": {"values": [2, 4]},
    }
    for name, value in (
        ("WANDB_SWEEP_ID", "sweep1"),
        ("WANDB_MODE", "offline"),
        ("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}"),
    ):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("WANDB_SERVICE", raising=False)
    # the agent sets them; taken back behind the test
    for name in ("WANDB_RUN_ID", "WANDB_SWEEP_PARAM_PATH"):
        monkeypatch.setenv(name, "")
    agent: Any = Agent.__new__(Agent)  # without the server
    agent._sweep_command, agent._in_jupyter, agent._function = described["command"], False, None
    agent._forward_signals, agent._run_processes = False, {}
    chosen = {"optim.lr": {"value": 0.00123}, "lora.rank": {"value": 4}}
    agent._command_run({"run_id": "run123", "program": described["program"], "args": chosen})
    assert agent._run_processes["run123"].wait() == 0
    (run,) = (path.parent for path in workplace.glob("runs/*/run.json"))
    config = yaml.safe_load((run / "config.yaml").read_text())
    assert (config["optim"]["lr"], config["lora"]["rank"], config["group"]) == (
        0.00123,
        4,
        "my sweep",
    )
    assert (
        config["data"]["path"] == str(workplace / "rows, and more.jsonl")
        and config["data"]["stop"] == "\n"
    )
    # the run that the server waits for
    assert [path.name for path in run.glob("wandb/*run-*/*.wandb")] == ["run-run123.wandb"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("sweep=optuna",), "there is nothing to choose"),
        (("sweep=optuna", "lora.rank=2,4", "sweep.direction=up"), "minimize or maximize"),
        (
            ("sweep=optuna", "lora.rank=2,4", "sweep.storage=mysql"),
            "sqlite for one worker, journal for several",
        ),
        (("sweep=optuna", "lora.rank=2,4", "sweep.trials=0"), "must be at least 1"),
        (("sweep=optuna", "lora.rank=2,4", "sweep.trails=3"), "did you mean sweep.trials?"),
        (("sweep=optuna", "lora.rnk=2,4"), "did you mean lora.rank?"),
        (
            ("sweep=optuna", "lora.rank=2,4", "sweep.sampler.n_startup_trials=x"),
            "expected int, got str",
        ),
        (
            ("sweep=optuna", "lora.rank=2,4", "+sweep.pruner.patience=3"),
            "unknown key sweep.pruner.patience",
        ),
        (("sweep=optuna", "lora.rank=2,4", "launch=slurm"), "none can wait in a queue"),
        (("sweep=optuna", "lora.rank=2,4", "group=nosuch", "resume=true"), "there is no sweep in"),
        (
            ("sweep=wandb", "optim.lr=interval(1,2)", "sweep.method=grid"),
            "needs values, not a range, for optim.lr",
        ),
        (("sweep=wandb", "lora.rank=2,4", "sweep.method=best"), "bayes, random, grid"),
        (("lora.rank=2,4",), "several values make a sweep, so add -m"),
        (
            ("-m", "lora.rank=2,4", "--cfg", "job"),
            "leave out -m, and give one value to each setting",
        ),
        (("sweep=optuna", "lora.rank=2,4", "resume=ture"), "choose true, false or auto"),
        (
            (
                "sweep=optuna",
                "lora.rank=4",
                "-m",
                "lora.dropout=0,0.1",
                "sweep.sampler._target_=optuna.samplers.GridSampler",
            ),
            "sampler",
        ),
    ],
)
def test_a_sweep_that_cannot_be_is_one_message_and_leaves_nothing(
    workplace: Path, lorakit: Call, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = lorakit("train", *arguments)
    assert code == 2 and said in err and "Traceback" not in err and "trial" not in out, err
    assert not any(path.is_file() for path in workplace.rglob("*"))


def test_a_report_names_what_is_there(workplace: Path, lorakit: Call) -> None:
    code, _, err = lorakit("report", "sweep=x")
    assert code == 2 and "runs: no such folder" in err
    code, _, err = lorakit("report", "group=x", "--runs", ".")
    assert code == 2 and "written sweep=NAME" in err


def _wait_for(path: Path) -> None:
    for _ in _until(120):
        if path.exists():
            return
    raise AssertionError(f"{path} never came")


def _until(seconds: float) -> Iterator[None]:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        yield
        time.sleep(0.02)
