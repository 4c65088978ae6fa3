"""A sweep as W&B's server and agents read it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import ConfigError
from lorakit.runs.files import write_text
from lorakit.sweep.space import Choice, Range, Space

METHODS = ("bayes", "random", "grid")


def write_sweep_file(
    folder: Path, config: dict[str, Any], space: Space, fixed: Sequence[str]
) -> Path:
    """Write ``wandb.yaml`` into ``folder`` and return its path.

    Args:
        fixed: what is typed for every run.

    Raises:
        ConfigError: W&B could not choose so.
    """
    settings = config["sweep"]
    if settings["method"] not in METHODS:
        raise ConfigError(f"sweep.method={settings['method']}: {', '.join(METHODS)}")
    if settings["method"] == "grid" and (
        open_keys := [key for key, entry in space.items() if is_open(entry)]
    ):
        raise ConfigError(
            f"sweep.method=grid needs values, not a range, for {', '.join(open_keys)}; or set"
            " sweep.method=bayes"
        )
    if strange := [text for text in fixed if text.startswith("${") and text.endswith("}")]:
        raise ConfigError(f"{strange[0]}: W&B's agent would take this for a word of its own")
    logger = [] if "wandb" in (config["logger"] or {}) else ["logger=[csv,wandb]"]
    described = {
        "program": "lorakit",  # for W&B's page; what runs is the command
        "name": folder.name,
        "method": settings["method"],
        "run_cap": settings["trials"],
        "metric": {"name": settings["metric"], "goal": settings["direction"]},
        **({"early_terminate": settings["early_terminate"]} if settings["early_terminate"] else {}),
        "parameters": {key: entry.for_wandb() for key, entry in space.items()},
        "command": ["${env}", "lorakit", "train", *fixed, *logger, "${args_no_hyphens}"],
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "wandb.yaml"
    write_text(path, yaml.safe_dump(described, sort_keys=False, allow_unicode=True))
    return path


def is_open(entry: Choice | Range) -> bool:
    """Whether it has no list of values."""
    return isinstance(entry, Range) and not entry.is_whole and entry.step is None
