"""The program as a process of its own."""

from __future__ import annotations

import os
from pathlib import Path

import preloaded
from preloaded import REPOSITORY

__all__ = ["REPOSITORY", "start"]


def start(*arguments: str, cwd: Path, env: dict[str, str] | None = None) -> preloaded.Process:
    """Start the program as a process of its own."""
    path = os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", **(env or {})}
    # of a run in this process; a program of its own starts its own
    environment.pop("WANDB_SERVICE", None)
    return preloaded.start(["-m", "lorakit", *arguments], cwd=cwd, env=environment)
