"""How many processes a run has, and which strategy joins them."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
from dataclasses import dataclass
from pathlib import Path

import torch

import lorakit
from lorakit.config.schema import RunConfig
from lorakit.errors import ConfigError
from lorakit.model.load import needed_files
from lorakit.model.spec import ModelSpec
from lorakit.runs.folder import flatten, installed_packages
from lorakit.strategy.heartbeat import take_fault
from lorakit.strategy.world import World, current_world
from lorakit.training.precision import resolve_accelerator

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class Place:
    """Where a run is: its processes, and what each of them has."""

    world: World
    accelerator: str
    precision: str
    memory_per_process_bytes: int


def num_devices(config: RunConfig, *, elsewhere: bool = False) -> int:
    """Processes on a machine: ``trainer.devices``, of which auto is all GPUs here, and one on a
    CPU.

    Raises:
        ConfigError: it is no such number, or more than this machine has, unless the run is made
            ``elsewhere``.
    """
    wanted = config.trainer.devices
    accelerator = resolve_accelerator(config.trainer.accelerator)
    num_gpus = torch.cuda.device_count() if accelerator == "cuda" else 1
    if wanted == "auto":
        return num_gpus
    if not str(wanted).isdigit() or int(wanted) < 1:
        raise ConfigError(
            f"trainer.devices={wanted}: a number of processes on this machine, or auto for all its"
            " GPUs"
        )
    if accelerator != "cpu" and int(wanted) > num_gpus and not elsewhere:
        raise ConfigError(
            f"trainer.devices={wanted}, but there are {num_gpus} GPUs here; lower it, or set"
            " trainer.accelerator=cpu"
        )
    return int(wanted)


def needs_launch(config: RunConfig) -> bool:
    """Whether this process has to start others: several are asked for, and nobody has started them.

    Raises:
        ConfigError: they are asked for on several machines, or srun has started them.
    """
    if "RANK" in os.environ:
        return False
    if config.launch.get("nodes") > 1:
        raise ConfigError(
            f"launch.nodes={config.launch.get('nodes')}: `lorakit launch"
            f" nodes={config.launch.get('nodes')} train …` prints what to type on each machine;"
            " `lorakit launch slurm …` makes a job of SLURM"
        )
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        raise ConfigError(
            f"srun has started {os.environ['SLURM_STEP_NUM_TASKS']} processes that do not know of"
            " one another, and each would train alone; start one task per node with torchrun in"
            " it, as `lorakit launch slurm … train …` does"
        )
    return num_devices(config) > 1


def check_world(config: RunConfig) -> World:
    """Return this process's world. Raises ConfigError where ``trainer.devices`` contradicts it."""
    world, wanted = current_world(), config.trainer.devices
    if world.size > 1 and wanted != "auto" and str(wanted) not in ("1", str(world.local_size)):
        raise ConfigError(
            f"trainer.devices={wanted}, but torchrun has started {world.local_size} processes here;"
            " leave it out"
        )
    return world


def resume_if_restarted(config: RunConfig) -> RunConfig:
    """Return the config with which a restart by torchrun continues from the last checkpoint."""
    count = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if not count:
        return config
    if current_world().is_rank_zero:
        most = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "?")
        log.warning("restart %d of %s: %s", count, most, take_fault() or "a process has died")
    return config.with_values({"resume": "auto"})


def num_streams(config: RunConfig, world: World) -> int:
    """Processes, or groups that share their rows, each with micro-batches of its own."""
    return world.size // config.sequence_parallel


def silence(world: World) -> None:
    """Let the first process speak for all."""
    if not world.is_rank_zero:
        logging.getLogger("lorakit").setLevel(logging.ERROR)


def describe_program() -> dict[str, str]:
    """lorakit's own code, and the packages it runs on."""
    code = hashlib.sha256()
    folder = Path(lorakit.__file__).parent
    for path in sorted(folder.rglob("*.py")):
        code.update(str(path.relative_to(folder)).encode() + path.read_bytes())
    packages = {f"package {name}": version for name, version in installed_packages().items()}
    return {
        "lorakit's code": code.hexdigest()[:12],
        "python": platform.python_version(),
        **packages,
    }


def describe_config(config: RunConfig) -> dict[str, str]:
    """Every setting of the run."""
    return {key: str(value) for key, value in flatten(config.to_dict()).items()}


def describe_base(model: ModelSpec) -> dict[str, str]:
    """The base: its config, and the commit of the hub or the sizes of its files."""
    config = model.load_config()
    files = sorted(needed_files(model.path, model.revision).items())
    described = hashlib.sha256(repr((config.to_json_string(), files)).encode()).hexdigest()[:12]
    commit = getattr(config, "_commit_hash", None)
    return {"the base's config and sizes of files": described} | (
        {"the base's commit": commit} if commit else {}
    )
