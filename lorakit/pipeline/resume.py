"""Which run folder a training writes to: a new one, or one to continue."""

from __future__ import annotations

import copy
import glob
import re
import shlex
from pathlib import Path
from typing import Any

import yaml

from lorakit.config.schema import RunConfig
from lorakit.errors import CheckpointError, ConfigError, report
from lorakit.launch.slurm import FOLDER as JOBS_FOLDER
from lorakit.model.load import BUNDLED
from lorakit.runs.folder import (
    RUN_FOLDER,
    History,
    Run,
    check_name_is_free,
    create_run,
    describe_environment,
    flatten,
    free_name,
    list_runs,
    open_run,
)

# What may differ between a run and its continuation without changing what is computed.
FREE_KEYS = (
    *(
        "run",
        "resume",
        "group",
        "plan.",
        "sweep",
        "paths.",
        "logger.",
        "checkpoint.",
        "callbacks.",
        "data.on_error",
    ),
    "eval.",
    *(
        "strategy.",
        "launch.",
        "trainer.devices",
        "trainer.accumulate_grad_batches",
    ),  # whose product with the processes must stay
)


# Keys that 0.1.0 did not have, each with the value that means what earlier versions did. A run that
# was made before a key existed continues under that value alone.
ADDED_KEYS: dict[str, Any] = {}


def find_run_to_resume(config: RunConfig, experiment: str) -> Run | None:
    """Return the run that continues, or None for a new one; called before anything is read, too.

    Raises:
        ConfigError: ``run`` or ``resume`` cannot be used.
        CheckpointError: the run to continue is missing or finished, or the name of a new one is
            taken.
    """
    config.check_resume()
    resume, name, root = config.resume, config.run, config.runs_folder
    if name is not None and (
        "/" in str(name)
        or "=" in str(name)
        or str(name).startswith(".")
        or not str(name).isprintable()
    ):
        raise ConfigError(
            f"run={name!r}: a run's name holds no /, no = and no line break, and does not begin"
            " with a dot"
        )
    if resume:
        run = _find_unfinished(root, name, experiment)
        if run is None and resume is True:
            what = f"run {name!r}" if name else f"unfinished run of experiment {experiment}"
            raise CheckpointError(
                f"resume=true, but there is no {what} in"
                f" {root.resolve()}{_others_to_continue(root)}"
            )
        return run
    if name is not None:
        check_name_is_free(root, str(name))
    return None


def choose_run(
    config: RunConfig,
    *,
    experiment: str,
    data_fingerprint: str,
    resolved: dict[str, Any],
    **facts: Any,
) -> tuple[Run, bool]:
    """Return the run and whether it continues.

    Args:
        resolved: what the settings that say ``auto`` came to on this machine.
        facts: what else ``run.json`` shall hold.

    Raises:
        CheckpointError: as ``find_run_to_resume``, or the run was made from another config or other
            data.
    """
    run = find_run_to_resume(config, experiment)
    if run is not None:
        _check_same(run, config.to_dict(), data_fingerprint, resolved)
        return run, True
    settings, root = _with_absolute_paths(config.to_dict()), config.runs_folder
    info = {
        "experiment": experiment,
        "base": settings["model"]["path"],
        "data_fingerprint": data_fingerprint,
        **facts,
    }
    info["resolved"] = resolved
    chosen = str(config.run) if config.run else free_name(root, experiment)
    return (
        create_run(
            root,
            chosen,
            config_text=config_text(settings, root / chosen),
            info={**info, **describe_environment()},
        ),
        False,
    )


def config_text(config: dict[str, Any], folder: Path) -> str:
    """The config file of the run in ``folder``: it means the same from any folder."""
    settings = fill_run_folder(_with_absolute_paths(config), folder)
    text: str = yaml.safe_dump(settings, sort_keys=False, allow_unicode=True)
    return text


def _with_absolute_paths(config: dict[str, Any]) -> dict[str, Any]:
    """The config with absolute names of files and folders: it means the same anywhere."""
    config = copy.deepcopy(config)
    places: list[tuple[Any, Any]] = [
        *((config["model"], key) for key in ("path",)),
        *((config["data"], key) for key in ("path", "val_path", "chat_template")),
        (config["lora"], "init_from"),
        (config.get("eval") or {}, "retain_path"),
    ]
    sources = config["data"].get("sources") or []
    places += [
        (entry, "path") if isinstance(entry, dict) else (sources, number)
        for number, entry in enumerate(sources)
    ]
    for node, key in places:
        value = node.get(key) if isinstance(node, dict) else node[key]
        if (
            isinstance(value, str)
            and value not in BUNDLED
            and (Path(value).expanduser().exists() or glob.glob(value))
        ):
            node[key] = str(Path(value).expanduser().absolute())
    return config


