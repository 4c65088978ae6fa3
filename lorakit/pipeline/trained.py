"""A run's trained model, for the commands that use it. What a run folder holds is read as plain
data, never instantiated.
"""

from __future__ import annotations

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.errors import CheckpointError
from lorakit.runs.folder import Run

if TYPE_CHECKING:
    from lorakit.data.datamodule import LoRADataModule
    from lorakit.model.spec import ModelSpec


@dataclass(frozen=True)
class Trained:
    """A run, its config as plain values, and which adapter of it to use."""

    run: Run
    config: dict[str, Any]
    adapter: Path
    trust_remote_code: bool = False

    @property
    def model(self) -> ModelSpec:
        """The base, as the run had it."""
        from lorakit.model.spec import ModelSpec

        settings = self.config["model"]
        return ModelSpec(
            str(settings["path"]),
            revision=settings.get("revision"),
            attention=settings.get("attention", "auto"),
            trust_remote_code=self.trust_remote_code,
            add_tokens=settings.get("add_tokens"),
        )

    @property
    def step(self) -> int | None:
        """The adapter's optimiser step; None where nobody wrote it down."""
        name = self.adapter.name
        if name.startswith("step-"):
            return int(name.removeprefix("step-"))
        return self.run.info.get("step")

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

    def open_rows(self, **changes: Any) -> LoRADataModule:
        """The run's DataModule with some keys of ``data`` changed, nothing read yet."""
        from lorakit.config.settings import Component

        keywords = {**self.config["data"], "chat_template": self.chat_template, **changes}
        target = keywords.pop("_target_")
        if keywords.get("tokens_per_batch") == "auto":
            keywords["tokens_per_batch"] = None
        made: LoRADataModule = Component(target, keywords).build("data")
        return made

    def load_tokenizer(self) -> Any:
        """The base's tokenizer, with the run's chat template."""
        from lorakit.data.render.templates import use_template

        tokenizer = self.model.load_tokenizer()
        if self.chat_template:
            use_template(tokenizer, self.chat_template)
        return tokenizer

    def save_tokenizer(self, folder: Path) -> None:
        """Write the tokenizer to ``folder`` where it differs from the base's."""
        if self.chat_template or self.model.add_tokens:
            self.load_tokenizer().save_pretrained(folder)

    def load_base(self, dtype: str) -> Any:
        """The base, frozen, on the CPU, whatever attention the run had."""
        return dataclasses.replace(self.model, attention="auto").load(dtype)

    def load(self, *, with_adapter: bool = True) -> tuple[Any, Any]:
        """Return (model, tokenizer): float32 on CPU, bf16 on GPU."""
        import torch

        from lorakit.weights.merge import attach

        device, dtype = ("cuda", "bfloat16") if torch.cuda.is_available() else (None, "float32")
        tokenizer, model = self.load_tokenizer(), self.model.load(dtype, device=device)
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
