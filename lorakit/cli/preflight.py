"""What all processes of a run must have in common, compared before its first step."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

import lorakit
from lorakit.errors import ConfigError, report
from lorakit.model.load import load_config, needed_files
from lorakit.strategy.world import current_world, gather, is_shared
from lorakit.weights.run import flatten, installed_packages


def agree(find_facts: Callable[[], Mapping[str, str]]) -> None:
    """Compare what ``find_facts`` returns over all processes, which call this together; one alone
    has nothing to compare.

    Raises:
        ConfigError: they differ; the message, the same in all, names each that does, with its
            values and who has them.
    """
    if not is_shared():
        return
    everyone = gather((current_world().describe(), dict(find_facts())))
    problems = []
    for name in sorted({name for _, theirs in everyone for name in theirs}):
        holders: dict[str, list[str]] = {}
        for who, theirs in everyone:
            holders.setdefault(theirs.get(name, "not there"), []).append(who)
        if len(holders) > 1:
            problems.append(
                f"{name}: "
                + "; ".join(f"{value} on {_some(whose)}" for value, whose in holders.items())
            )
    if problems:
        error = ConfigError(
            report(
                "the processes of this run differ:",
                problems,
                remedy="Make them equal on all machines.",
            )
        )
        error.is_of_all = True
        raise error


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


def describe_config(config: dict[str, Any]) -> dict[str, str]:
    """Every setting of the run."""
    return {key: str(value) for key, value in flatten(config).items()}


def describe_base(settings: dict[str, Any]) -> dict[str, str]:
    """The base: its config, its commit where it is of the hub, the sizes of its files where it
    is a folder.
    """
    config = load_config(
        settings["path"],
        revision=settings["revision"],
        trust_remote_code=settings["trust_remote_code"],
    )
    files = sorted(needed_files(settings["path"], settings["revision"]).items())
    described = hashlib.sha256(repr((config.to_json_string(), files)).encode()).hexdigest()[:12]
    commit = getattr(config, "_commit_hash", None)
    return {"the base's config and sizes of files": described} | (
        {"the base's commit": commit} if commit else {}
    )


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
