"""The check of all settings before anything is read: keys, types, values, all problems at once."""

from __future__ import annotations

import difflib
from typing import Any, get_type_hints

from lorakit.config.auto import without_auto
from lorakit.config.instantiate import find_argument_problems, find_type_problem, import_target
from lorakit.config.settings import CheckpointSettings, EvalSettings, PlanSettings, TrainerSettings
from lorakit.data.specs import SPECS
from lorakit.errors import ConfigError
from lorakit.extras import find_problem
from lorakit.loss.inputs import inputs_of
from lorakit.model.spec import ModelSpec

_GROUPS: dict[str, type[Any]] = {
    "model": ModelSpec,
    "trainer": TrainerSettings,
    "checkpoint": CheckpointSettings,
    "plan": PlanSettings,
    "eval": EvalSettings,
}
_TOP_LEVEL = (
    *("model", "data", "lora", "loss", "optim", "schedule", "trainer", "callbacks", "logger"),
    *("paths", "checkpoint", "strategy", "launch", "plan", "sweep", "eval"),
    *("run", "group", "resume", "seed", "vars"),
)
_AT_LEAST_ONE = (
    "trainer.accumulate_grad_batches",
    "trainer.log_every_n_steps",
    "trainer.max_bad_steps",
    "checkpoint.keep_last",
    "eval.retain_rows",
    "launch.collective_timeout_seconds",
    "launch.nodes",
)
_AT_LEAST_ZERO = ("checkpoint.every_steps", "checkpoint.keep_best", "launch.max_restarts")


def check_settings(config: dict[str, Any]) -> None:
    """Check keys, types and values of all groups. Raises ConfigError with every problem at once."""
    is_given, config = config, without_auto(config)
    problems = _find_unknown_keys(config)
    if is_given["data"].get("tokens_per_batch") == "auto" and config["data"].get("batch_size"):
        problems.append(
            "data.batch_size and data.tokens_per_batch=auto are both set; set one of them to null"
        )
    for group, schema in _GROUPS.items():
        problems += check_group(group, config[group], schema)
    problems += [
        f"unknown key data.{name}; the keys of data are flat"
        for name in SPECS.keys() & config["data"].keys()
    ]
    for group in ("data", "lora", "launch", "loss"):
        problems += find_argument_problems(config[group], group)
    if not problems:
        problems += _find_range_problems(config)
    sp_size = config["strategy"].get("sequence_parallel", 1)
    if isinstance(sp_size, bool) or not isinstance(sp_size, int) or sp_size < 1:
        problems.append(f"strategy.sequence_parallel={sp_size} must be a whole number, at least 1")
    if config["strategy"]["_target_"] != "auto":
        problems += find_argument_problems(config["strategy"], "strategy")
    seed = config["seed"]
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < 2**32:
        problems.append(f"seed={seed} must be a whole number from 0 to 4294967295")
    problems += _find_optim_problems(config["optim"])
    for group in ("optim", "schedule"):
        taken = {key: value for key, value in config[group].items() if key != "clip_norm"}
        problems += find_argument_problems(taken, group)
    for group in ("callbacks", "logger"):
        for name, entry in (config[group] or {}).items():
            if entry is not None:
                problems += find_argument_problems(entry, f"{group}.{name}")
                if entry["_target_"].endswith("TensorBoardLogger") and (
                    missing := find_problem("tensorboard", f"{group}.{name}")
                ):
                    problems.append(missing)
    problems += _find_loss_problems(config["loss"])
    if len(problems) > 1:
        problems.insert(0, "these settings cannot be used:")
    if problems:
        raise ConfigError("\n  ".join(problems))


def _find_loss_problems(settings: dict[str, Any]) -> list[str]:
    """The losses of policies take what rows of data do not have."""
    loss = import_target(settings["_target_"], "loss")
    missing = [name for name in inputs_of(loss).required if name != "weights"]
    if not missing:
        return []
    return [
        f"loss._target_={settings['_target_']} takes {', '.join(missing)} for each token, which"
        " rows of data have not; write its loop with lorakit.ServiceClient"
    ]


def _find_unknown_keys(config: dict[str, Any]) -> list[str]:
    """Keys that ``+key=value`` or a config of the user's brought in, and that nothing reads."""
    problems = []
    for prefix, node, known in (
        ("", config, _TOP_LEVEL),
        ("paths.", config["paths"], ("runs", "run")),
    ):
        for name in node.keys() - set(known):
            near = difflib.get_close_matches(name, set(known) - {"run"} if prefix else known, n=1)
            hint = "values of your own, for ${vars.…}, go below `vars`"
            if near:
                hint = f"did you mean {prefix}{near[0]}?"
            if name == "experiment":
                hint = "the first line of an experiment's file is `# @package _global_`"
            problems.append(f"unknown key {prefix}{name}; {hint}")
    return sorted(problems)


def _find_range_problems(config: dict[str, Any]) -> list[str]:
    groups = (*_GROUPS, "launch")
    flat = {f"{group}.{key}": value for group in groups for key, value in config[group].items()}
    problems = [f"{key}={flat[key]} must be at least 1" for key in _AT_LEAST_ONE if flat[key] < 1]
    problems += [f"{key}={flat[key]} must be at least 0" for key in _AT_LEAST_ZERO if flat[key] < 0]
    if isinstance(rank := config["lora"].get("rank"), int) and rank < 1:
        problems.append(f"lora.rank={rank} must be at least 1")
    if flat["trainer.max_steps"] == 0 or flat["trainer.max_steps"] < -1:
        problems.append(
            f"trainer.max_steps={flat['trainer.max_steps']} must be at least 1, or -1 for"
            " data.epochs"
        )
    if flat["trainer.eval_every_steps"] is not None and flat["trainer.eval_every_steps"] < 1:
        problems.append(
            f"trainer.eval_every_steps={flat['trainer.eval_every_steps']} must be at least 1, or"
            " null"
        )
    return problems


def _find_optim_problems(optim: dict[str, Any]) -> list[str]:
    problems = []
    clip_norm, lr = optim.get("clip_norm"), optim.get("lr")
    if isinstance(clip_norm, bool) or not isinstance(clip_norm, (int, float)) or clip_norm < 0:
        problems.append(f"optim.clip_norm={clip_norm} must be a number that is not negative")
    if lr == "auto":
        if "Adam" not in optim["_target_"]:
            problems.append(
                f"optim.lr=auto is a rule for Adam and AdamW, not for {optim['_target_']}; set"
                " optim.lr"
            )
    elif isinstance(lr, bool) or not isinstance(lr, (int, float)) or lr < 0:
        problems.append(f"optim.lr={lr} must be a number that is not negative, or auto")
    return problems


def check_group(group: str, settings: dict[str, Any], schema: type[Any]) -> list[str]:
    """Return which of ``settings`` the schema does not know, or not with that type."""
    hints = get_type_hints(schema)
    problems = []
    for name, value in settings.items():
        if name not in hints:
            near = difflib.get_close_matches(name, hints, n=1)
            hint = f"; did you mean {group}.{near[0]}?" if near else ""
            problems.append(f"unknown key {group}.{name}{hint}")
        elif problem := find_type_problem(value, hints[name]):
            problems.append(f"{group}.{name}={value}: {problem}")
    return problems
