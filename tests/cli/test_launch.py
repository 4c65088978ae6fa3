"""`lorakit launch`: what is printed for several machines, and what a job of SLURM is made of."""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from program import REPOSITORY
from small import SMALL

from lorakit.errors import ConfigError
from lorakit.launch.slurm import SlurmJob, script_text, seconds_of
from lorakit.strategy import world

Call = Callable[..., tuple[int, str, str]]


def test_each_machine_has_a_line_that_differs_in_its_number_only(
    workplace: Path, lorakit: Call
) -> None:
    (workplace / "my rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    code, out, err = lorakit(
        "launch",
        "nodes=2",
        "address=10.0.0.1",
        "max_restarts=1",
        "train",
        "model.path=tiny",
        "data.path=my rows.jsonl",
        "trainer.devices=3",
    )
    assert code == 0, err
    first, second = (shlex.split(line) for line in out.splitlines() if line.startswith("torchrun"))
    assert first[:6] == [
        *(
            "torchrun",
            "--nnodes=2",
            "--node-rank=0",
            "--nproc-per-node=3",
            "--master-addr=10.0.0.1",
            "--master-port=29500",
        ),
    ]
    # torch's own half minute is less than a large step
    assert "\nexport TORCH_ELASTIC_SHUTDOWN_TIMEOUT=300\n" in out
    assert "data.path=my rows.jsonl" in first and "--max-restarts=1" in first
    # one folder, also for what is started again
    assert any(text.startswith("run=run-") for text in first)
    assert [(a, b) for a, b in zip(first, second, strict=True) if a != b] == [
        ("--node-rank=0", "--node-rank=1")
    ]


def test_a_job_of_slurm_holds_the_config_as_it_was_checked(workplace: Path, lorakit: Call) -> None:
    code, out, err = lorakit(
        "launch",
        "slurm",
        "nodes=2",
        "partition=gpu",
        "gres=gpu:a100:8",
        "time=1:00:00",
        'setup=["echo it is"]',
        "environment={KEY: a b}",
        "options=[--exclusive]",
        "submit=false",
        "train",
        "run=one",
        *SMALL,
    )
    assert code == 0, err
    script = workplace / "runs" / ".slurm" / "one.sh"
    assert str(script) in out
    text = script.read_text()
    for line in (
        "--nodes=2",
        "--partition=gpu",
        "--gres=gpu:a100:8",
        "--time=1:00:00",
        "--signal=TERM@120",
        "--exclusive",
    ):
        assert f"#SBATCH {line}\n" in text
    assert "echo it is\n" in text and "export KEY='a b'\n" in text
    assert (
        "--nproc-per-node=8" in text
        and "--node-rank=$SLURM_NODEID" in text
        and "account" not in text
    )
    subprocess.run(["bash", "-n", str(script)], check=True)
    job = json.loads(script.with_suffix(".json").read_text())
    assert (
        job["config"]["run"] == "one"
        and job["config"]["resume"] == "auto"
        and job["config"]["lora"]["rank"] == 4
    )


def test_each_job_of_a_sweep_is_a_job_of_slurm(workplace: Path, lorakit: Call) -> None:
    code, out, err = lorakit("launch", "slurm", "submit=false", "train", "-m", "lora.rank=4,8")
    assert code == 0, err
    jobs = [
        json.loads(path.read_text())
        for path in sorted((workplace / "runs" / ".slurm").glob("*.json"))
    ]
    assert sorted(job["config"]["lora"]["rank"] for job in jobs) == [4, 8]
    assert len({job["config"]["run"] for job in jobs}) == 2 and out.count("submit it with") == 2


@pytest.mark.parametrize(
    ("gres", "number"),
    [(None, None), ("gpu", 1), ("gpu:4", 4), ("gpu:a100:8", 8), ("gpu:h100", 1), ("nic:2", None)],
)
def test_the_number_of_gpus_is_that_of_gres(gres: str | None, number: int | None) -> None:
    assert SlurmJob(gres=gres).num_gpus == number


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("nodes=2",), "there is no `train`"),
        (("nodez=2", "train"), "did you mean launch.nodes?"),
        (("train",), "launch.nodes=1"),
        (("nodes=2", "train", "-m", "lora.rank=1,2"), "a sweep has many runs"),
        (("slurm", "partitoin=x", "train"), "launch.partitoin"),
        (("nodes=2", "train", "lora.rank=x"), "lora.rank=x"),
        (("nodes=2", "slurm", "train"), "only slurm and settings key=value"),
    ],
)
def test_what_cannot_be_launched_is_one_message(
    workplace: Path, lorakit: Call, arguments: tuple[str, ...], said: str
) -> None:
    code, out, err = lorakit("launch", *arguments)
    assert code == 2 and said in err and "torchrun" not in out


