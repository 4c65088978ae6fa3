"""A run's loss, optimiser and schedule, from their settings."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from lorakit.config.schema import RunConfig
from lorakit.config.settings import Component
from lorakit.errors import ConfigError


def build_loss(loss: Component) -> Callable[..., Any]:
    """The loss: a function with its numbers, or an instance. Raises ConfigError."""
    is_class = isinstance(loss.imported("loss"), type)
    built: Callable[..., Any] = Component(loss.target, loss.arguments, not is_class).build("loss")
    return built


def build_optimization(
    config: RunConfig, *, lr: float, total_steps: int, precision: str
) -> tuple[Any, Any]:
    """Return what makes optimiser and schedule, tried on a number. Raises ConfigError."""
    optim = config.optim.with_arguments(lr=lr)
    if precision == "16-mixed" and optim.get("fused"):
        # a fused step unscales gradients itself, too late to clip them
        optim = optim.with_arguments(fused=False, foreach=True)
    optimizer, schedule = optim.build("optim"), config.schedule.build("schedule")
    try:
        tried = optimizer([torch.nn.Parameter(torch.zeros(1))])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optim: {optim.target} refuses its settings: {error}") from error
    try:
        schedule(tried, total_steps=total_steps)
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"schedule: {config.schedule.target} refuses its settings: {error}"
        ) from error
    return optimizer, schedule
