"""Overrides to a resolved config: Hydra, with verbatim paths and misspelt keys explained."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.guard import explain
from lorakit.cli.hydra_errors import explain_override, first_lines
from lorakit.cli.overrides import OVERRIDE, quote_path, value_of_flag
from lorakit.config.aliases import explain_other_name
from lorakit.config.paths import conf_dir
from lorakit.errors import ConfigError, LorakitError
from lorakit.quoting import quote_for_hydra

if TYPE_CHECKING:
    pass

_STANDALONE = ("experiment", "data.path", "data.sources", "model.path")
_FLAGS_WITH_VALUE = (
    *("--config-dir", "-cd", "--config-name", "-cn", "--config-path", "-cp"),
    *("--package", "-p", "--info", "-i", "--cfg", "-c"),
)
_FLAGS = (
    *_FLAGS_WITH_VALUE,
    "--multirun",
    "-m",
    "--resolve",
    "--hydra-help",
    "--help",
    "-h",
    "--version",
)


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Return Hydra's arguments: flags first, paths quoted, and the pig latin experiment where
    nothing else is asked for.

    Raises:
        ConfigError: an argument is neither a setting nor a flag.
    """
    flags: list[str] = []
    overrides: list[str] = []
    position = 0
    while position < len(arguments):
        argument = arguments[position]
        _check_argument(argument)
        takes_value = argument in _FLAGS_WITH_VALUE and position + 1 < len(arguments)
        (flags if argument.startswith("-") else overrides).extend(
            arguments[position : position + 1 + takes_value]
        )
        position += 1 + takes_value
    if is_demo(overrides):
        overrides.insert(0, "experiment=pig_latin")
    return [*flags, *(quote_path(argument) for argument in overrides)]


def is_demo(arguments: Sequence[str]) -> bool:
    """Whether ``arguments`` name neither model nor rows nor an experiment."""
    keys = {match["key"] for argument in arguments if (match := OVERRIDE.match(argument))}
    return not keys & set(_STANDALONE)


def _check_argument(argument: str) -> None:
    if argument.startswith("-"):
        if argument.split("=")[0] not in _FLAGS:
            name = argument.lstrip("-").split("=")[0]
            other = explain_other_name(name) or (
                f"; it is {name}.path here" if name in ("data", "model") else None
            )
            hint = f"settings are written without dashes{other or f': {name}=…'}"
            raise ConfigError(
                f"unknown option {argument}; {hint} (options: --cfg job, --config-dir DIR, -m)"
            )
    elif "=" not in argument and not argument.startswith("~"):
        is_data = os.path.exists(os.path.expanduser(argument))
        raise ConfigError(
            f"{argument}: settings are written key=value"
            + (f"; data.path={argument}?" if is_data else "")
        )


def run_hydra(task: Callable[[Any], Any], arguments: list[str], *, config_name: str) -> Any:
    """Compose ``config_name`` under ``arguments`` and call ``task`` with the config; once per job
    under ``--multirun``.

    Raises:
        ConfigError: what Hydra refuses, with the nearest right key where one is misspelt.
    """
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra raises instead of printing and exiting
    prepared = prepare_arguments(arguments)
    jobs: list[_Job] = []
    is_sweep = bool({"-m", "--multirun"} & set(arguments))

    def guarded(config: Any) -> Any:
        jobs.append(_Job())
        try:
            return task(config)
        except Exception as error:
            # kept from Hydra, which would print it its own way; a sweep continues with its next job
            jobs[-1].take(error, is_sweep=is_sweep)
            return None

    try:
        result = _run(guarded, prepared, config_name)
    except HydraException as error:
        raise ConfigError(explain_override(str(error), config_name, arguments)) from error
    except ValueError as error:
        if str(error).startswith("Only one of"):
            raise ConfigError(
                "a sweep has a config for each of its runs: leave out -m, and give one value to"
                " each setting"
            ) from error
        if not str(error).startswith("Config group override"):
            raise
        raise ConfigError(
            "a config group cannot be null; leave it out, or name one of its files"
            " (conf/GROUP/NAME.yaml)"
        ) from error
    except OmegaConfBaseException as error:
        raise ConfigError(first_lines(str(error))) from error
    _raise_failures(jobs)
    return result


