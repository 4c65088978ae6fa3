"""Command-line overrides to a resolved config: Hydra, with paths taken verbatim and misspelt
keys explained.
"""

from __future__ import annotations

import difflib
import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from lorakit.cli.conf import conf_dir
from lorakit.cli.guard import explain
from lorakit.cli.known_as import explain_other_name
from lorakit.errors import ConfigError, LorakitError

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

_OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+)?(?P<key>[\w.@/]+)=(?P<value>.*)$", re.DOTALL)
_PATH_KEYS = re.compile(
    r"(?:.*\.)?(?:path|\w+_path)|lora\.init_from|data\.chat_template|paths\.\w+|run|group"
)
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
    keys = {match["key"] for argument in arguments if (match := _OVERRIDE.match(argument))}
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


def quote_path(override: str) -> str:
    """Return ``override`` with the value of a path key quoted for Hydra's grammar: it means
    itself, whatever it holds.
    """
    if override in ("logger=null", "callbacks=null"):
        return override.replace("null", "none")  # Hydra knows no empty group, but these have one
    match = _OVERRIDE.match(override)
    if match and match["key"] == "data.stop":
        # as a shell user writes a line's end
        value = match["value"].replace("\\n", "\n").replace("\\t", "\t")
        is_list = value.startswith("[") or value == "null"
        return f"{match['prefix'] or ''}data.stop={value if is_list else _quoted(value)}"
    if not match or not _PATH_KEYS.fullmatch(match["key"]) or match["value"] in ("", "null"):
        return override
    return f"{match['prefix'] or ''}{match['key']}={_quoted(match['value'])}"


def as_typed(override: Override) -> str:
    """The override as a user types it: what ``quote_path`` has quoted, without its quotes."""
    key, value = override.get_key_element(), override.value()
    is_verbatim = _PATH_KEYS.fullmatch(key.lstrip("+")) or key == "data.stop"
    return f"{key}={value}" if is_verbatim and isinstance(value, str) else str(override.input_line)


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
            # kept from Hydra, which would print it its own way; a sweep goes on with its next job
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
        raise ConfigError(_first_lines(str(error))) from error
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
    config_dir = _value_of_flag(prepared, "--config-dir", "-cd")
    overrides = prepared[(0 if config_dir is None else 2 - ("=" in prepared[0])) :]
    if any(re.match(r"-|[+~]*hydra\.(mode|searchpath)\b", text) for text in overrides):
        return None
    if config_dir is None:
        return overrides
    if not os.path.isdir(config_dir):
        raise ConfigError(f"--config-dir {config_dir}: no such folder")
    folder = _quoted(f"file://{os.path.abspath(config_dir)}")
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


def explain_override(message: str, config_name: str, arguments: Sequence[str] = ()) -> str:
    """Return Hydra's ``message`` in a line or two, and the nearest right key in the groups that
    ``arguments`` name.
    """
    if ambiguous := re.search(r"Ambiguous value for argument '([^']+)'", message):
        key, _, values = ambiguous[1].partition("=")
        return (
            f"{ambiguous[1]}: several values make a sweep, so add -m; "
            f"as a list they are {key}=[{values}], as a text '{key}=\"{values}\"'"
        )
    match = re.search(r"Could not override '([^']+)'", message) or re.search(
        r"Could not delete from config. '([^']+)'", message
    )
    if match:
        named = [text for text in arguments if (conf_dir() / text.partition("=")[0]).is_dir()]
        own = _value_of_flag(arguments, "--config-dir", "-cd")
        if other := explain_other_name(match[1]):
            return f"unknown key {match[1]!r}{other}"
        known = [*all_keys(config_name, named, own), *all_keys(config_name)]
        return f"unknown key {match[1]!r}{suggest(match[1], known)}"
    if "Could not find" in message or "In '" in message:
        return _explain_group(message, _value_of_flag(arguments, "--config-dir", "-cd"))
    if (
        "LexerNoViableAlt" in message
        or "mismatched input" in message
        or "no viable alternative" in message
    ):
        return (
            f"{_unreadable(arguments)}{_first_lines(message)}\nQuote values with commas, spaces or"
            ' brackets: \'key="a, b"\'; within a list each for itself: \'key=["a, b", "--c"]\''
        )
    return _first_lines(message)


