"""``lorakit launch nodes=2 … train …``: what to type on each machine; ``lorakit launch slurm …
train …``: a job of SLURM.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING

import yaml

from lorakit.cli import train
from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command
from lorakit.config.paths import conf_dir
from lorakit.config.resolve import to_plain
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig
HELP = """\
usage: lorakit launch [slurm] [key=value …] train [key=value …]

  lorakit launch nodes=2 address=10.0.0.1 train data.path=…     print a line to type on each machine
  lorakit launch slurm nodes=2 partition=gpu gres=gpu:8 train … write a job of SLURM and submit it
  lorakit launch slurm submit=false … train …                   write it only
  lorakit launch slurm … train … -m optim.lr=1e-4,3e-4          a job for each run of the sweep

Keys before `train` are those of conf/launch/default.yaml and conf/launch/slurm.yaml. The config is
checked before anything is printed or submitted. No machine is logged into."""


def main(arguments: list[str]) -> None:
    """Launch as ``arguments`` say."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    if "train" not in arguments:
        raise ConfigError(
            "lorakit launch [slurm] [key=value …] train [key=value …]: there is no `train` in this"
        )
    at = arguments.index("train")
    before, behind = arguments[:at], arguments[at + 1 :]
    is_slurm = before[:1] == ["slurm"]
    settings = before[is_slurm:]
    if wrong := next((text for text in settings if "=" not in text), None):
        raise ConfigError(f"{wrong}: only slurm and settings key=value can come before `train`")
    ours = {
        key
        for name in ("default", "slurm")
        for key in yaml.safe_load((conf_dir() / f"launch/{name}.yaml").read_text())
    }
    keys = [text.split("=")[0].lstrip("+").removeprefix("launch.") for text in settings]
    groups = {path.name for path in conf_dir().iterdir() if path.is_dir()} | {
        "run",
        "group",
        "resume",
        "seed",
        "checkpoint",
        "eval",
    }
    if theirs := [
        key for key in keys if key.split(".")[0] not in ours and key.split(".")[0] in groups
    ]:
        raise ConfigError(f"{theirs[0]}=… is a setting of the run: put it after `train`")
    prefixed = [text if text.startswith("launch.") else f"launch.{text}" for text in settings]
    if is_slurm:
        train.main([*behind, "launch=slurm", *prefixed])
        return
    if {"-m", "--multirun"} & set(behind):
        raise ConfigError(
            "a sweep has many runs, and each needs lines of its own; `lorakit launch slurm` makes a"
            " job of each"
        )
    run_hydra(
        functools.partial(print_lines, arguments=behind, settings=prefixed),
        [*behind, *prefixed],
        config_name="train",
    )


def print_lines(config: DictConfig, *, arguments: list[str], settings: list[str]) -> None:
    """Hydra's task: print the command of each machine."""
    from hydra.core.hydra_config import HydraConfig

    from lorakit.config.schema import RunConfig
    from lorakit.launch.torchrun import SHUTDOWN_SECONDS, SHUTDOWN_TIMEOUT, Launch, torchrun_lines
    from lorakit.pipeline.processes import num_devices
    from lorakit.runs.folder import free_name

    run_config = RunConfig.from_dict(to_plain(config))
    launch = Launch(**run_config.launch.arguments)
    if launch.nodes < 2:
        raise ConfigError(
            "launch.nodes=1: on one machine `lorakit train trainer.devices=N` starts the processes"
            " itself"
        )
    named: list[str] = []
    if run_config.run is None and not run_config.resume:
        experiment = HydraConfig.get().runtime.choices.get("experiment") or "run"
        named = [f"run={free_name(run_config.runs_folder, str(experiment))}"]
    program = ["-m", "lorakit", "train", *arguments, *settings, *named]
    devices = num_devices(run_config)
    where = "this machine" if launch.address is None else launch.address
    count = f"{devices} {'process' if devices == 1 else 'processes'} each"
    counted = (
        ", as this one has (trainer.devices=N says otherwise)"
        if run_config.trainer.devices == "auto"
        else ""
    )
    print(
        f"# {launch.nodes} machines with {count}{counted}; number 0 is {where}. Folder and"
        " environment are the same on all."
    )
    print(
        "# On each, or torchrun kills after 30 s what is to stop and is in a step:\nexport"
        f" {SHUTDOWN_TIMEOUT}={SHUTDOWN_SECONDS}"
    )
    for node, line in enumerate(torchrun_lines(launch, devices, program)):
        print(f"# machine {node}\n{line}")


if __name__ == "__main__":
    run_command(main)
