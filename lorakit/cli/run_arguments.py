"""Arguments that name a run and an adapter of it, for the commands that use a trained model."""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml

from lorakit.pipeline.trained import Trained, choose_adapter
from lorakit.runs.files import find_write_problem
from lorakit.runs.folder import find_run

_AS_IN_TRAINING = {"data.path": "data", "paths.runs": "runs", "data.columns": "columns"}


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a run and an adapter of it."""
    parser.add_argument("run", nargs="?", help="name or folder of a run; default: the last one")
    parser.add_argument(
        "--checkpoint", help="last, best, or a step; default: what the run ended with"
    )
    parser.add_argument(
        "--runs", default="runs", help="folder of the runs (default: runs, in the current folder)"
    )
    parser.add_argument(
        "--trust-remote-code", action="store_true", help="run code that comes with the base model"
    )


def open_trained(options: argparse.Namespace) -> Trained:
    """Find the run and the adapter in it that ``options`` name; see ``add_run_arguments``."""
    run = find_run(Path(options.runs).expanduser(), options.run)
    config = yaml.safe_load(run.config_text())
    trained = Trained(
        run, config, choose_adapter(run, options.checkpoint), options.trust_remote_code
    )
    if not run.is_finished:
        made, planned = run.last_step[0], run.info.get("total_steps", "?")
        print(
            f"{run.name} is {run.state} after {made} of {planned} steps: taking"
            f" {trained.adapter.name}",
            file=sys.stderr,
        )
    return trained


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What ``arguments`` say, in which an option may be written as settings are:
    ``format=vllm`` for ``--format vllm``.

    ``run=NAME`` is the run, and what training calls data.path and paths.runs is understood.
    """
    parser.epilog = "An option may be written as settings are: NAME=VALUE in place of --NAME VALUE."
    options = {
        name: action
        for action in parser._actions
        for name in action.option_strings
        if name.startswith("--")
    }
    found: list[str] = []
    before: argparse.Action | None = None  # an option whose value comes next
    for text in arguments:
        key, separator, value = text.partition("=")
        name = f"--{_AS_IN_TRAINING.get(key, key).replace('_', '-')}"
        takes_many = before is not None and before.nargs == "+"
        if text.startswith("-"):
            found.append(text)
            matching = (
                [options[long] for long in options if long == text or long.startswith(text)]
                if text.startswith("--")
                else []
            )
            before = matching[0] if matching and matching[0].nargs != 0 else None
        elif (
            not separator
            or "/" in key
            or (before is not None and not (takes_many and name in options))
        ):
            found.append(text)
            before = before if takes_many else None
        elif key == "run":
            found.append(value)
        elif name not in options:
            near = difflib.get_close_matches(name, options, n=1)
            said = (
                f"; did you mean {near[0].removeprefix('--')}=…?"
                if near
                else f"; {parser.prog} --help lists what there is"
            )
            parser.error(f"{text}: there is no {key} here{said}")
        elif options[name].nargs == 0:
            found += _flag(parser, options[name], text, value.lower())
            before = None
        elif options[name].nargs == "+":
            found += [name, *_pairs(value)]
            before = options[name]
        else:
            found.append(f"{name}={value}")
            before = None
    return parser.parse_args(found)


def _flag(
    parser: argparse.ArgumentParser, action: argparse.Action, text: str, value: str
) -> list[str]:
    """The flag that ``NAME=true`` or ``NAME=false`` stands for: itself, its opposite, or none
    where it is off by itself.
    """
    opposite = [
        one
        for one in parser._actions
        if one.dest == action.dest and one is not action and one.nargs == 0
    ]
    if value == "true":
        return [action.option_strings[0]]
    if value == "false" and opposite:
        return [opposite[0].option_strings[0]]
    if value != "false":
        parser.error(f"{text}: write true or false")
    return []


def _pairs(text: str) -> list[str]:
    """``{ours: theirs}``, as data.columns is written, as OURS=THEIRS; anything else as it is."""
    if not text.startswith("{"):
        return [text]
    return [f"{ours}={theirs}" for ours, theirs in yaml.safe_load(text).items()]


def output_path(text: str) -> Path:
    """An argument that names what will be written; refused before the work if it cannot be."""
    path = Path(text).expanduser()
    if problem := find_write_problem(path):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {problem}")
    return path
