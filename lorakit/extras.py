"""Packages that only a part of lorakit needs: the extra of ``pyproject.toml`` that installs each,
and the message where one is missing.
"""

from __future__ import annotations

import importlib
import importlib.util
from types import ModuleType
from typing import NamedTuple

from lorakit.errors import ConfigError


class Package(NamedTuple):
    """One package of an extra."""

    extra: str
    needed_by: str  # what cannot be done without it, in the singular: the message begins with it
    distribution: str = ""  # pip's name, where it is not the name that is imported


PACKAGES = {  # by the name that is imported
    "optuna": Package("sweep", "sweep=optuna"),
    "matplotlib": Package("plots", "plotting"),
    "tensorboard": Package("tensorboard", "logger=tensorboard"),
    "datasets": Package("hub", "reading a CSV or Parquet file or a data set of the hub"),
    "sqlalchemy": Package("serve", "ServiceClient"),
    "fastapi": Package("serve", "lorakit serve"),
    "uvicorn": Package("serve", "lorakit serve"),
    "pydantic": Package("serve", "lorakit serve"),
    "google.protobuf": Package("serve", "lorakit serve", "protobuf"),
    "zstandard": Package("serve", "lorakit serve"),
}


def require(name: str, needed_by: str | None = None) -> ModuleType:
    """The imported package ``name`` of an extra.

    Args:
        needed_by: what cannot be done without it, if that is more exact than the table's words.

    Raises:
        ConfigError: it is not installed. A package that is installed and broken raises its own
            error.
    """
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if not _is_about(error, name):
            raise
        raise ConfigError(_message([name], needed_by)) from error


def check_extra(extra: str, needed_by: str | None = None) -> None:
    """Check that all packages of ``extra`` are installed; none is imported.

    Raises:
        ConfigError: it names all that are missing.
    """
    if missing := [name for name in packages_of(extra) if not is_installed(name)]:
        raise ConfigError(_message(missing, needed_by))


def find_problem(name: str, needed_by: str | None = None) -> str | None:
    """The message of ``require``, or None where the package is installed; it is not imported."""
    return None if is_installed(name) else _message([name], needed_by)


def is_installed(name: str) -> bool:
    """Whether the package ``name`` can be found; it is not imported."""
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:  # a package above it is missing
        return False


def packages_of(extra: str) -> list[str]:
    """The packages of ``extra``, as they are imported."""
    return [name for name, package in PACKAGES.items() if package.extra == extra]


def distribution_of(name: str) -> str:
    """What pip calls the package that is imported as ``name``."""
    return PACKAGES[name].distribution or name


def _message(missing: list[str], needed_by: str | None) -> str:
    package = PACKAGES[missing[0]]
    names = ", ".join(map(distribution_of, missing))
    return (
        f"{needed_by or package.needed_by} needs {names}, which"
        f" {'is' if len(missing) == 1 else 'are'} not installed: pip install"
        f" 'lorakit[{package.extra}]'"
    )


def _is_about(error: ModuleNotFoundError, name: str) -> bool:
    """Whether it is ``name`` that is missing, or a package that it is part of or that is part of
    it, and not something else that it imports.
    """
    missing = f"{error.name}."
    return missing.startswith(f"{name}.") or f"{name}.".startswith(missing)
