"""The types of settings: of closed groups, whose keys are known, and of a component, whose keys are
the arguments of what it names.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lorakit.config.instantiate import import_target, instantiate


@dataclass(frozen=True)
class Component:
    """What ``_target_`` names, and the arguments that it is called with.

    Args:
        arguments: as a config has them; of some the value may be a component in its turn, as a
            mapping with a ``_target_``.
        is_partial: whether more arguments come at run time; None where nobody has said so.
    """

    target: str
    arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    is_partial: bool | None = None

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Component:
        """Read a mapping with a ``_target_``."""
        arguments = {k: v for k, v in settings.items() if k not in ("_target_", "_partial_")}
        return cls(settings["_target_"], arguments, settings.get("_partial_"))

    def to_dict(self) -> dict[str, Any]:
        """The mapping that it was read from."""
        partial = {} if self.is_partial is None else {"_partial_": self.is_partial}
        return {"_target_": self.target, **partial, **self.arguments}

    def get(self, name: str, default: Any = None) -> Any:
        """An argument, or ``default`` where it is not given."""
        return self.arguments.get(name, default)

    def with_arguments(self, **arguments: Any) -> Component:
        """The same with some arguments changed."""
        return dataclasses.replace(self, arguments={**self.arguments, **arguments})

    def imported(self, key: str) -> Callable[..., Any]:
        """What ``target`` names. Raises ConfigError, which calls it ``key``."""
        return import_target(self.target, key)

    def build(self, key: str, **runtime: Any) -> Any:
        """The object; see ``instantiate``. Raises ConfigError."""
        return instantiate(self.to_dict(), key, **runtime)


@dataclass(frozen=True, kw_only=True)
class PathSettings:
    """Where runs are."""

    runs: str
    run: str | None = None


@dataclass(frozen=True, kw_only=True)
class TrainerSettings:
    """How long, on what, and in which number format a run trains."""

    accelerator: str
    devices: int | str
    precision: str
    max_steps: int
    accumulate_grad_batches: int
    activation_checkpointing: bool
    compile: bool
    eval_every_steps: int | None
    log_every_n_steps: int
    max_bad_steps: int
    threads: int | None
    deterministic: bool


@dataclass(frozen=True, kw_only=True)
class CheckpointSettings:
    """How often checkpoints are written, and how many stay."""

    every_steps: int
    keep_last: int
    keep_best: int


@dataclass(frozen=True, kw_only=True)
class EvalSettings:
    """What is measured beside the rows that are held out."""

    retain_path: str | None
    retain_rows: int


@dataclass(frozen=True, kw_only=True)
class PlanSettings:
    """What memory, time and cost are planned with."""

    enforce: bool
    memory_gb: float | None
    gpus: list[int]
    tokens: float | None
    tflops: float
    utilisation: float
    price_per_hour: float


@dataclass(frozen=True, kw_only=True)
class OptunaSettings:
    """A sweep whose trials Optuna chooses."""

    trials: int
    metric: str
    direction: str
    storage: str
    sampler: dict[str, Any]
    pruner: dict[str, Any] | None
    trial: int | None


@dataclass(frozen=True, kw_only=True)
class WandbSettings:
    """A sweep whose runs W&B's server chooses."""

    method: str
    trials: int
    metric: str
    direction: str
    early_terminate: dict[str, Any] | None
