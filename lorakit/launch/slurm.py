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
from lorakit.launch.torchrun import SHUTDOWN_TIMEOUT, Launch, torchrun_arguments
from lorakit.quoting import quote_for_shell
from lorakit.runs.files import write_text

FOLDER = ".slurm"  # below paths.runs: scripts, what they run, what the jobs print
# so much earlier than asked for may SLURM send a signal (sbatch's manual, --signal)
EARLY_SECONDS = 60
_SECRET = re.compile(
    r"(?:^|_)(?:(?:API|ACCESS|PRIVATE)_?KEY|TOKEN|SECRET|PASSWORD)$", re.IGNORECASE
)
_GRES = re.compile(r"\bgpu(?::[A-Za-z][\w.-]*)?(?::(\d+))?(?=$|[,(])")
_GRES_OPTION = re.compile(r"--(?:gres|tres-per-node|tres-per-task)[= ](?:gres[:/])?(.*)")
_GPUS_OPTION = re.compile(
    r"(--gpus-per-node|--gpus-per-task|--gpus|-G)[= ]?(?:[A-Za-z][\w.-]*:)?(\d+)"
)


@dataclass(frozen=True, kw_only=True)
class SlurmJob(Launch):
    """What SLURM is asked for.

    Args:
        time: limit, as SLURM writes it.
        gres: of each node.
        cpus: processor cores of each node's task.
        container: image, for srun's ``--container-image``; lorakit is in it.
        mounts: folders that the container sees, beside the current one and that of the runs.
        setup: lines of shell before the run; one that fails ends the job.
        environment: variables of the job.
        options: further options of sbatch.
        stop_seconds: how long before ``time`` ends the processes get SIGTERM, and write a
            checkpoint.
        requeue: whether an interrupted run queues again.
        submit: whether sbatch is called.
    """

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    time: str | int | None = None
    gres: str | None = None
    cpus: int | None = None
    container: str | None = None
    mounts: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)
    environment: dict[str, Any] | None = None
    options: list[str] = field(default_factory=list)
    stop_seconds: int = 120
    requeue: bool = True
    submit: bool = True

    def __post_init__(self) -> None:
        """Raises ConfigError: a time that leaves none to train, a key that would be written down
        for all to read.
        """
        if isinstance(self.time, int):  # in a file 12:00:00 without quotes is the number 43200
            raise ConfigError(
                f"launch.time={self.time} is a number: write it as SLURM does, D-HH:MM:SS, and in a"
                " file in quotes"
            )
        seconds = seconds_of(self.time) if self.time else None
        if seconds is not None and seconds <= self.stop_seconds + EARLY_SECONDS:
            raise ConfigError(
                f"launch.time={self.time} leaves no time to train: the run is asked to stop"
                f" launch.stop_seconds={self.stop_seconds} before the end, and SLURM may do so"
                f" {EARLY_SECONDS} s too early"
            )
        secrets = (name for name in self.environment or {} if _SECRET.search(str(name)))
        if secret := next(secrets, None):
            raise ConfigError(
                f"launch.environment: {secret} would be written into the job's files and the run's"
                f" config; leave it out and export {secret} before you submit: SLURM passes your"
                " variables on"
            )

    @property
    def num_gpus(self) -> int | None:
        """GPUs of a node, as ``gres`` or ``options`` say, or None.

        Raises:
            ConfigError: the GPUs of the job are no multiple of its nodes.
        """
        options = [str(option) for option in self.options]
        resources = [found[1] for text in options if (found := _GRES_OPTION.fullmatch(text))]
        for text in (self.gres or "", *resources):
            if found := _GRES.search(text):
                return int(found[1] or 1)
        for text in options:
            if found := _GPUS_OPTION.fullmatch(text):
                number = int(found[2])
                if found[1].startswith("--gpus-per"):
                    return number
                if number % self.nodes:
                    raise ConfigError(
                        f"launch.options: {text} cannot be shared by launch.nodes={self.nodes}; ask"
                        " by launch.gres"
                    )
                return number // self.nodes
        return None


def seconds_of(time: str | int) -> int | None:
    """Seconds of SLURM's ``time``: minutes, M:S, H:M:S, D-H, D-H:M or D-H:M:S; None where it is
    something else.
    """
    found = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", str(time).strip())
    if not found:
        return None
    days, *rest = found.groups()
    first, second, third = (int(part or 0) for part in rest)
    if days is not None or rest[2] is not None:
        return int(days or 0) * 86400 + first * 3600 + second * 60 + third
    return first * 60 + second


def submit(launch: SlurmJob, job: dict[str, Any], *, num_processes: int, run_folder: Path) -> str:
    """Write what a job of SLURM runs, and submit it. Returns a line for the user.

    The config is written down as it is now: what changes while the job waits in the queue does not
    change the run.

    Args:
        job: what ``lorakit.cli.worker`` reads.
        num_processes: on each node.

    Raises:
        LorakitError: there is no sbatch, or it refuses.
    """
    folder, name = run_folder.parent / FOLDER, run_folder.name
    folder.mkdir(parents=True, exist_ok=True)
    described, script = folder / f"{name}.json", folder / f"{name}.sh"
    write_text(described, json.dumps(job, indent=1))
    text = script_text(launch, described, num_processes=num_processes, run_folder=run_folder)
    write_text(script, text)
    if not launch.submit:
        return f"written {script}; submit it with: sbatch {quote_for_shell(str(script))}"
    try:
        command = ["sbatch", "--parsable", str(script)]
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60)
    except FileNotFoundError as error:
        raise LorakitError(
            f"there is no sbatch on this machine; {script} is written: submit it where there is"
            " one, or set launch.submit=false"
        ) from error
    except subprocess.SubprocessError as error:
        said = (getattr(error, "stderr", None) or str(error)).strip()
        raise LorakitError(f"sbatch refuses {script}: {said}") from error
    number = done.stdout.strip().split(";")[0]
    state = _state_of(number)
    return (
        f"job {number}: {name}{state and f', {state}'}; its output, from its start on:"
        f" {folder / f'{name}-{number}.out'}"
    )


