"""A sweep's trials: each is chosen by Optuna from those before it, and is a run of its own."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lorakit.config.instantiate import import_target, instantiate
from lorakit.errors import ConfigError, LorakitError
from lorakit.pipeline.resume import FREE_KEYS
from lorakit.runs.folder import History, flatten
from lorakit.sweep.space import Space
from lorakit.sweep.study import Study, Trial, last_value, open_study, seed_of

TRIES = 3  # that may fail alike at the start of a sweep


def run_trials(
    plain: dict[str, Any], space: Space, folder: Path, launch: Callable[[Trial, list[str]], Any]
) -> None:
    """Run the trials of the sweep in ``folder`` until there are enough.

    Args:
        plain: the config without what is chosen.
        launch: runs a trial, given what was chosen for it as overrides.

    Raises:
        LorakitError: the sweep cannot be run, or none of its trials can work.
    """
    _refuse_elsewhere(plain)
    study = _open(plain, space, folder)
    try:
        _run_all(study, space, launch)
    except (KeyboardInterrupt, SystemExit):
        print(
            f"to continue the sweep, add group={study.folder.name} resume=true to the same command",
            flush=True,
        )
        raise
    _print_end(study)


def _run_all(study: Study, space: Space, launch: Callable[[Trial, list[str]], Any]) -> None:
    total = study.num_trials
    while (trial := study.next_trial()) is not None:
        chosen = [f"{key}={entry.suggest(trial.trial, key)}" for key, entry in space.items()]
        begun = " continues" if trial.is_resumed else ""
        print(f"trial {trial.number} of {total}{begun}: {' '.join(chosen)}", flush=True)
        # a worker died between its end and its entry
        if not ((run := study.run_of(trial.number)) and run.is_finished):
            launch(trial, chosen)
        said, best = study.close_trial(trial), study.best()
        best_yet = f"; best: trial {best.number}, {best.value:.4f}" if best else ""
        print(f"trial {trial.number} of {total}: {said}{best_yet}", flush=True)
        _stop_if_none_can_work(study, trial.number)


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
    """Raise ConfigError where the sampler cannot choose from ``space``."""
    import optuna

    try:
        trial = optuna.create_study(sampler=build_sampler(0)).ask()
        for key, entry in space.items():
            entry.suggest(trial, key)
    # a library that this sampler needs is missing, a setting is wrong, or it cannot choose from
    # such a space: Optuna's samplers say it by one of these
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
            f"the first {TRIES} trials have failed alike, so the sweep ends; fix the cause and"
            " choose another group=NAME"
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
