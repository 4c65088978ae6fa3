"""Settings that may be ``auto``; `pipeline/autoconfig.py` chooses their values."""

from __future__ import annotations

from typing import Any

# What stands for ``auto`` where nothing has to be chosen: in checks of a config, and for commands
# that do not train.
STAND_INS: dict[str, Any] = {
    "lora.rank": 32,
    "lora.expert_layout": "per_expert",
    "data.tokens_per_batch": None,
    "trainer.accumulate_grad_batches": 1,
    "trainer.activation_checkpointing": False,
}


def auto_keys(config: dict[str, Any]) -> list[str]:
    """The keys of ``STAND_INS`` that ``config`` leaves to ``auto``."""
    return [
        key
        for key in STAND_INS
        if (config.get(key.split(".")[0]) or {}).get(key.split(".")[1]) == "auto"
    ]


def with_values(config: dict[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """``config`` with ``group.key`` set to each of ``values``."""
    for name, value in values.items():
        group, key = name.split(".")
        config = {**config, group: {**config[group], key: value}}
    return config


def without_auto(config: dict[str, Any]) -> dict[str, Any]:
    """``config`` with something instead of each ``auto``."""
    return with_values(config, {key: STAND_INS[key] for key in auto_keys(config)})