def fill_run_folder(node: Any, folder: Path) -> Any:
    """Return the plain config ``node`` with ``${paths.run}`` filled in, wherever it was used."""
    if isinstance(node, dict):
        return {key: fill_run_folder(value, folder) for key, value in node.items()}
    if isinstance(node, list):
        return [fill_run_folder(value, folder) for value in node]
    return node.replace(RUN_FOLDER, str(folder)) if isinstance(node, str) else node


def command_to_continue(run: Run) -> str:
    """The line that continues ``run``: its own command, naming it; that of the whole
    sweep where it is of one.
    """
    typed = shlex.split(run.info.get("command") or "lorakit train …")
    kept = [word for word in typed if not re.match(r"\+{0,2}resume=", word)]
    script = run.folder.parent / JOBS_FOLDER / f"{run.name}.sh"
    # its config says already that it continues
    if {"launch=slurm", "slurm"} & set(kept) and script.is_file():
        return shlex.join(["sbatch", str(script)])
    settings = kept[kept.index("train") + 1 :] if "train" in kept else []
    if {"-m", "--multirun"} & set(settings) or any(word.startswith("sweep=") for word in settings):
        is_named = any(re.match(r"\+{0,2}(run|group)=", word) for word in kept)
        more = (
            ["resume=auto"] if is_named else [f"group={run.name.rpartition('-')[0]}", "resume=auto"]
        )
    else:
        kept = [word for word in kept if not re.match(r"\+{0,2}run=", word)]
        more = [f"run={run.name}", "resume=true"]
    return shlex.join([*kept, *more]).replace("'…'", "…")


def _others_to_continue(root: Path) -> str:
    """What could be continued instead, or that a new run can be started."""
    unfinished = [
        run for run in list_runs(root) if not run.is_finished and "data_fingerprint" in run.info
    ]
    lines = [
        f"  {run.name} ({state}): {command_to_continue(run)}"
        for run in unfinished
        if (state := run.state) != "running"
    ]
    return "; resume=auto would start one" + (
        "; these could be continued:\n" + "\n".join(lines[-3:]) if lines else ""
    )


def _find_unfinished(root: Path, name: str | None, experiment: str) -> Run | None:
    if name:
        if not (root / str(name)).is_dir():
            return None
        run = open_run(root / str(name))
        if "data_fingerprint" not in run.info:  # it failed before it knew its rows
            return None
        if run.is_finished:
            raise CheckpointError(
                f"{run.folder} is finished, so there is nothing to resume; choose another run=NAME"
            )
        return run
    unfinished = [
        run
        for run in list_runs(root)
        if not run.is_finished and run.info.get("experiment") == experiment
    ]
    trained = [
        run for run in unfinished if History(run.folder).path.exists()
    ]  # what never made a step has nothing to continue from
    return next(reversed(trained or unfinished), None)


def find_changes(run: Run, config: dict[str, Any]) -> list[str]:
    """The settings in which ``config`` would not continue ``run``, each with its values."""
    then = flatten(yaml.safe_load(run.config_text()))
    now = flatten(fill_run_folder(_with_absolute_paths(config), run.folder))
    then = {**{key: value for key, value in ADDED_KEYS.items() if key in now}, **then}
    return [
        f"{key}: {then.get(key, 'not set')!r} then, {now.get(key, 'not set')!r} now"
        for key in sorted(then.keys() | now.keys())
        if then.get(key) != now.get(key) and not key.startswith(FREE_KEYS)
    ]


def _check_same(
    run: Run, config: dict[str, Any], data_fingerprint: str, resolved: dict[str, Any]
) -> None:
    changed = find_changes(run, config)
    problems = [*changed]
    problems += [
        f"{key}: auto was {value} then, and is {resolved[key]} on this machine; set it"
        for key, value in run.info.get("resolved", {}).items()
        if key in resolved
        and resolved[key] != value
        and not any(problem.startswith(f"{key}:") for problem in problems)
    ]
    if not problems and run.info.get("data_fingerprint") != data_fingerprint:
        problems.append(
            f"data: the rows of {config['data']['path']} are not those that the run began with"
        )
    if problems:
        as_then = (
            f"Continue it with: {command_to_continue(run)}"
            if problems == changed
            else "Set these as they were."
        )
        remedy = f"{as_then}\nOr start a new run with another run=NAME."
        raise CheckpointError(
            report(f"{run.folder} cannot be continued with this config:", problems, remedy=remedy)
        )