def _unreadable(arguments: Sequence[str]) -> str:
    """Which of ``arguments`` Hydra's grammar cannot read, in front of what it says of it."""
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    parser = OverridesParser.create()
    for argument in (quote_path(text) for text in arguments if not text.startswith("-")):
        try:
            parser.parse_override(argument)
        except HydraException:
            return f"{argument} cannot be read: "
    return ""


def _quoted(value: str) -> str:
    """Quote ``value`` so that Hydra's grammar gives it back as it is.

    In Hydra's quotes a backslash escapes only a quote (or the backslashes before one); ``${`` would
    begin an interpolation.
    """
    value = re.sub(r"(\\*)'", lambda match: match[1] * 2 + "\\'", value)
    value = re.sub(r"(\\+)$", lambda match: match[1] * 2, value)
    return "'" + value.replace("${", "\\${") + "'"


def suggest(key: str, known: list[str]) -> str:
    """Return ``; did you mean …?`` for the nearest of ``known``, or nothing where none is near."""
    if key in known:
        return ": it lies below a key that is null here, or belongs to another choice of its group"
    group, _, leaf = key.rpartition(".")
    beside = {name.rpartition(".")[2]: name for name in known if name.rpartition(".")[0] == group}
    same_depth = {name: name for name in known if name.count(".") == key.count(".")}
    anywhere = {name.rpartition(".")[2]: name for name in known}
    for names, wanted, cutoff in (
        (beside, leaf, 0.6),
        (same_depth, key, 0.8),
        (anywhere, leaf, 0.8),
    ):
        if near := difflib.get_close_matches(wanted, names, n=1, cutoff=cutoff):
            return f"; did you mean {names[near[0]]}?"
    return (
        f"; there are: {', '.join(beside)}"
        if beside and group
        else "; `lorakit train --cfg job` prints all keys"
    )


def _value_of_flag(arguments: Sequence[str], *names: str) -> str | None:
    """What stands behind a flag, or behind its =."""
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in names:
            return value or next(iter(arguments[place + 1 :]), None)
    return None


def all_keys(
    config_name: str, groups: Sequence[str] = (), config_dir: str | None = None
) -> Iterator[str]:
    """Yield every key of the config in dots; ``groups`` choose some of its files, in a folder of
    the user's too.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.global_hydra import GlobalHydra

    GlobalHydra.instance().clear()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        path = [f"hydra.searchpath=['file://{os.path.abspath(config_dir)}']"] if config_dir else []
        config = compose(config_name, overrides=[*path, "experiment=pig_latin", *groups])
    yield from _flatten(config, "")


def _flatten(config: Any, prefix: str) -> Iterator[str]:
    from omegaconf import DictConfig

    for key in config:
        yield f"{prefix}{key}"
        node = config._get_node(key)
        if isinstance(node, DictConfig) and not node._is_none():
            yield from _flatten(node, f"{prefix}{key}.")


def _explain_group(message: str, config_dir: str | None = None) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    found = next((line for line in lines if "Could not find" in line), lines[0])
    options = [line for line in lines if re.fullmatch(r"[\w/-]+", line)]
    wanted = re.search(r"Could not find '([^']+)'", found) or re.search(r"'([^']+)'", found)
    name = wanted[1].rsplit("/", 1)[-1] if wanted else ""
    if (
        config_dir
        and wanted
        and (path := os.path.join(config_dir, f"{name}.yaml"))
        and os.path.exists(path)
    ):
        group = wanted[1].rsplit("/", 1)[0]
        return (
            f"{found}; {path} is there: move it to {os.path.join(config_dir, group, name)}.yaml,"
            " into a folder with its group's name"
        )
    near = difflib.get_close_matches(name, options, n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    there = f" (there are: {', '.join(options)})" if options else ""
    return f"{found}{hint}{there}"


def _first_lines(message: str) -> str:
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    kept = [
        line
        for line in lines
        if not line.startswith(
            ("See https", "Set the environment", "object_type=", "reference_type=")
        )
    ]
    return "\n".join(kept[:3])