def _state_of(number: str) -> str:
    """State and reason of a job as SLURM tells them, which may be that it will never start;
    empty where it does not.
    """
    command = ["squeue", "--noheader", "--jobs", number, "--format", "%T (%r)"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip().replace(" (None)", "").lower()


def script_text(launch: SlurmJob, described: Path, *, num_processes: int, run_folder: Path) -> str:
    """The script for sbatch. Raises ConfigError where SLURM would read a name as a pattern."""
    if "%" in str(run_folder):
        raise ConfigError(
            f"{run_folder}: SLURM reads % in a file's name as a pattern; set paths.runs or run"
            " without it"
        )
    name, folder = run_folder.name, described.parent
    python = ["python" if launch.container else sys.executable, "-m", "lorakit.cli.agent"]
    # The variables are the shell's; what is quoted is what the user has named.
    arguments = torchrun_arguments(
        launch, num_processes, node_rank="$SLURM_NODEID", address="$address", port="$port"
    )
    program = shlex.join(["-m", "lorakit.cli.worker", str(described)])
    run = " ".join([shlex.join(python), *arguments, program])
    step = ["srun", "--kill-on-bad-exit=1"]
    if launch.cpus:
        step.append(f"--cpus-per-task={launch.cpus}")
    if launch.container:
        named = (
            path if ":" in path else str(Path(path).expanduser().absolute())
            for path in launch.mounts
        )
        mounts = dict.fromkeys([str(Path.cwd()), str(folder.parent), *named])
        step += [f"--container-image={launch.container}", f"--container-workdir={Path.cwd()}"]
        pairs = ",".join(path if ":" in path else f"{path}:{path}" for path in mounts)
        step.append(f"--container-mounts={pairs}")
    said = quote_for_shell(str(run_folder / "run.json"))
    lines = [
        "#!/bin/bash",
        *(f"#SBATCH {option}" for option in _options(launch, name, folder)),
        "",
        *(
            f"export {key}={quote_for_shell(str(value))}"
            for key, value in (launch.environment or {}).items()
        ),
        *_setup_lines(launch.setup),
        'address=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)',
        "port=$((20000 + SLURM_JOB_ID % 20000))",
        "export address port",
        f"export {SHUTDOWN_TIMEOUT}={max(launch.stop_seconds, 30)}",
        *([f"before=$(cksum {said} 2>/dev/null)"] if launch.requeue else []),
        f"{shlex.join(step)} bash -c {quote_for_shell(f'exec {run}')}",
        "code=$?",
    ]
    if launch.requeue:
        lines += [
            (
                "# A run that was interrupted has written a checkpoint, and continues from it; one"
                " that failed before it went on has not."
            ),
            (
                f'if [ $code -ne 0 ] && grep -qs \'"status": "interrupted"\' {said} && [ "$before"'
                f' != "$(cksum {said})" ]; then'
            ),
            f"  if grep -q '\"steps_since_start\": 0\\b' {said}; then",
            (
                '    echo "lorakit: interrupted before the first step since its start; the job does'
                ' not queue again" >&2'
            ),
            "  else",
            (
                '    echo "lorakit: job $SLURM_JOB_ID queues again, and resumes from its checkpoint'
                ' (SLURM waits two minutes or so)" >&2'
            ),
            '    scontrol requeue "$SLURM_JOB_ID"',
            "  fi",
            "fi",
        ]
    return "\n".join([*lines, "exit $code", ""])


def _setup_lines(setup: Sequence[str]) -> list[str]:
    """``setup``, of which a line that fails ends the job: what follows would run in an
    environment that nobody meant.
    """
    if not setup:
        return []
    said = "lorakit: a line of launch.setup has failed: $BASH_COMMAND"
    # Not set -e, which reaches into sourced files and functions, where commands may fail and be
    # meant to.
    check = f'[ ${{#BASH_SOURCE[@]}} -gt 1 ] || {{ echo "{said}" >&2; exit 1; }}'
    return [f"trap '{check}' ERR", *setup, "trap - ERR"]


def _options(launch: SlurmJob, name: str, folder: Path) -> Sequence[str]:
    chosen = ("partition", "account", "qos", "time", "gres")
    return [
        f"--job-name={quote_for_shell(name)}",
        f"--nodes={launch.nodes}",
        "--ntasks-per-node=1",
        f"--output={quote_for_shell(str(folder / f'{name}-%j.out'))}",
        "--open-mode=append",  # of a job that queues again
        "--requeue" if launch.requeue else "--no-requeue",
        *([f"--signal=TERM@{launch.stop_seconds}"] if launch.time else []),
        *([f"--cpus-per-task={launch.cpus}"] if launch.cpus else []),
        *(
            f"--{key}={quote_for_shell(str(value))}"
            for key in chosen
            if (value := getattr(launch, key)) is not None
        ),
        *launch.options,
    ]
