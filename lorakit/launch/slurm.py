"""A run as a job of SLURM: one script, one task per node, torchrun in each."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lorakit.errors import ConfigError, LorakitError
from lorakit.launch.torchrun import Launch, torchrun_arguments
from lorakit.weights.files import write_whole

FOLDER = ".slurm"  # below paths.runs: scripts, what they run, what the jobs print


@dataclass(frozen=True, kw_only=True)
class SlurmJob(Launch):
    """What SLURM is asked for.

    Args:
        time: limit, as SLURM writes it.
        gres: of each node.
        container: image, for srun's ``--container-image``.
        setup: lines of shell before the run; one that fails ends the job.
        environment: variables of the job.
        options: further options of sbatch.
        stop_seconds: so long before ``time`` ends do the processes get SIGTERM, and write a checkpoint.
        requeue: whether an interrupted run queues again.
        submit: whether sbatch is called.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | None = None
    gres: str | None = None
    container: str | None = None
    setup: list[str] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    options: list[str] = field(default_factory=list)
    stop_seconds: int = 120
    requeue: bool = True
    submit: bool = True

    @property
    def num_gpus(self) -> int | None:
        """GPUs of a node, as ``gres`` says, or None."""
        found = re.search(r"\bgpu(?::[A-Za-z][\w.-]*)?(?::(\d+))?(?=$|[,(])", self.gres or "")
        return int(found[1] or 1) if found else None


def submit(launch: SlurmJob, job: dict[str, Any], *, num_processes: int, run_folder: Path) -> str:
    """Write what a job of SLURM runs, and submit it. Returns a line for the user.

    The config is written down as it is now: what changes while the job waits in the queue does not change the run.

    Args:
        job: what ``lorakit.cli.worker`` reads.
        num_processes: on each node.

    Raises:
        LorakitError: there is no sbatch, or it refuses.
    """
    folder, name = run_folder.parent / FOLDER, run_folder.name
    folder.mkdir(parents=True, exist_ok=True)
    described, script = folder / f"{name}.json", folder / f"{name}.sh"
    write_whole(described, lambda path: path.write_text(json.dumps(job, indent=1), encoding="utf-8"))
    text = script_text(launch, described, num_processes=num_processes, run_folder=run_folder)
    write_whole(script, lambda path: path.write_text(text, encoding="utf-8"))
    if not launch.submit:
        return f"written {script}; submit it with: sbatch {shlex.quote(str(script))}"
    try:
        done = subprocess.run(["sbatch", "--parsable", str(script)], capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise LorakitError(
            f"there is no sbatch on this machine; {script} is written: submit it where there is one, or set launch.submit=false"
        ) from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise LorakitError(f"sbatch refuses {script}: {said}") from error
    number = done.stdout.strip().split(";")[0]
    return f"job {number}: {name}; its output: {folder / f'{name}-{number}.out'}"


def script_text(launch: SlurmJob, described: Path, *, num_processes: int, run_folder: Path) -> str:
    """The script for sbatch. Raises ConfigError where a name holds what SLURM would read as a pattern."""
    if "%" in str(run_folder):
        raise ConfigError(f"{run_folder}: SLURM reads % in a file's name as a pattern; set paths.runs or run without it")
    name, folder = run_folder.name, described.parent
    python = ["torchrun"] if launch.container else [sys.executable, "-m", "torch.distributed.run"]
    # The variables are the shell's; what is quoted is what the user has named.
    arguments = torchrun_arguments(
        launch, num_processes, node_rank="$SLURM_NODEID", address="$address", port="$port", program=[]
    )  # fmt: skip
    run = " ".join([shlex.join(python), *arguments, shlex.join(["-m", "lorakit.cli.worker", str(described)])])
    step = ["srun", "--kill-on-bad-exit=1", *([f"--container-image={launch.container}"] if launch.container else [])]
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(launch, name, folder)),
        "",
        *_setup_lines(launch.setup),
        *(f"export {key}={shlex.quote(str(value))}" for key, value in (launch.environment or {}).items()),
        'address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "export address port",
        f"{shlex.join(step)} bash -c {shlex.quote(f'exec {run}')}",
        "code=$?",
    ]
    if launch.requeue:
        said = shlex.quote(str(run_folder / "run.json"))
        lines += [
            "# A run that was interrupted has written a checkpoint, and goes on from it.",
            f'if [ $code -ne 0 ] && grep -q \'"status": "interrupted"\' {said}; then',
            '  scontrol requeue "$SLURM_JOB_ID"',
            "fi",
        ]
    return "\n".join([*lines, "exit $code", ""])


def _setup_lines(setup: Sequence[str]) -> list[str]:
    """``setup``, of which a line that fails ends the job: what follows would run in an environment that nobody meant."""
    if not setup:
        return []
    said = "lorakit: a line of launch.setup has failed: $BASH_COMMAND"
    # Not set -e, which reaches into sourced files and functions, where commands may fail and be meant to.
    check = f'[ ${{#BASH_SOURCE[@]}} -gt 1 ] || {{ echo "{said}" >&2; exit 1; }}'
    return [f"trap '{check}' ERR", *setup, "trap - ERR"]


def _options(launch: SlurmJob, name: str, folder: Path) -> Sequence[str]:
    chosen = ("partition", "account", "qos", "time", "gres")
    return [
        f"--job-name={shlex.quote(name)}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--output={shlex.quote(str(folder / f'{name}-%j.out'))}",
        "--open-mode=append",  # of a job that queues again
        "--requeue" if launch.requeue else "--no-requeue",
        *([f"--signal=TERM@{launch.stop_seconds}"] if launch.time else []),
        *(f"--{key}={shlex.quote(str(value))}" for key in chosen if (value := getattr(launch, key)) is not None),
        *launch.options,
    ]
