"""A run's settings, typed: composed once, checked once, and handed on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from lorakit.config.auto import auto_keys, with_values, without_auto
from lorakit.config.check import check_settings
from lorakit.config.defaults import with_defaults
from lorakit.config.instantiate import instantiate
from lorakit.config.settings import (
    CheckpointSettings,
    Component,
    EvalSettings,
    PathSettings,
    PlanSettings,
    TrainerSettings,
)
from lorakit.data.specs import SPECS, DataSpec, field_names
from lorakit.errors import ConfigError
from lorakit.lora.spec import LoRASpec
from lorakit.loss.inputs import inputs_of
from lorakit.model.spec import ModelSpec

_CLOSED = {
    "model": ModelSpec,
    "trainer": TrainerSettings,
    "checkpoint": CheckpointSettings,
    "eval": EvalSettings,
    "plan": PlanSettings,
    "paths": PathSettings,
}
_COMPONENTS = ("loss", "optim", "schedule", "strategy", "launch")
_NAMED_COMPONENTS = ("callbacks", "logger")
_PLAIN = ("sweep", "run", "group", "resume", "seed", "vars")


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """All settings of a run.

    ``from_dict`` makes one of plain values, ``lorakit.train`` trains as it says. A setting that
    says auto and waits for model, data and memory is listed in ``auto``; until it is chosen its
    field holds a stand-in.

    Args:
        data_target, lora_target: the classes to which ``data`` and ``lora`` are passed.
        data_arguments: what a ``data_target`` of the user's own takes beside ``data``.
        optim: with the learning rate, a number or auto; ``clip_norm`` is the module's.
        callbacks, logger: by name; None is switched off.
        auto: keys in dots.
    """

    model: ModelSpec
    data: DataSpec
    lora: LoRASpec
    loss: Component
    optim: Component
    schedule: Component
    trainer: TrainerSettings
    strategy: Component
    launch: Component
    callbacks: Mapping[str, Component | None]
    logger: Mapping[str, Component | None]
    paths: PathSettings
    checkpoint: CheckpointSettings
    eval: EvalSettings
    plan: PlanSettings
    sweep: Mapping[str, Any] | None = None
    run: str | None = None
    group: str | None = None
    resume: bool | str = False
    seed: int = 0
    vars: Any = None
    clip_norm: float = 1.0
    data_target: str = "lorakit.data.datamodule.LoRADataModule"
    data_arguments: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    lora_target: str = "lorakit.lora.spec.LoRASpec"
    auto: frozenset[str] = frozenset()

    # ---- from and to plain values

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> RunConfig:
        """Check ``settings`` and make them typed. What they leave out is as in conf/.

        Raises:
            ConfigError: with every problem.
        """
        plain = with_defaults(settings)
        if "path" not in plain["model"]:
            raise ConfigError("model.path has no default and must be set")
        check_settings(plain)
        plain, auto = without_auto(plain), frozenset(auto_keys(plain))
        data, data_target = dict(plain["data"]), plain["data"]["_target_"]
        del data["_target_"]
        known = {name for kind in SPECS.values() for name in field_names(kind)}
        optim = dict(plain["optim"])
        clip_norm = optim.pop("clip_norm")
        components = {name: plain[name] for name in _COMPONENTS} | {"optim": optim}
        fields: dict[str, Any] = {name: kind(**plain[name]) for name, kind in _CLOSED.items()}
        fields |= {name: Component.from_dict(entry) for name, entry in components.items()}
        for name in _NAMED_COMPONENTS:
            fields[name] = {
                key: None if entry is None else Component.from_dict(entry)
                for key, entry in (plain[name] or {}).items()
            }
        return cls(
            **fields,
            **{name: plain[name] for name in _PLAIN if name in plain},
            data=DataSpec.from_keywords({k: v for k, v in data.items() if k in known}),
            data_target=data_target,
            data_arguments={k: v for k, v in data.items() if k not in known},
            lora=instantiate(plain["lora"], "lora"),
            lora_target=plain["lora"]["_target_"],
            clip_norm=clip_norm,
            auto=auto,
        )

    def to_dict(self) -> dict[str, Any]:
        """The plain values that it was made of, for files, loggers and other processes."""
        lora = {f.name: getattr(self.lora, f.name) for f in dataclasses.fields(self.lora)}
        del lora["token_ids"]  # of the model's new tokens, not a setting
        data = {**self.data.keywords(), **self.data_arguments}
        found: dict[str, Any] = {
            "data": {"_target_": self.data_target, **data},
            "lora": {"_target_": self.lora_target, **lora},
            **{name: getattr(self, name).to_dict() for name in _COMPONENTS},
            **{
                name: {key: entry and entry.to_dict() for key, entry in getattr(self, name).items()}
                for name in _NAMED_COMPONENTS
            },
            **{name: vars(getattr(self, name)).copy() for name in _CLOSED},
            **{name: getattr(self, name) for name in _PLAIN if name != "vars"},
        }
        found["optim"]["clip_norm"] = self.clip_norm
        if self.vars is not None:
            found["vars"] = self.vars
        order = [f.name for f in dataclasses.fields(self) if f.name in found]
        return with_values({name: found[name] for name in order}, dict.fromkeys(self.auto, "auto"))

    def with_values(self, values: Mapping[str, Any]) -> RunConfig:
        """The same with each ``group.key`` of ``values`` set; none of them is auto any more."""
        config = self
        for key, value in values.items():
            config = config._with(key, value)
        return dataclasses.replace(config, auto=self.auto - values.keys())

    def with_overrides(self, overrides: list[str]) -> RunConfig:
        """The same with each ``group.key=value`` set, values as YAML has them."""
        pairs = [override.split("=", 1) for override in overrides]
        return self.with_values({key: yaml.safe_load(value) for key, value in pairs})

    def _with(self, key: str, value: Any) -> RunConfig:
        group, _, name = key.partition(".")
        if not name:
            return dataclasses.replace(self, **{group: value})
        if key == "optim.clip_norm":
            return dataclasses.replace(self, clip_norm=value)
        node: Any = getattr(self, group)
        changed: Any
        if isinstance(node, DataSpec):
            home = next(home for home, kind in SPECS.items() if name in field_names(kind))
            spec = dataclasses.replace(getattr(node, home), **{name: value})
            changed = dataclasses.replace(node, **{home: spec})
        elif isinstance(node, Component):
            changed = node.with_arguments(**{name: value})
        elif group in _NAMED_COMPONENTS:
            entry, _, argument = name.partition(".")
            changed = {**node, entry: node[entry].with_arguments(**{argument: value})}
        else:
            changed = dataclasses.replace(node, **{name: value})
        return dataclasses.replace(self, **{group: changed})

    # ---- derived values, each in one place

    @property
    def runs_folder(self) -> Path:
        """The folder of all runs."""
        return Path(self.paths.runs).expanduser()

    @property
    def sequence_parallel(self) -> int:
        """How many processes share each row of tokens."""
        size: int = self.strategy.get("sequence_parallel", 1)
        return size

    @cached_property
    def is_of_pairs(self) -> bool:
        """Whether the loss is one of pairs."""
        return inputs_of(self.loss.imported("loss")).is_of_pairs

    @property
    def row_tokens(self) -> int | None:
        """Positions of a packed row; None without packing."""
        return self.data.row_tokens(are_pairs=self.is_of_pairs)

    @property
    def rows_per_example(self) -> int:
        """Rows of a batch for each row of the data: two for a pair that is not packed."""
        return 2 if self.is_of_pairs and not self.data.batches.packing else 1

    @property
    def lora_with_tokens(self) -> LoRASpec:
        """``lora`` with the ids of the model's new tokens, whose rows are trained."""
        ids = self.model.added_token_ids()
        return dataclasses.replace(self.lora, token_ids=ids) if ids else self.lora

    def check_resume(self) -> None:
        """Raise ConfigError where ``resume`` has no meaning."""
        if self.resume not in (True, False, "auto"):
            raise ConfigError(f"resume={self.resume} is unknown; choose true, false or auto")
