"""The jobs of a sweep, and runs that become jobs of SLURM."""

from __future__ import annotations

import contextlib
import glob
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorakit.config.schema import RunConfig
from lorakit.errors import CheckpointError, report
from lorakit.launch.slurm import FOLDER, SlurmJob, submit
from lorakit.pipeline.processes import num_devices
from lorakit.pipeline.resume import config_text, find_changes
from lorakit.runs.folder import RUN_FILE, create_run, describe_environment, free_name, open_run

FILE_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet", ".txt", ".jinja")


def was_finished(plain: dict[str, Any]) -> bool:
    """Whether a sweep that continues has done this job already. Raises CheckpointError where it
    has done another under that name.
    """
    folder = _folder(plain)
    if (
        not plain["resume"]
        or not (folder / RUN_FILE).exists()
        or not (run := open_run(folder)).is_finished
    ):
        return False
    if changes := find_changes(run, plain):
        remedy = "Set these as they were, or choose another group=NAME."
        raise CheckpointError(
            report(f"{folder} is finished, with other settings:", changes, remedy=remedy)
        )
    return True


def mark_failed(job: dict[str, Any], error: Exception) -> None:
    """Leave a run folder of a sweep's job that failed before it had one, so that the sweep's
    report shows it.
    """
    folder = _folder(job["config"])
    if (folder / RUN_FILE).exists():  # it says itself how it ended
        return
    info = {
        key: job[key] for key in ("experiment", "command", "overrides")
    } | describe_environment()
    info |= {"status": "failed", "error": str(error)[:500], "base": job["config"]["model"]["path"]}
    with contextlib.suppress(OSError, CheckpointError):
        create_run(
            folder.parent, folder.name, config_text=config_text(job["config"], folder), info=info
        )


def _folder(plain: dict[str, Any]) -> Path:
    return Path(plain["paths"]["runs"]).expanduser() / str(plain["run"])


def is_for_slurm(config: RunConfig) -> bool:
    """Whether the run is to become a job of SLURM, and is not that job yet."""
    return "RANK" not in os.environ and config.launch.imported("launch") is SlurmJob


def _absent(plain: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The paths of ``plain`` that can be nothing but files or folders, and are not here."""
    keys = (
        "model.path",
        "data.path",
        "data.val_path",
        "data.chat_template",
        "lora.init_from",
        "eval.retain_path",
    )
    found = [(key, plain[key.split(".")[0]][key.split(".")[1]]) for key in keys]
    sources = plain["data"].get("sources") or []
    found += [
        ("data.sources", entry["path"] if isinstance(entry, dict) else entry) for entry in sources
    ]
    for key, path in found:
        is_path = isinstance(path, str) and (
            path.startswith(("/", "~", "./", "../")) or Path(path).suffix in FILE_SUFFIXES
        )
        if is_path and not (Path(path).expanduser().exists() or glob.glob(path)):
            yield key, path


def submit_job(config: RunConfig, job: dict[str, Any]) -> None:
    """Submit the run of ``config`` to SLURM, under a name that it keeps whenever it queues again.

    Args:
        job: what its process reads; its config is replaced.
    """
    launch = SlurmJob(**config.launch.arguments)
    root = config.runs_folder.absolute()
    name = config.run or free_name(root, job["experiment"], queue=root / FOLDER)
    num_processes = (
        (launch.num_gpus or 1)
        if config.trainer.devices == "auto"
        else num_devices(config, elsewhere=True)
    )
    for key, path in _absent(config.to_dict()):
        print(
            f"lorakit: {key}={path} is not on this machine; the job fails where its nodes have none"
            " either",
            file=sys.stderr,
        )
    kept = config.with_values({"run": name, "resume": "auto", "paths.runs": str(root)})
    described = {**job, "config": {**kept.to_dict()}}
    print(submit(launch, described, num_processes=num_processes, run_folder=root / name))
