"""A config's ``_target_`` and its arguments to an object: checked against the signature of what it
names, with the nearest right name.
"""

from __future__ import annotations

import contextlib
import difflib
import enum
import functools
import inspect
from collections.abc import Callable
from typing import Any, Literal, get_args, get_origin, get_type_hints

import msgspec

from lorakit.errors import ConfigError
from lorakit.user_code import import_by_name

Config = dict[str, Any]


def instantiate(config: Config, key: str, **runtime: Any) -> Any:
    """Return the object that ``config`` describes: ``_target_`` called with the other entries, of
    which some may be described so themselves; ``_partial_`` waits for more.

    Raises:
        ConfigError: the target cannot be imported, or does not take an argument; the nearest right
            name is given.
    """
    settings = {
        name: (
            instantiate(value, f"{key}.{name}")
            if isinstance(value, dict) and "_target_" in value
            else value
        )
        for name, value in config.items()
        if name not in ("_target_", "_partial_")
    }
    target = import_target(config["_target_"], key)
    if problems := find_argument_problems(config, key, target):
        raise ConfigError("\n".join(problems))
    if config.get("_partial_"):
        return functools.partial(target, **settings, **runtime)
    try:
        return target(**settings, **runtime)
    except TypeError as error:
        raise ConfigError(f"{key}: {config['_target_']} refuses its settings: {error}") from error


def find_argument_problems(
    settings: dict[str, Any], key: str, target: Callable[..., Any] | None = None
) -> list[str]:
    """Return which of ``settings`` the target does not take, or not with that type, each with
    the nearest right name.
    """
    target = target or import_target(settings["_target_"], key)
    parameters = inspect.signature(target).parameters
    is_open = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    hints = _hints(target)
    problems = []
    for name, value in settings.items():
        if name in ("_target_", "_partial_"):
            continue
        if name not in parameters and not is_open:
            near = difflib.get_close_matches(name, parameters, n=1)
            hint = f"; did you mean {key}.{near[0]}?" if near else ""
            problems.append(
                f"unknown key {key}.{name}: {settings['_target_']} takes no such argument{hint}"
            )
        elif isinstance(value, dict) and "_target_" in value:
            problems += find_argument_problems(value, f"{key}.{name}")
        elif name in hints and (problem := find_type_problem(value, hints[name])):
            problems.append(f"{key}.{name}={value}: {problem}")
    return problems


def import_target(dotted: str, key: str) -> Callable[..., Any]:
    """Return what ``dotted`` names. Raises ConfigError."""
    try:
        found: Callable[..., Any] = import_by_name(dotted)
        return found
    except (ImportError, AttributeError, ValueError) as error:
        raise ConfigError(f"{key}._target_={dotted} cannot be imported: {error}") from error


def find_type_problem(value: Any, hint: Any) -> str | None:
    try:
        msgspec.convert(value, hint)
    except msgspec.ValidationError as error:
        choices = [
            str(one)
            for part in (hint, *get_args(hint))
            for one in (get_args(part) if get_origin(part) is Literal else _members(part))
        ]
        return str(error).lower().replace("`", "") + (
            f"; choose one of {', '.join(choices)}" if choices else ""
        )
    except TypeError:  # a type that is not plain data: for its owner to check
        return None
    return None


def _members(kind: Any) -> list[Any]:
    return [*kind] if inspect.isclass(kind) and issubclass(kind, enum.Enum) else []


def _hints(target: Callable[..., Any]) -> dict[str, Any]:
    function = target.__init__ if inspect.isclass(target) else target
    try:
        return get_type_hints(function)
    except (NameError, TypeError, AttributeError):  # some are imported for type checkers only
        pass
    known = getattr(inspect.unwrap(function), "__globals__", {})
    hints = {}
    for name, parameter in inspect.signature(function).parameters.items():
        with contextlib.suppress(Exception):
            hint = parameter.annotation
            hints[name] = eval(hint, known) if isinstance(hint, str) else hint
    return {name: hint for name, hint in hints.items() if hint is not inspect.Parameter.empty}
