"""``lorakit train``: compose, check, plan, then train. A bad row or a wrong key costs seconds,
not a download.
"""

from __future__ import annotations

import datetime
import functools
import glob
import os
import re
import shlex
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import is_demo, run_hydra, typed_overrides
from lorakit.cli.guard import run_command
from lorakit.config.resolve import to_plain
from lorakit.errors import ConfigError, LorakitError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lorakit.config.schema import RunConfig
HELP = """\
usage: lorakit train [key=value …] [--config-dir DIR] [-m] [--cfg job]

  lorakit train                                          the pig latin demo
  lorakit train model.path=… data.path=… lora.rank=32    your model, your rows
  lorakit train experiment=chat_sft model.path=… data.path=…
  lorakit train … resume=true                            continue the newest unfinished run
  lorakit train … -m optim.lr=1e-4,3e-4 lora.rank=8,32   a sweep: every combination
  lorakit train … sweep=optuna 'optim.lr=tag(log,interval(1e-5,1e-3))'   trials chosen by Optuna
  lorakit train … sweep=wandb …                          write a sweep's file for W&B
  lorakit train … --cfg job                              print the config that these arguments make

Values of path keys are taken verbatim: spaces, commas, quotes and = need no escape, so a comma in
them makes no sweep."""


def main(arguments: list[str]) -> None:
    """Train as ``arguments`` say."""
    if {"-h", "--help"} & set(arguments):
        from lorakit.config.documentation import as_help, read_choices

        print(f"{HELP}\n\n{as_help(read_choices())}")
        return
    # started by that command
    program = "torchrun … -m lorakit" if "TORCHELASTIC_RUN_ID" in os.environ else "lorakit"
    command = f"{program} train {shlex.join(arguments)}".rstrip()
    if is_demo(arguments) and "RANK" not in os.environ:
        print(
            "lorakit: neither model.path nor data.path is set: this is the demo,"
            " experiment=pig_latin",
            file=sys.stderr,
        )
    only_shows = {"--cfg", "-c", "--info", "-i"} & {text.split("=")[0] for text in arguments}
    if _value_of("sweep", arguments) not in ("", "grid") and not only_shows:
        arguments = [*arguments, "-m"]
    is_sweep = bool({"-m", "--multirun"} & set(arguments))
    if is_sweep and not _value_of("group", arguments):
        arguments = [*arguments, f"group={_name_of_sweep(arguments)}"]
    try:
        run_hydra(functools.partial(train, command=command), arguments, config_name="train")
    finally:
        if is_sweep and _value_of("sweep", arguments) != "wandb" and not only_shows:
            named = _value_of("group", arguments)
            root = Path(_value_of("paths.runs", arguments) or "runs").expanduser()
            if any(root.glob(f"{glob.escape(named)}-*/run.json")):
                print("compare:", shlex.join(["lorakit", "report", f"sweep={named}"]), flush=True)


def _value_of(key: str, arguments: list[str]) -> str:
    """What ``arguments`` set ``key`` to, the last one as in Hydra; else nothing."""
    found = [
        text.partition("=")[2]
        for text in arguments
        if re.match(rf"\+{{0,2}}{re.escape(key)}=", text)
    ]
    return found[-1] if found else ""


def _name_of_sweep(arguments: list[str]) -> str:
    """That of its runs where they have one; that of the last sweep where one is continued."""
    if named := re.sub(r"[^\w.-]", "_", _value_of("run", arguments)):
        return named
    goes_on = _value_of("resume", arguments) in ("true", "auto")
    if goes_on and _value_of("sweep", arguments) != "optuna":
        raise ConfigError(
            "a sweep is continued by its name: add group=NAME (runs/NAME-0 is its first run)"
        )
    if goes_on:
        root = Path(_value_of("paths.runs", arguments) or "runs").expanduser() / ".sweep"
        files = sorted(root.glob("*/optuna.*"), key=lambda path: path.stat().st_mtime)
        if files:
            return files[-1].parent.name
    return f"sweep-{datetime.datetime.now():%m%d-%H%M%S}"


