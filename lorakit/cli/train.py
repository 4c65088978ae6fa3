"""``lorakit train``: compose, check, plan, then train. A bad row or a wrong key costs seconds, not a download."""

from __future__ import annotations

import datetime
import functools
import re
import shlex
import signal
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra, typed_overrides
from lorakit.cli.guard import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig
HELP = """\
usage: lorakit train [key=value …] [--config-dir DIR] [-m] [--cfg job]

  lorakit train                                          the pig latin demo
  lorakit train model.path=… data.path=… lora.rank=32    your model, your rows
  lorakit train experiment=chat_sft model.path=… data.path=…
  lorakit train … resume=true                            go on with the newest unfinished run
  lorakit train … -m optim.lr=1e-4,3e-4                  a sweep
  lorakit train … --cfg job                              print the whole config, with each key's meaning in conf/

Values of path keys are taken verbatim: spaces, commas, quotes and = need no escape, so a comma in them makes no sweep."""


def main(arguments: list[str]) -> None:
    """Train as ``arguments`` say."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    command = shlex.join(["lorakit", "train", *arguments])
    if {"-m", "--multirun"} & set(arguments) and not any(
        text.startswith(("group=", "+group=", "++group=")) for text in arguments
    ):
        arguments = [*arguments, f"group={_name_of_sweep(arguments)}"]
    run_hydra(functools.partial(train, command=command), arguments, config_name="train")


def _name_of_sweep(arguments: list[str]) -> str:
    """That of its runs where they have one."""
    named = next((text.partition("=")[2] for text in arguments if text.startswith("run=")), "")
    return re.sub(r"[^\w.-]", "_", named) or f"sweep-{datetime.datetime.now():%m%d-%H%M%S}"


def train(config: DictConfig, *, command: str = "") -> None:
    """Hydra's task: one run. Raises KeyboardInterrupt or SystemExit behind a run that a signal ended, so that a sweep ends too."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    from lorakit.cli.jobs import is_for_slurm, submit_job
    from lorakit.cli.processes import needs_launch, num_devices
    from lorakit.cli.schema import check_settings
    from lorakit.cli.training_run import train_run

    hydra = HydraConfig.get()
    experiment = hydra.runtime.choices.get("experiment") or "run"
    plain = to_plain(config)
    if hydra.mode is RunMode.MULTIRUN and plain["run"] is not None:
        plain["run"] = f"{plain['run']}-{hydra.job.num}"  # a folder for each job
    check_settings(plain)
    job: dict[str, Any] = {"config": plain, "experiment": str(experiment), "command": command, "overrides": typed_overrides()}
    if is_for_slurm(plain):
        submit_job(plain, job)
        return
    if needs_launch(plain):
        from lorakit.launch.torchrun import run_here
        from lorakit.weights.run import free_name

        if plain["launch"]["max_restarts"] and not (plain["run"] or plain["resume"]):
            plain["run"] = free_name(Path(plain["paths"]["runs"]).expanduser(), str(experiment))  # for who is started again
        run_here(job, num_devices(plain), max_restarts=plain["launch"]["max_restarts"])
        return
    outcome = train_run(plain, experiment=str(experiment), command=command, overrides=job["overrides"])
    leave_if_interrupted(outcome.interrupt)  # nothing is returned: Hydra would keep every job's model


def leave_if_interrupted(signum: int | None) -> None:
    """End the program as the signal would have ended it."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    if signum:
        raise SystemExit(128 + signum)


def to_plain(config: DictConfig) -> dict[str, Any]:
    """The config as plain values, interpolations resolved. Raises ConfigError for a key that is still ``???``."""
    from omegaconf import OmegaConf

    from lorakit.cli.resume import RUN_FOLDER
    from lorakit.errors import ConfigError

    free: Any = OmegaConf.create(OmegaConf.to_container(config, resolve=False))  # a copy without Hydra's struct flag
    free.paths.run = RUN_FOLDER
    missing = sorted(OmegaConf.missing_keys(free))
    if missing:
        raise ConfigError("these keys have no default and must be set: " + ", ".join(f"{key}=…" for key in missing))
    plain: Any = OmegaConf.to_container(free, resolve=True)
    return plain


if __name__ == "__main__":
    run_command(main)
