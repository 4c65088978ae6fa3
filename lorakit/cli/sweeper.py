"""Hydra's sweepers of lorakit: trials that Optuna chooses, and a sweep file for W&B."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import inspect
import os
import shlex
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override, RangeSweep
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from lorakit.cli.overrides import as_typed, quote_path
from lorakit.config.instantiate import import_target
from lorakit.config.schema import OptunaSettings, WandbSettings, check_group
from lorakit.errors import ConfigError, LorakitError, report
from lorakit.extras import require
from lorakit.runs.folder import History, flatten
from lorakit.sweep.space import Choice, Range, Space, check_range
from lorakit.sweep.study import Study, Trial, last_value, open_study, seed_of

PACKAGE = (
    # the name under which Hydra knows this module: it takes no sweeper from outside of
    # hydra_plugins
    "hydra_plugins.lorakit"
)
TRIES = 3  # that may fail alike at the start of a sweep
_OF_ONE_RUN = ("run", "resume", "sweep.trial")


class _Sweeper(Sweeper):
    """What both have in common: settings, and what is chosen from.

    Args:
        params: ranges by key, as a config may hold them below ``hydra.sweeper.params``.
        max_batch_size: of Hydra's own sweeper; here trials come one by one.
    """

    schema: type[Any]

    def __init__(
        self, params: dict[str, str] | None = None, max_batch_size: int | None = None
    ) -> None:
        self.params = params or {}

    def setup(
        self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig
    ) -> None:
        """Take what Hydra has composed."""
        self.hydra_context, self.config = hydra_context, config
        self._launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def prepare(self, arguments: list[str]) -> tuple[dict[str, Any], Space, list[Override]]:
        """Return (the config without what is chosen, the space, the other overrides). Raises
        ConfigError.
        """
        plain: Any = OmegaConf.to_container(self.config, resolve=False)
        if problems := check_group("sweep", plain["sweep"], self.schema):
            raise ConfigError(report("these settings cannot be used:", problems))
        if plain["sweep"]["direction"] not in ("minimize", "maximize"):
            raise ConfigError(
                f"sweep.direction={plain['sweep']['direction']}: minimize or maximize"
            )
        if plain["sweep"]["trials"] < 1:
            raise ConfigError(f"sweep.trials={plain['sweep']['trials']} must be at least 1")
        assert self.hydra_context is not None
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        parsed = parser.parse_overrides(
            [*(f"{key}={value}" for key, value in self.params.items()), *arguments]
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
        self.validate_batch_is_legal(
            [[*(str(override.input_line) for override in fixed), *first]]
        )  # before anything is written
        return plain, space, fixed

    def folder(self) -> Path:
        """The sweep's folder."""
        assert self.config is not None
        return Path(str(self.config.hydra.sweep.dir)).expanduser()


class OptunaSweeper(_Sweeper):
    """Trials one after the other, each chosen from what is known of those before it."""

    schema = OptunaSettings

    def sweep(self, arguments: list[str]) -> None:
        """Run trials until there are enough. Raises LorakitError."""
        require("optuna")
        plain, space, others = self.prepare(arguments)
        fixed = [str(override.input_line) for override in others]
        _refuse_elsewhere(plain)
        study = _open(plain, space, self.folder())
        try:
            self._run_trials(study, space, fixed)
        except (KeyboardInterrupt, SystemExit):
            print(
                f"the sweep goes on with the same command and group={study.folder.name}"
                " resume=true",
                flush=True,
            )
            raise
        _print_end(study)

    def _run_trials(self, study: Study, space: Space, fixed: Sequence[str]) -> None:
        total = study.num_trials
        while (trial := study.next_trial()) is not None:
            chosen = [f"{key}={entry.suggest(trial.trial, key)}" for key, entry in space.items()]
            begun = " goes on" if trial.is_resumed else ""
            print(f"trial {trial.number} of {total}{begun}: {' '.join(chosen)}", flush=True)
            # a worker died between its end and its entry
            if not ((run := study.run_of(trial.number)) and run.is_finished):
                self._launch(
                    trial, [*fixed, *chosen, quote_path(f"run={study.folder.name}"), "resume=auto"]
                )
            said, best = study.close_trial(trial), study.best()
            best_yet = f"; best: trial {best.number}, {best.value:.4f}" if best else ""
            print(f"trial {trial.number} of {total}: {said}{best_yet}", flush=True)
            _stop_if_none_can_work(study, trial.number)

    def _launch(self, trial: Trial, overrides: Sequence[str]) -> None:
        results = self._launcher.launch(
            [[*overrides, f"sweep.trial={trial.number}"]], initial_job_idx=trial.number
        )
        for result in results:
            _ = result.return_value  # raises what Hydra itself refused


class WandbSweeper(_Sweeper):
    """Writes the sweep file and runs nothing."""

    schema = WandbSettings

    def sweep(self, arguments: list[str]) -> None:
        """Write the file and say what to type. Raises ConfigError."""
        from lorakit.callbacks.wandb_run import resolve_project
        from lorakit.sweep.wandb_file import write_sweep_file

        plain, space, others = self.prepare(arguments)
        fixed = [
            as_typed(override)
            for override in others
            if override.get_key_element().split(".")[0] != "sweep"
        ]
        path = write_sweep_file(self.folder(), plain, space, fixed)
        project = ((plain["logger"] or {}).get("wandb") or {}).get("project")
        project = resolve_project(project)
        print(f"written {path}; W&B's server chooses, so it wants a key:")
        print(f"  wandb sweep --project {shlex.quote(project)} {shlex.quote(str(path))}")
        print(
            "  wandb agent …      # the line that it prints, on each machine that shall work at it,"
            " in this folder"
        )


