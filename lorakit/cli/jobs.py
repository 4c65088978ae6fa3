"""Runs that become jobs of SLURM."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from lorakit.cli.processes import num_devices
from lorakit.cli.schema import import_target
from lorakit.launch.slurm import FOLDER, SlurmJob, submit
from lorakit.weights.run import free_name


def is_for_slurm(config: dict[str, Any]) -> bool:
    """Whether the run is to become a job of SLURM, and is not that job yet."""
    return "RANK" not in os.environ and import_target(config["launch"]["_target_"], "launch") is SlurmJob


def submit_job(plain: dict[str, Any], job: dict[str, Any]) -> None:
    """Submit the run of the plain config ``plain`` to SLURM, under a name that it keeps whenever it queues again."""
    launch = SlurmJob(**{key: value for key, value in plain["launch"].items() if key != "_target_"})
    root = Path(plain["paths"]["runs"]).expanduser().absolute()
    name = plain["run"] or free_name(root, job["experiment"], queue=root / FOLDER)
    num_processes = (launch.num_gpus or 1) if plain["trainer"]["devices"] == "auto" else num_devices(plain, elsewhere=True)
    config = {**plain, "run": name, "resume": "auto", "paths": {**plain["paths"], "runs": str(root)}}
    print(submit(launch, {**job, "config": config}, num_processes=num_processes, run_folder=root / name))
