"""What Hydra refuses, in a line or two, with the nearest right key."""

from __future__ import annotations

import difflib
import os
import re
from collections.abc import Iterator, Sequence
from typing import Any

from lorakit.cli.overrides import quote_path, value_of_flag
from lorakit.config.aliases import explain_other_name
from lorakit.config.paths import conf_dir


def explain_override(message: str, config_name: str, arguments: Sequence[str] = ()) -> str:
    """Return Hydra's ``message`` in a line or two, and the nearest right key in the groups that
    ``arguments`` name.
    """
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", message):
        key, _, values = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: several values make a sweep, so add -m; "
            f"as a list they are {key}=[{values}], as a text '{key}=\"{values}\"'"
        )
    match = re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Could not delete from config. '([^']+)'", message
    )
    if match:
        named = [text for text in arguments if (conf_dir() / text.partition("=")[0]).is_dir()]
        own = value_of_flag(arguments, "--config-dir", "-cd")
        if other := explain_other_name(match[1]):
            return f"unknown key {match[1]!r}{other}"
        known = [*all_keys(config_name, named, own), *all_keys(config_name)]
        return f"unknown key {match[1]!r}{suggest(match[1], known)}"
    if "Could not find" in message or "In '" in message:
        return _explain_group(message, value_of_flag(arguments, "--config-dir", "-cd"))
    if (
        "LexerNoViableAlt" in message
        or "mismatched input" in message
        or "no viable alternative" in message
    ):
        return (
            f"{_unreadable(arguments)}{first_lines(message)}\nQuote values with commas, spaces or"
            ' brackets: \'key="a, b"\'; within a list each for itself: \'key=["a, b", "--c"]\''
        )
    return first_lines(message)


def _unreadable(arguments: Sequence[str]) -> str:
    """Which of ``arguments`` Hydra's grammar cannot read, in front of what it says of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for argument in (quote_path(text) for text in arguments if not text.startswith("-")):
        try:
            parser.parse_override(argument)
        except HydraException:
            return f"{argument} cannot be read: "
    return ""


def suggest(key: str, known: list[str]) -> str:
    """Return ``; did you mean …?`` for the nearest of ``known``, or nothing where none is near."""
    if key in known:
        return ": it is below a key that is null here, or belongs to another choice of its group"
    group, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    same_depth = {name: name for name in known if name.count(".") == key.count(".")}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    for names, wanted, cutoff in (
        (beside, leaf, 0.6),
        (same_depth, key, 0.8),
        (anywhere, leaf, 0.8),
    ):
        if near := difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[near[0]]}?"
    if beside and group:
        return f"; there are: {', '.join(beside)}"
    return "; `lorakit train --cfg job` prints all keys"


def all_keys(
    config_name: str, groups: Sequence[str] = (), config_dir: str | None = None
) -> Iterator[str]:
    """Yield every key of the config in dots; ``groups`` choose some of its files, in a folder of
    the user's too.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        path = [f"hydra.searchpath=['file://{os.path.abspath(config_dir)}']"] if config_dir else []
        config = compose(config_name, overrides=[*path, "experiment=pig_latin", *groups])
    yield from _flatten(config, "")


def _flatten(config: Any, prefix: str) -> Iterator[str]:
    from omegaconf import DictConfig

    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _flatten(node, f"{prefix}{key}.")


def _explain_group(message: str, config_dir: str | None = None) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = next((line for line in lines if "Could not find" in line), lines[0])
    options = [line for line in lines if re.fullmatch(r"[\w/-]+", line)]
    wanted = re.search(r"Could not find '([^']+)'", found) or re.search(r"'([^']+)'", found)
    name = wanted[1].rsplit("/", 1)[-1] if wanted else ""
    if (
        config_dir
        and wanted
        and (path := os.path.join(config_dir, f"{name}.yaml"))
        and os.path.exists(path)
    ):
        group = wanted[1].rsplit("/", 1)[0]
        return (
            f"{found}; {path} is there: move it to {os.path.join(config_dir, group, name)}.yaml,"
            " into a folder with its group's name"
        )
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    there = f" (there are: {', '.join(options)})" if options else ""
    return f"{found}{hint}{there}"


def first_lines(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(
            ("See https", "Set the environment", "object_type=", "reference_type=")
        )
    ]
    return "\n".join(kept[:3])