def _run(task: Callable[[Any], Any], prepared: list[str], config_name: str) -> Any:
    """Let Hydra call ``task``; a single run's config is composed once.

    ``hydra.main`` composes a first time to learn whether this is a sweep, and again to run.
    """
    import hydra
    from hydra import initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    GlobalHydra.instance().clear()  # of an earlier call in this process
    if (overrides := _overrides_of_single_run(prepared)) is not None:
        with initialize_config_dir(str(conf_dir()), job_name="lorakit", version_base="1.3"):
            composer: Any = GlobalHydra.instance().hydra
            config = composer.compose_config(config_name, overrides, run_mode=RunMode.RUN)
            if config.hydra.mode is not RunMode.MULTIRUN:  # as a config of the user's may say
                composer.compose_config = lambda *_, **__: config  # ``run`` would compose again
                return composer.run(config_name, task, overrides).return_value
    sys.argv = [sys.argv[0], *prepared]  # where ``hydra.main`` looks for them
    path = str(conf_dir())
    return hydra.main(version_base="1.3", config_path=path, config_name=config_name)(task)()


def _overrides_of_single_run(prepared: list[str]) -> list[str] | None:
    """The overrides of what is no sweep, ``--config-dir`` among them; None where Hydra's own
    command line has to read ``prepared``.
    """
    config_dir = value_of_flag(prepared, "--config-dir", "-cd")
    overrides = prepared[(0 if config_dir is None else 2 - ("=" in prepared[0])) :]
    if any(re.match(r"-|[+~]*hydra\.(mode|searchpath)\b", text) for text in overrides):
        return None
    if config_dir is None:
        return overrides
    if not os.path.isdir(config_dir):
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    folder = quote_for_hydra(f"file://{os.path.abspath(config_dir)}")
    return [f"hydra.searchpath=[{folder}]", *overrides]


class _Job:
    """A job of a sweep, or the only one: what was typed for it, and what it raised."""

    def __init__(self) -> None:
        from hydra.core.hydra_config import HydraConfig
        from omegaconf import OmegaConf

        self.overrides = typed_overrides()
        job = HydraConfig.get().job
        self.number = 0 if OmegaConf.is_missing(job, "num") else job.num
        self.message: str | None = None  # of what it raised
        self.error: Exception | None = None  # itself, where there is one job only

    def take(self, error: Exception, *, is_sweep: bool) -> None:
        """Remember that the job failed; in a sweep say so at once, and let go of the model that
        the traceback holds.
        """
        self.message = explain(error) or f"{type(error).__name__}: {error}"
        if not is_sweep:
            self.error = error
            return
        if explain(error) is None:  # a defect
            traceback.print_exception(error)
        print(f"job {self.number} failed: {self.message}", file=sys.stderr, flush=True)
        found: BaseException | None = error
        while found is not None:
            traceback.clear_frames(found.__traceback__)
            found.__traceback__, found = None, found.__cause__ or found.__context__


def typed_overrides() -> list[str]:
    """What was typed for this job, interpolations as they were written."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    overrides: Any = OmegaConf.to_container(HydraConfig.get().overrides.task, resolve=False)
    return list(overrides)


def _raise_failures(jobs: list[_Job]) -> None:
    """Raise what the only job raised, or one message for all jobs of a sweep."""
    if error := next((job.error for job in jobs if job.error), None):
        raise error
    if failed := [job for job in jobs if job.message]:
        shared = set.intersection(*(set(job.overrides) for job in jobs))
        lines = []
        for job in failed:
            swept = " ".join(text for text in job.overrides if text not in shared)
            lines.append(f"  job {job.number}{f' ({swept})' if swept else ''}: {job.message}")
        rest = len(jobs) - len(failed)
        title = (
            f"{len(failed)} of {len(jobs)} jobs"
            f" failed{f'; the other {rest} finished' if rest else ''}:"
        )
        raise LorakitError("\n".join([title, *lines]))