def train(config: DictConfig, *, command: str = "") -> None:
    """Hydra's task: one run. Raises KeyboardInterrupt or SystemExit after a run that a signal
    ended, so that a sweep ends too.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    hydra = HydraConfig.get()
    plain = to_plain(config)  # before what takes seconds to import
    is_sweep = hydra.mode is RunMode.MULTIRUN
    # whose nodes may have other files
    if not is_sweep and hydra.runtime.choices.get("launch") != "slurm":
        _check_paths(plain)
    announce(plain)
    from lorakit.config.schema import RunConfig
    from lorakit.pipeline.jobs import mark_failed, was_finished

    if is_sweep:
        plain["run"] = f"{plain['run'] or plain['group']}-{hydra.job.num}"  # a folder for each job
    elif plain["sweep"] is not None:
        raise ConfigError("this is a sweep, of many runs: add -m")
    experiment = str(hydra.runtime.choices.get("experiment") or "run")
    job: dict[str, Any] = {
        "config": plain,
        "experiment": experiment,
        "command": command,
        "overrides": typed_overrides(),
    }
    try:
        if is_sweep and was_finished(plain):
            print(f"{plain['run']} is finished", flush=True)
            return
        _start(RunConfig.from_dict(plain), job)
    except Exception as error:
        if is_sweep:
            mark_failed(job, error)
        raise
    except SystemExit as ended:
        if not is_sweep or not 0 < int(ended.code or 0) < 128:
            raise
        failed = LorakitError("its processes failed, and said why")
        mark_failed(job, failed)
        raise failed from ended


def announce(plain: dict[str, Any]) -> None:
    """Say what is about to be trained, and where, before the imports that take seconds."""
    if "RANK" in os.environ:  # the process that started this one has said it
        return
    from lorakit.training.gpus import guess_device

    data, sources = plain["data"], plain["data"].get("sources")
    rows = f"{len(sources)} sources" if isinstance(sources, list) else data.get("path")
    is_job = "partition" in plain["launch"]
    accelerator, devices = plain["trainer"]["accelerator"], plain["trainer"]["devices"]
    device = "in a job of SLURM" if is_job else f"on {guess_device(accelerator, devices)}"
    print(f"model {plain['model']['path']}, data {rows or data['_target_']}, {device}", flush=True)


def _check_paths(plain: dict[str, Any]) -> None:
    """Report misspelt rows within a second, before the imports. What is wrong with the
    settings themselves is reported later.
    """
    from lorakit.data.read.sources import check_paths, read_mixed

    data, sources = plain["data"], plain["data"].get("sources")
    is_ours = data["_target_"] == "lorakit.data.datamodule.LoRADataModule"
    if "RANK" in os.environ or not is_ours or (data["path"] is None) == (sources is None):
        return
    mixed = [entry.path for entry in read_mixed(sources)] if isinstance(sources, list) else []
    check_paths(
        path
        for path in (data["path"], *mixed, data["val_path"], plain["eval"]["retain_path"])
        if isinstance(path, str)
    )


def _start(config: RunConfig, job: dict[str, Any]) -> None:
    """Train here, in several processes, or in a job of SLURM."""
    from lorakit.pipeline.fit import train as train_here
    from lorakit.pipeline.jobs import is_for_slurm, submit_job
    from lorakit.pipeline.processes import needs_launch, num_devices

    if is_for_slurm(config):
        submit_job(config, job)
        return
    if needs_launch(config):
        from lorakit.launch.torchrun import run_here
        from lorakit.runs.folder import free_name

        max_restarts = config.launch.get("max_restarts")
        if max_restarts and not (config.run or config.resume):
            # for those that are started again
            job["config"]["run"] = free_name(config.runs_folder, job["experiment"])
        run_here(job, num_devices(config), max_restarts=max_restarts)
        return
    result = train_here(
        config, experiment=job["experiment"], command=job["command"], overrides=job["overrides"]
    )
    # nothing is returned: Hydra would keep every job's model
    leave_if_interrupted(result.interrupt)


def leave_if_interrupted(signum: int | None) -> None:
    """End the program as the signal would have ended it."""
    if signum == signal.SIGINT:
        raise KeyboardInterrupt
    if signum:
        raise SystemExit(128 + signum)


if __name__ == "__main__":
    run_command(main)
