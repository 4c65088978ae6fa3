"""One process."""

from __future__ import annotations

from lorakit.errors import ConfigError
from lorakit.strategy.world import current_world


def single() -> str:
    """Return Lightning's name for it. Raises ConfigError where there are several processes."""
    if (size := current_world().size) > 1:
        raise ConfigError(
            f"strategy=single is for one process, and there are {size}; choose ddp, zero1, zero2,"
            " zero3 or auto"
        )
    return "auto"