def register() -> None:
    """Tell Hydra of the sweepers."""
    plugins, parent = Plugins.instance(), PACKAGE.partition(".")[0]
    if importlib.util.find_spec(parent) is None:  # no other plugin is installed
        sys.modules[parent] = importlib.util.module_from_spec(
            importlib.machinery.ModuleSpec(parent, None, is_package=True)
        )
    sys.modules[PACKAGE] = sys.modules[__name__]
    for kind in (OptunaSweeper, WandbSweeper):
        kind.__module__ = PACKAGE
        plugins.register(kind)


def to_space(override: Override) -> Choice | Range:
    """What is behind the = of a swept setting. Raises ConfigError."""
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


def _refuse_elsewhere(plain: dict[str, Any]) -> None:
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ConfigError(
            "sweep=optuna starts the processes of each trial itself: leave torchrun out, and set"
            " trainer.devices=N"
        )
    if plain["launch"]["_target_"].endswith("SlurmJob"):
        raise ConfigError(
            "sweep=optuna chooses a trial when the one before it has ended, so none can wait in a"
            " queue: put the command itself into a job, or, with sweep.storage=journal and"
            " resume=auto, into each job of an array"
        )


def _open(plain: dict[str, Any], space: Space, folder: Path) -> Study:
    from lorakit.config.instantiate import instantiate
    from lorakit.pipeline.resume import FREE_KEYS

    if plain["resume"] not in (True, False, "auto"):
        raise ConfigError(f"resume={plain['resume']} is unknown; choose true, false or auto")
    settings = plain["sweep"]
    if settings["storage"] not in ("sqlite", "journal"):
        raise ConfigError(
            f"sweep.storage={settings['storage']}: sqlite for one worker, journal for several"
        )
    for name in ("sampler", "pruner"):
        if settings[name] is not None:
            instantiate(settings[name], f"sweep.{name}")  # refused before anything is written
    seeded = (
        "seed"
        in inspect.signature(
            import_target(settings["sampler"]["_target_"], "sweep.sampler")
        ).parameters
    )

    def build_sampler(number: int) -> Any:
        seed = {"seed": seed_of(plain["seed"], number)} if seeded else {}
        return instantiate(settings["sampler"] | seed, "sweep.sampler")

    _try_sampler(build_sampler, space)
    swept = tuple(f"{key}." for key in space)
    same = {
        key: str(value)
        for key, value in flatten(plain).items()
        if not key.startswith((*FREE_KEYS, "hydra."))
        and key not in space
        and not key.startswith(swept)
    }
    chosen = {key: str(entry) for key, entry in space.items()}
    return open_study(
        folder,
        Path(plain["paths"]["runs"]).expanduser(),
        storage=settings["storage"],
        metric=settings["metric"],
        direction=settings["direction"],
        num_trials=settings["trials"],
        resume=plain["resume"],
        build_sampler=build_sampler,
        settings={
            **chosen,
            **same,
            "sweep.metric": settings["metric"],
            "sweep.direction": settings["direction"],
        },
    )


def _try_sampler(build_sampler: Callable[[int], Any], space: Space) -> None:
    """Raise ConfigError where the sampler cannot choose from ``space``, for want of a library,
    say.
    """
    import optuna

    try:
        trial = optuna.create_study(sampler=build_sampler(0)).ask()
        for key, entry in space.items():
            entry.suggest(trial, key)
    except (ImportError, ValueError, NotImplementedError) as error:
        raise ConfigError(f"sweep.sampler cannot choose so: {error}") from error


def _stop_if_none_can_work(study: Study, number: int) -> None:
    """Look at trial ``number``, and at the first ones.

    Raises:
        ConfigError: it has no such figure as the sweep's.
        LorakitError: the first trials have failed before a step, and all for the same reason: so
            will the others.
    """
    run = study.run_of(number)
    if run and run.is_finished and last_value(run, study.metric) is None:
        figures = sorted(
            {key for record in History(run.folder).read() for key in record} - {"step", "epoch"}
        )
        raise ConfigError(
            f"sweep.metric={study.metric}: {run.name} has no such figure; there are:"
            f" {', '.join(figures)}"
        )
    runs = [
        run
        for at in range(TRIES)
        if (run := study.run_of(at)) and run.state == "failed" and not run.last_step[0]
    ]
    errors = {run.info.get("error") for run in runs}
    if len(runs) == TRIES == study.num_ended() and len(errors) == 1:
        raise LorakitError(
            f"the first {TRIES} trials have failed alike, so the sweep ends; mend it and choose"
            " another group=NAME"
        )


def _print_end(study: Study) -> None:
    if best := study.best():
        chosen = " ".join(f"{key}={value}" for key, value in best.params.items())
        print(
            f"best: {study.folder.name}-{best.number} with {study.metric} {best.value:.4f}:"
            f" {chosen}"
        )
    if count := study.num_left():
        print(f"other workers are still at {count} trials")
