"""Checks of what the DataModule is told, before anything is read."""

from __future__ import annotations

from typing import Any

from lorakit.errors import ConfigError


def check_counts(**counts: int | None) -> None:
    """Raise ConfigError for each of ``counts`` that is given and less than 1."""
    bad = [
        f"data.{name}={value}" for name, value in counts.items() if value is not None and value < 1
    ]
    if bad:
        raise ConfigError(f"{', '.join(bad)}: must be at least 1")


def check_settings(*, on_error: str, val_path: str | None, val_fraction: float) -> None:
    """Raise ConfigError where a value is unknown, or two say what one can."""
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"data.on_error={on_error} is unknown; choose raise or skip")
    if val_path and val_fraction:
        raise ConfigError("data.val_path and data.val_fraction are both set; choose one")
    if not 0 <= val_fraction < 1:
        raise ConfigError(f"data.val_fraction={val_fraction} must be at least 0 and less than 1")


def one_of(enum: Any, value: str, key: str) -> Any:
    """The member of ``enum`` that ``value`` names. Raises ConfigError with all of them."""
    try:
        return enum(value)
    except ValueError:
        raise ConfigError(f"{key}={value} is unknown; choose one of {', '.join(enum)}") from None