def test_processes_that_do_not_know_of_one_another_are_refused(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    code, _, err = lorakit("train", "launch.nodes=2")
    assert code == 2 and "lorakit launch nodes=2 train" in err
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    code, _, err = lorakit("train")
    assert code == 2 and "srun has started 4 processes" in err


def test_without_sbatch_the_script_is_written_and_named(
    workplace: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", str(workplace))
    code, _, err = lorakit("train", "launch=slurm", "run=one")
    assert (
        code == 2 and "there is no sbatch" in err and (workplace / "runs/.slurm/one.sh").is_file()
    )


def test_what_differs_is_named_with_its_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    everyone = [
        ("rank 0 (host a)", {"x": "1", "y": "2"}),
        ("rank 1 (host b)", {"x": "1", "y": "3"}),
        ("rank 2 (host b)", {"x": "1"}),
    ]
    monkeypatch.setattr(world, "is_distributed", lambda: True)
    monkeypatch.setattr(world, "all_gather_object", lambda value: everyone)
    with pytest.raises(ConfigError) as raised:
        world.check_equal_on_all_ranks(lambda: everyone[0][1])
    assert "y: 2 on rank 0 (host a); 3 on rank 1 (host b); not there on rank 2 (host b)" in str(
        raised.value
    )
    assert "x:" not in str(raised.value)
    everyone[1:] = [everyone[0]]
    world.check_equal_on_all_ranks(lambda: everyone[0][1])


def test_a_line_of_setup_that_fails_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "env.sh").write_text(
        "grep -q nothing /dev/null\nuse() { false || true; test -n x; }\n"
    )
    for setup, code in (
        (["export A=1", "false", "touch reached"], 1),
        (["source missing.sh", "touch reached"], 1),
        (["source env.sh", "use", "touch reached"], 0),
    ):
        text = script_text(
            SlurmJob(nodes=1, setup=setup),
            tmp_path / "job.json",
            num_processes=1,
            run_folder=tmp_path / "it",
        )
        script = text.partition("address=")[0]
        (tmp_path / "job.sh").write_text(script)
        done = subprocess.run(
            ["bash", "job.sh"], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert (done.returncode, (tmp_path / "reached").exists()) == (code, code == 0)
        assert (f"a line of launch.setup has failed: {setup[-2]}" in done.stderr) == bool(code)


def slurm(lorakit: Call, *settings: str, train: tuple[str, ...] = ()) -> tuple[int, str, str]:
    return lorakit(
        "launch", "slurm", "nodes=2", "submit=false", *settings, "train", "run=one", *SMALL, *train
    )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (("time=3:00",), "launch.time=3:00 leaves no time to train"),
        (("time=0:10:00", "stop_seconds=540"), "launch.time=0:10:00 leaves no time to train"),
        (("time=43200",), "launch.time=43200 is a number"),
        (
            ("environment={AWS_SECRET_ACCESS_KEY: secret}",),
            "export AWS_SECRET_ACCESS_KEY before you submit",
        ),
        (("environment={HF_TOKEN: x}",), "export HF_TOKEN before you submit"),
        (("environment={DB_PASSWORD: x}",), "export DB_PASSWORD before you submit"),
        (("environment={CLIENT_SECRET: x}",), "export CLIENT_SECRET before you submit"),
        (("logger=wandb",), "logger=… is a setting of the run"),
        (("environment={WANDB_API_KEY: secret}",), "export WANDB_API_KEY before you submit"),
        (('options=["--gpus=5"]',), "--gpus=5 cannot be shared by launch.nodes=2"),
        (
            ("options=[--mem=0, --exclusive]",),
            "launch.options=[--mem=0, --exclusive] cannot be read",
        ),
        (("run=two",), "run=… is a setting of the run: put it after `train`"),
        (("model.path=tiny",), "model.path=… is a setting of the run"),
    ],
)
def test_a_job_that_could_not_do_what_it_should_is_refused(
    workplace: Path, lorakit: Call, settings: tuple[str, ...], said: str
) -> None:
    code, _, err = slurm(lorakit, *settings)
    assert code == 2 and said in err, err
    assert not (workplace / "runs/.slurm").exists()


@pytest.mark.parametrize(
    ("time", "seconds"),
    [
        ("10", 600),
        ("10:30", 630),
        ("1:00:00", 3600),
        ("2-0", 172_800),
        ("1-12:30", 131_400),
        ("UNLIMITED", None),
    ],
)
def test_slurms_times_in_seconds(time: str, seconds: int | None) -> None:
    assert seconds_of(time) == seconds


