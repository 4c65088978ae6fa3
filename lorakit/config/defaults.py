"""The defaults of conf/, for settings that were not composed by Hydra."""

from __future__ import annotations

import copy
import functools
import operator
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import yaml

from lorakit.config.paths import conf_dir
from lorakit.runs.folder import RUN_FOLDER

# groups whose keys are known: a key that is left out has its default
_CLOSED = ("model", "data", "lora", "trainer", "checkpoint", "eval", "plan", "paths")


def with_defaults(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` with the defaults of conf/ for groups that are missing, and for keys that
    are missing in a closed group. An open group that is there is taken as it is.
    """
    defaults = _defaults()
    plain = {**defaults, **settings}
    for name in (*_CLOSED, "optim"):
        theirs = defaults[name] if name in _CLOSED else {"clip_norm": defaults[name]["clip_norm"]}
        plain[name] = {**theirs, **plain[name]}
    return {
        name: value if value is settings.get(name) else _resolve(value, settings.get(name), plain)
        for name, value in plain.items()
    }


def _resolve(node: Any, given: Any, plain: dict[str, Any]) -> Any:
    """``node`` with what its own ``${key}`` stand for, apart from what is ``given``."""
    if isinstance(node, dict):
        theirs = given if isinstance(given, Mapping) else {}
        return {
            key: value if key in theirs else _resolve(value, None, plain)
            for key, value in node.items()
        }
    if isinstance(node, str) and (match := re.fullmatch(r"\$\{([\w.]+)\}", node)):
        return functools.reduce(operator.getitem, match[1].split("."), plain)
    return copy.deepcopy(node)


@cache
def _defaults() -> dict[str, Any]:
    root = conf_dir()

    def read(name: str) -> Any:
        return yaml.safe_load((root / f"{name}.yaml").read_text(encoding="utf-8"))

    top = read("train")
    chosen = [entry for entry in top.pop("defaults") if isinstance(entry, dict)]
    groups = {group: name for entry in chosen for group, name in entry.items() if name is not None}
    found = {
        group: read(f"{group}/{name}")
        for group, name in groups.items()
        if group != "sweep" and (root / group).is_dir()
    }
    del top["hydra"], found["model"]["path"], found["data"]["path"]  # which have no default
    found["paths"]["run"] = RUN_FOLDER
    return {**found, **top, "sweep": None}
