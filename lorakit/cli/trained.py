"""A run's trained model, for the commands that use it. What a run folder holds is read as plain
data, never instantiated.
"""

from __future__ import annotations

import argparse
import difflib
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import CheckpointError
from lorakit.weights.files import find_write_problem
from lorakit.weights.run import Run, find_run


@dataclass(frozen=True)
class Trained:
    """A run, its config as plain values, and which adapter of it to use."""

    run: Run
    config: dict[str, Any]
    adapter: Path
    trust_remote_code: bool = False

    @property
    def base(self) -> str:
        return str(self.config["model"]["path"])

    @property
    def model_options(self) -> dict[str, Any]:
        """What decides which model the base is."""
        return {
            "revision": self.config["model"].get("revision"),
            "trust_remote_code": self.trust_remote_code,
        }

    @property
    def step(self) -> int | None:
        """After how many optimiser steps the adapter was as it is; None where nobody wrote it
        down.
        """
        name = self.adapter.name
        return (
            int(name.removeprefix("step-"))
            if name.startswith("step-")
            else self.run.info.get("step")
        )

    @property
    def add_tokens(self) -> list[str] | None:
        """The tokens that the run added."""
        return self.config["model"].get("add_tokens")

    @property
    def model_settings(self) -> dict[str, Any]:
        """The same, with the base's name."""
        return {"path": self.base, **self.model_options}

    @property
    def pixel_bounds(self) -> tuple[int | None, int | None]:
        """Between how many pixels the run scaled its images, where it did not leave that to the
        model's processor.
        """
        return self.config["data"].get("min_pixels"), self.config["data"].get("max_pixels")

    @property
    def chat_template(self) -> str | None:
        """The template that the run brought, None where it took the tokenizer's own."""
        return str(self.run.chat_template) if self.run.chat_template.is_file() else None

    def load_tokenizer(self) -> Any:
        """The base's tokenizer, with the run's chat template."""
        from lorakit.data.templates import use_template
        from lorakit.model.load import load_tokenizer

        tokenizer = load_tokenizer(self.base, add_tokens=self.add_tokens, **self.model_options)
        if self.chat_template:
            use_template(tokenizer, self.chat_template)
        return tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer to ``folder`` where it is not the base's as it stands."""
        if self.chat_template or self.add_tokens:
            self.load_tokenizer().save_pretrained(folder)

    def load_config(self) -> Any:
        """The base's transformers config."""
        from lorakit.model.load import load_config

        return load_config(self.base, **self.model_options)

    def load_skeleton(self) -> Any:
        """The base on the meta device: every shape, no weight."""
        from lorakit.model.load import load_skeleton

        return load_skeleton(self.base, add_tokens=self.add_tokens, **self.model_options)

    def load_base(self, dtype: str, *, device: str | None = None, attention: str = "auto") -> Any:
        """The base, frozen."""
        from lorakit.model.load import load_model

        return load_model(
            self.base,
            dtype=dtype,
            attention=attention,
            device=device,
            add_tokens=self.add_tokens,
            **self.model_options,
        )

    def load(self, *, with_adapter: bool = True) -> tuple[Any, Any]:
        """Return (model, tokenizer): float32 on CPU, bf16 on GPU."""
        import torch

        from lorakit.weights.merge import attach

        on_gpu = torch.cuda.is_available()
        dtype = "bfloat16" if on_gpu else "float32"
        tokenizer = self.load_tokenizer()
        model = self.load_base(
            dtype,
            device="cuda" if on_gpu else None,
            attention=self.config["model"].get("attention", "auto"),
        )
        return (attach(model, self.adapter) if with_adapter else model), tokenizer


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
    trained = Trained(run, config, _choose(run, options.checkpoint), options.trust_remote_code)
    if not run.is_finished:
        made, planned = run.last_step[0], run.info.get("total_steps", "?")
        print(
            f"{run.name} is {run.state} after {made} of {planned} steps: taking"
            f" {trained.adapter.name}",
            file=sys.stderr,
        )
    return trained


def parse(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> argparse.Namespace:
    """What ``arguments`` say, in which an option may stand as settings do elsewhere:
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
    """An argument that names what will be written. Refused at once where that cannot be, not
    after the work.
    """
    path = Path(text).expanduser()
    if problem := find_write_problem(path):
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {problem}")
    return path


def _choose(run: Run, wanted: str | None) -> Path:
    # torch: 2 s
    from lorakit.weights.checkpoint import Checkpoint, best, list_checkpoints, newest_whole

    checkpoints = list_checkpoints(run.checkpoints)
    chosen: Checkpoint | None
    if wanted is None and run.adapter.is_dir():
        # The checkpoint of the last step holds the same adapter in float32.
        last = (
            checkpoints[-1]
            if checkpoints and checkpoints[-1].step == run.info.get("step")
            else None
        )
        return last.folder if last and last.find_damage() is None else run.adapter
    if wanted in (None, "last"):
        chosen = newest_whole(run.checkpoints, lambda text: print(text, file=sys.stderr))
    elif wanted == "best":
        chosen = best(run.checkpoints)
    else:
        chosen = next(
            (
                c
                for c in checkpoints
                if str(c.step) == str(wanted).removeprefix("step-").lstrip("0")
            ),
            None,
        )
    if chosen is None:
        there = ", ".join(str(c.step) for c in checkpoints) or "none"
        raise CheckpointError(
            f"{run.folder} has no checkpoint {wanted or 'last'!r} (there are steps: {there})"
        )
    return chosen.folder
