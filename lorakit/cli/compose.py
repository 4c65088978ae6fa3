"""Command-line overrides to a resolved config: Hydra, with paths taken verbatim and misspelt keys explained."""

from __future__ import annotations

import difflib
import os
import re
import sys
from collections.abc import Callable, Iterator
from typing import Any

from lorakit.cli.conf import conf_dir
from lorakit.errors import ConfigError, LorakitError

_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+)?(?P<key>[\w.@/]+)=(?P<value>.*)$", re.DOTALL)
_PATH_KEYS = re.compile(r"(?:.*\.)?(?:path|\w+_path)|lora\.init_from|paths\.\w+|run")
_STANDALONE = ("experiment", "data.path", "model.path")
_FLAGS_WITH_VALUE = (
    "--config-dir",
    "-cd",
    "--config-name",
    "-cn",
    "--config-path",
    "-cp",
    "--package",
    "-p",
    "--info",
    "-i",
    "--cfg",
    "-c",
)


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Return Hydra's arguments: flags first, paths quoted, and the pig latin experiment where nothing else is asked for."""
    flags: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        takes_value = argument in _FLAGS_WITH_VALUE and position + 1 < len(arguments)
        (flags if argument.startswith("-") else overrides).extend(arguments[position : position + 1 + takes_value])
        position += 1 + takes_value
    keys = {match["key"] for argument in overrides if (match := _OVERRIDE.match(argument))}
    if not keys & set(_STANDALONE):
        overrides.insert(0, "experiment=pig_latin")
    return [*flags, *(quote_path(argument) for argument in overrides)]


def quote_path(override: str) -> str:
    """Return ``override`` with the value of a path key quoted for Hydra's grammar: it means itself, whatever it holds."""
    if override in ("logger=null", "callbacks=null"):
        return override.replace("null", "none")  # Hydra knows no empty group, but these have one
    match = _OVERRIDE.match(override)
    if match and match["key"] == "data.stop" and not match["value"].startswith("["):
        value = match["value"].replace("\\n", "\n").replace("\\t", "\t")  # as a shell user writes a line's end
        return override if value == "null" else f"{match['prefix'] or ''}data.stop={_quoted(value)}"
    if not match or not _PATH_KEYS.fullmatch(match["key"]) or match["value"] in ("", "null"):
        return override
    return f"{match['prefix'] or ''}{match['key']}={_quoted(match['value'])}"


def run_hydra(task: Callable[[Any], Any], arguments: list[str], *, config_name: str) -> Any:
    """Compose ``config_name`` under ``arguments`` and call ``task`` with the config; once per job under ``--multirun``.

    Raises:
        ConfigError: what Hydra refuses, with the nearest right key where one is misspelt.
    """
    import hydra
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    sys.argv = [sys.argv[0], *prepare_arguments(arguments)]
    failures: list[LorakitError] = []

    def guarded(config: Any) -> Any:
        try:
            return task(config)
        except LorakitError as error:  # kept from Hydra, which would print it its own way; a sweep goes on with its next job
            failures.append(error)
            return None

    try:
        result = hydra.main(version_base="1.3", config_path=str(conf_dir()), config_name=config_name)(guarded)()
    except HydraException as error:
        raise ConfigError(explain_override(str(error), config_name)) from error
    except ValueError as error:
        if not str(error).startswith("Config group override"):
            raise
        raise ConfigError(
            "a config group cannot be null; leave it out, or name one of its files (conf/GROUP/NAME.yaml)"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(_first_lines(str(error))) from error
    if len(failures) > 1:
        raise LorakitError("\n".join(f"job failed: {failure}" for failure in failures))
    if failures:
        raise failures[0]
    return result


def explain_override(message: str, config_name: str) -> str:
    """Return Hydra's ``message`` in a line or two, and the nearest right key."""
    match = re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Could not delete from config. '([^']+)'", message
    )
    if match:
        return f"unknown key {match[1]!r}{suggest(match[1], list(all_keys(config_name)))}"
    if "Could not find" in message or "In '" in message:
        return _explain_group(message)
    if "LexerNoViableAlt" in message or "mismatched input" in message or "no viable alternative" in message:
        return f"{_first_lines(message)}\nQuote values with commas, spaces or brackets: 'key=\"a, b\"'"
    return _first_lines(message)


def _quoted(value: str) -> str:
    """Quote ``value`` so that Hydra's grammar gives it back as it is.

    In Hydra's quotes a backslash escapes only a quote (or the backslashes before one); ``${`` would begin an interpolation.
    """
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    value = re.sub(r"(\\+)$", lambda match: match[1] * 2, value)
    return "'" + value.replace("${", "\\${") + "'"


def suggest(key: str, known: list[str]) -> str:
    """Return ``; did you mean …?`` for the nearest of ``known``, or nothing where none is near."""
    if key in known:
        return ": it lies below a key that is null here"
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.6)
    if not near:
        leaf = key.rsplit(".", 1)[-1]
        by_leaf = {name.rsplit(".", 1)[-1]: name for name in known}
        near = [by_leaf[leaf_name] for leaf_name in difflib.get_close_matches(leaf, by_leaf, n=1, cutoff=0.7)]
    return f"; did you mean {near[0]}?" if near else "; `lorakit train --cfg job` prints all keys"


def all_keys(config_name: str) -> Iterator[str]:
    """Yield every key of the config without overrides, in dots."""
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        config = compose(config_name, overrides=["experiment=pig_latin"])
    yield from _flatten(config, "")


def _flatten(config: Any, prefix: str) -> Iterator[str]:
    from omegaconf import DictConfig

    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _flatten(node, f"{prefix}{key}.")


def _explain_group(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = next((line for line in lines if "Could not find" in line), lines[0])
    options = [line for line in lines if re.fullmatch(r"[\w/-]+", line)]
    wanted = re.search(r"'([^']+)'", found)
    name = wanted[1].rsplit("/", 1)[-1] if wanted else ""
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    there = f" (there are: {', '.join(options)})" if options else ""
    return f"{found}{hint}{there}"


def _first_lines(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [
        line for line in lines if not line.startswith(("See https", "Set the environment", "object_type=", "reference_type="))
    ]
    return "\n".join(kept[:3])
