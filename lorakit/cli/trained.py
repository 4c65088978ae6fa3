"""A run's trained model, for the commands that use it. What a run folder holds is read as plain data, never instantiated."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import CheckpointError
from lorakit.weights.checkpoint import Checkpoint, best, list_checkpoints
from lorakit.weights.run import Run, find_run


@dataclass(frozen=True)
class Trained:
    """A run, its config as plain values, and which adapter of it to use."""

    run: Run
    config: dict[str, Any]
    adapter: Path

    @property
    def base(self) -> str:
        return str(self.config["model"]["path"])

    @property
    def model_options(self) -> dict[str, Any]:
        """What decides which model the base is."""
        settings = self.config["model"]
        return {"revision": settings.get("revision"), "trust_remote_code": bool(settings.get("trust_remote_code"))}

    def load(self, *, with_adapter: bool = True) -> tuple[Any, Any]:
        """Return (model, tokenizer): float32 on CPU, bf16 on GPU."""
        import torch

        from lorakit.model.load import load_model, load_tokenizer
        from lorakit.weights.merge import attach

        on_gpu = torch.cuda.is_available()
        dtype = "bfloat16" if on_gpu else "float32"
        tokenizer = load_tokenizer(self.base, **self.model_options)
        model = load_model(self.base, dtype=dtype, device="cuda" if on_gpu else None, **self.model_options)
        return (attach(model, self.adapter) if with_adapter else model), tokenizer


def open_trained(runs: str, wanted: str | None, checkpoint: str | None) -> Trained:
    """Find the run and the adapter in it: ``checkpoint`` is ``last``, ``best``, or a step; None takes what the run ended with."""
    run = find_run(Path(runs), wanted)
    config = yaml.safe_load(run.config_text())
    return Trained(run, config, _choose(run, checkpoint))


def _choose(run: Run, wanted: str | None) -> Path:
    checkpoints = list_checkpoints(run.checkpoints)
    if wanted is None:
        # The checkpoint of the last step holds the same adapter in float32.
        last = checkpoints[-1] if checkpoints and checkpoints[-1].step == run.info.get("step") else None
        if last is None and not run.adapter.is_dir():
            wanted = "last"
        else:
            return last.folder if last else run.adapter
    chosen: Checkpoint | None
    if wanted == "last":
        chosen = checkpoints[-1] if checkpoints else None
    elif wanted == "best":
        chosen = best(run.checkpoints)
    else:
        chosen = next((c for c in checkpoints if str(c.step) == wanted.removeprefix("step-").lstrip("0")), None)
    if chosen is None:
        there = ", ".join(str(c.step) for c in checkpoints) or "none"
        raise CheckpointError(f"{run.folder} has no checkpoint {wanted!r} (there are steps: {there})")
    return chosen.folder
