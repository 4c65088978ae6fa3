"""Hydra's half of a sweep: from what was typed to what is chosen from. The sweepers themselves,
which Hydra has to find, are in hydra_plugins/lorakit.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from omegaconf import OmegaConf

from lorakit.cli.overrides import as_typed, quote_path
from lorakit.config.check import check_group
from lorakit.config.settings import OptunaSettings, WandbSettings
from lorakit.errors import ConfigError, report
from lorakit.extras import require
from lorakit.quoting import quote_for_shell
from lorakit.sweep.space import Choice, Range, Space, check_range
from lorakit.sweep.study import Trial

if TYPE_CHECKING:
    from hydra_plugins.lorakit import OptunaSweeper, WandbSweeper

_OF_ONE_RUN = ("run", "resume", "sweep.trial")


def run_trials_of(sweeper: OptunaSweeper, arguments: list[str]) -> None:
    """Run trials until there are enough. Raises LorakitError."""
    require("optuna")
    from lorakit.pipeline.trials import run_trials

    plain, space, others = prepare(sweeper, arguments, OptunaSettings)
    folder = folder_of(sweeper)
    fixed = [str(override.input_line) for override in others]
    launcher = sweeper.launcher
    assert launcher is not None

    def launch(trial: Trial, chosen: list[str]) -> None:
        name = quote_path(f"run={folder.name}")
        overrides = [*fixed, *chosen, name, "resume=auto", f"sweep.trial={trial.number}"]
        for result in launcher.launch([overrides], initial_job_idx=trial.number):
            _ = result.return_value  # raises what Hydra itself refused

    run_trials(plain, space, folder, launch)


def write_wandb_sweep(sweeper: WandbSweeper, arguments: list[str]) -> None:
    """Write the file and say what to type. Raises ConfigError."""
    from lorakit.callbacks.wandb_run import resolve_project
    from lorakit.sweep.wandb_file import write_sweep_file

    plain, space, others = prepare(sweeper, arguments, WandbSettings)
    fixed = [
        as_typed(override)
        for override in others
        if override.get_key_element().split(".")[0] != "sweep"
    ]
    path = write_sweep_file(folder_of(sweeper), plain, space, fixed)
    project = resolve_project(((plain["logger"] or {}).get("wandb") or {}).get("project"))
    print(f"written {path}; W&B's server chooses, so it needs a key:")
    print(f"  wandb sweep --project {quote_for_shell(project)} {quote_for_shell(str(path))}")
    print(
        "  wandb agent …      # the line that it prints, on each machine that shall work at it,"
        " in this folder"
    )


def prepare(
    sweeper: OptunaSweeper | WandbSweeper, arguments: list[str], schema: type[Any]
) -> tuple[dict[str, Any], Space, list[Override]]:
    """Return (config without what is chosen, space, other overrides). Raises ConfigError."""
    plain: Any = OmegaConf.to_container(sweeper.config, resolve=False)
    if problems := check_group("sweep", plain["sweep"], schema):
        raise ConfigError(report("these settings cannot be used:", problems))
    if plain["sweep"]["direction"] not in ("minimize", "maximize"):
        raise ConfigError(f"sweep.direction={plain['sweep']['direction']}: minimize or maximize")
    if plain["sweep"]["trials"] < 1:
        raise ConfigError(f"sweep.trials={plain['sweep']['trials']} must be at least 1")
    assert sweeper.hydra_context is not None
    parser = OverridesParser.create(config_loader=sweeper.hydra_context.config_loader)
    parsed = parser.parse_overrides(
        [*(f"{key}={value}" for key, value in sweeper.params.items()), *arguments]
    )
    # the last one counts
    overrides = {override.get_key_element(): override for override in parsed}
    space = {
        key: to_space(override)
        for key, override in overrides.items()
        if override.is_sweep_override()
    }
    if not space:
        raise ConfigError(
            "there is nothing to choose: give ranges or values, as in"
            " 'optim.lr=tag(log,interval(1e-5,1e-3))' lora.rank=8,16,32"
        )
    fixed = [
        override
        for key, override in overrides.items()
        if not override.is_sweep_override() and key.lstrip("+") not in _OF_ONE_RUN
    ]
    first = [f"{key}={entry.first()}" for key, entry in space.items()]
    sweeper.validate_batch_is_legal(
        [[*(str(override.input_line) for override in fixed), *first]]
    )  # before anything is written
    return plain, space, fixed


def folder_of(sweeper: OptunaSweeper | WandbSweeper) -> Path:
    """The sweep's folder."""
    assert sweeper.config is not None
    return Path(str(sweeper.config.hydra.sweep.dir)).expanduser()


def to_space(override: Override) -> Choice | Range:
    """What is after the = of a swept setting. Raises ConfigError."""
    key, value = override.get_key_element(), override.value()
    if isinstance(value, IntervalSweep | RangeSweep):
        is_whole, is_log, step = isinstance(value.start, int), "log" in value.tags, None
        if isinstance(value, IntervalSweep):
            numbers = [number for number in (value.start, value.end) if number is not None]
        else:
            numbers, step = sorted(value.range()), abs(value.step)
        low, high = (numbers[0], numbers[-1]) if numbers else (0, 0)
        is_whole = is_whole and isinstance(high, int) and (step is None or isinstance(step, int))
        check_range(key, low, high, is_log=is_log, step=step)
        return Range(float(low), float(high), step, is_whole, is_log)
    return Choice(tuple(override.sweep_string_iterator()))