@pytest.mark.parametrize(
    ("option", "number"),
    [
        ("--gpus-per-node=8", 8),
        ("--gpus-per-node=h100:4", 4),
        ("--gpus=16", 8),
        ("-G 4", 2),
        ("--gpus-per-node 8", 8),
        ("--tres-per-node=gres/gpu:4", 4),
        ("--partition=gpu", 1),
        ("--constraint=gpu", 1),
        ("--gres=gpu:a100:2", 2),
        ("--mem=0", 1),
    ],
)
def test_gpus_that_are_asked_for_by_an_option_have_processes(
    workplace: Path, lorakit: Call, option: str, number: int
) -> None:
    code, _, err = slurm(lorakit, f'options=["{option}"]')
    assert code == 0, err
    assert f"--nproc-per-node={number} " in (workplace / "runs/.slurm/one.sh").read_text()


def test_a_container_sees_the_folders_of_the_run_and_cores_are_asked_for_twice(
    workplace: Path, lorakit: Call
) -> None:
    code, _, err = slurm(
        lorakit,
        "container=image.sqsh",
        'mounts=["/data"]',
        "cpus=16",
        train=("data.path=/data/x.jsonl", "model.path=tiny"),
    )
    assert code == 0 and "data.path=/data/x.jsonl is not on this machine" in err
    text = (workplace / "runs/.slurm/one.sh").read_text()
    assert (
        f"--container-mounts={workplace}:{workplace},{workplace}/runs:{workplace}/runs,/data:/data "
        in text
    )
    assert f"--container-workdir={workplace} " in text
    assert (
        "#SBATCH --cpus-per-task=16\n" in text
        and "srun --kill-on-bad-exit=1 --cpus-per-task=16 " in text
    )


def test_an_interrupted_job_queues_again_unless_it_made_no_step(
    workplace: Path, lorakit: Call
) -> None:
    code, _, err = slurm(lorakit)
    assert code == 0, err
    script = (workplace / "runs/.slurm/one.sh").read_text()
    behind = script[script.index("if [ $code") :]
    run_file = workplace / "runs/one/run.json"
    run_file.parent.mkdir()
    for text, asked in (
        ('{"status": "interrupted",\n "steps_since_start": 0,\n "x": 1}', False),
        ('{"status": "interrupted",\n "steps_since_start": 10\n}', True),
        ('{"status": "finished",\n "steps_since_start": 3}', False),
        (None, False),
    ):
        run_file.unlink(missing_ok=True)
        if text:
            run_file.write_text(text)
        program = f"code=1; SLURM_JOB_ID=7; before=x; scontrol() {{ echo asked: $*; }}\n{behind}"
        done = subprocess.run(["bash", "-c", program], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stdout) == (1, "asked: requeue 7\n" if asked else "")
        assert "No such file" not in done.stderr
        if asked:  # a start that failed before the run went on has left run.json as it was
            program = program.replace("before=x", f"before=$(cksum {run_file})")
            assert not subprocess.run(
                ["bash", "-c", program], capture_output=True, text=True, check=False
            ).stdout


@pytest.mark.slow
def test_the_script_runs_torchrun_and_ends_as_its_process_without_a_traceback(
    workplace: Path, lorakit: Call
) -> None:
    """The real script and the real agent; srun and scontrol only do what they would on one node."""
    settings = (
        "nodes=1",
        "submit=false",
        "train",
        "run=one",
        "model.path=tiny",
        "data.path=/nowhere/rows.jsonl",
    )
    code, _, err = lorakit("launch", "slurm", *settings)
    assert code == 0 and "data.path=/nowhere/rows.jsonl is not on this machine" in err
    stubs = {
        "srun": 'while [[ $1 == --* ]]; do shift; done; exec "$@"',
        "scontrol": "[ $1 = show ] && echo localhost || echo asked to queue again",
    }
    (workplace / "bin").mkdir()
    for name, text in stubs.items():
        (workplace / "bin" / name).write_text(f"#!/bin/bash\n{text}\n")
        (workplace / "bin" / name).chmod(0o755)
    environment = {
        **os.environ,
        "PATH": f"{workplace / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(REPOSITORY),
    }
    environment |= {"SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_ID": "7", "SLURM_NODEID": "0"}
    done = subprocess.run(
        ["bash", "runs/.slurm/one.sh"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 2, done.stderr
    assert "/nowhere/rows.jsonl: no such file" in done.stderr
    assert "Traceback" not in done.stderr and "asked" not in done.stdout
