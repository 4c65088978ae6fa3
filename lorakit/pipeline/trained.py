"""A run's trained model, for the commands that use it. What a run folder holds is read as plain
data, never instantiated.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorakit.errors import CheckpointError
from lorakit.runs.folder import Run


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
        from lorakit.data.render.templates import use_template
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


def choose_adapter(run: Run, wanted: str | None) -> Path:
    # torch: 2 s
    from lorakit.runs.checkpoint import Checkpoint, best, list_checkpoints, newest_whole

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
