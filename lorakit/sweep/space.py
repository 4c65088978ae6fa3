"""What a sweep chooses a setting from: a list of values, or a range."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.errors import ConfigError

if TYPE_CHECKING:
    import optuna


@dataclass(frozen=True)
class Choice:
    """Values as they are typed, without an order between them."""

    values: tuple[str, ...]

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        """Let Optuna choose; returns the value as it is typed."""
        return trial.suggest_categorical(key, self.values)

    def first(self) -> str:
        """A value, to try."""
        return self.values[0]

    def for_wandb(self) -> dict[str, Any]:
        """The parameter as W&B's sweep files write it."""
        return {"values": [_as_number(value) for value in self.values]}


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included.

    Args:
        step: between neighbours; None is any number between (any whole one where ``is_whole``).
        is_log: whether each factor of ten gets the same attention.
    """

    low: float
    high: float
    step: float | None = None
    is_whole: bool = False
    is_log: bool = False

    def suggest(self, trial: optuna.Trial, key: str) -> str:
        """Let Optuna choose; returns the value as it is typed."""
        if self.is_whole:
            step = 1 if self.step is None else int(self.step)
            return str(
                trial.suggest_int(key, int(self.low), int(self.high), step=step, log=self.is_log)
            )
        return repr(trial.suggest_float(key, self.low, self.high, step=self.step, log=self.is_log))

    def first(self) -> str:
        """A value, to try."""
        return str(int(self.low)) if self.is_whole else repr(self.low)

    def for_wandb(self) -> dict[str, Any]:
        """The parameter as W&B's sweep files write it."""
        if self.step not in (None, 1):
            count = round((self.high - self.low) / self.step) + 1
            values = [self.low + self.step * number for number in range(count)]
            return {"values": [int(value) if self.is_whole else value for value in values]}
        kind = {
            (False, False): "uniform",
            (False, True): "log_uniform_values",
            (True, False): "int_uniform",
            (True, True): "q_log_uniform_values",
        }[self.is_whole, self.is_log]
        if self.is_whole:
            return {"distribution": kind, "min": int(self.low), "max": int(self.high)}
        return {"distribution": kind, "min": self.low, "max": self.high}


Space = dict[str, Choice | Range]


def check_range(
    key: str, low: float, high: float, *, is_log: bool, step: float | None = None
) -> None:
    """Raise ConfigError where Optuna and W&B could not choose from the range."""
    if not low < high:
        raise ConfigError(
            f"{key}: a range goes from a number to a larger one, not from {low:g} to {high:g}"
        )
    if is_log and low <= 0:
        raise ConfigError(f"{key}: a logarithmic range begins above 0, not at {low:g}")
    if is_log and step not in (None, 1):
        raise ConfigError(f"{key}: a logarithmic range has no steps; leave the step out")


def _as_number(value: str) -> Any:
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return {"true": True, "false": False}.get(value.lower(), value)
