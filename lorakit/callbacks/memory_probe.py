"""A micro-batch of the longest row, tried before the first step: what does not fit is known
before an hour has passed.
"""

from __future__ import annotations

import logging
import sys
from typing import Any

import lightning as L
import torch

from lorakit.callbacks.throughput import memory_gigabytes
from lorakit.errors import is_out_of_memory
from lorakit.training.oom import free_memory
from lorakit.types import Batch

log = logging.getLogger("lorakit")


class MemoryProbe(L.Callback):
    """Runs forward and backward of one batch full of the longest row. Where there is no room, the
    module takes halves from the start.

    Gradients, random numbers and optimiser are left as they were. On a CPU, where the system would
    end the process rather than refuse memory, nothing is tried, unless the process has a limit.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not pl_module.can_repeat or not refuses_memory(pl_module.device):
            return
        datamodule: Any = getattr(trainer, "datamodule", None)
        longest = datamodule.longest_batch()
        if longest is None:
            return
        batch = longest.to(pl_module.device)
        # as in a step: else nothing is dropped out, and no activation computed twice
        pl_module.model.train()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        while (tried := run_once(trainer, pl_module, batch)) is None:
            pl_module.retry.splitter.shrink(batch)
        free_memory()
        log.info(
            "tried the longest row: %d positions at a time, %.1f GB; they fit",
            tried,
            memory_gigabytes(),
        )


def run_once(trainer: L.Trainer, module: Any, batch: Batch) -> int | None:
    """Forward and backward of the largest piece that there is room for; return its positions, or
    None where the memory ended.
    """
    piece = max(module.retry.splitter.split(batch), key=lambda one: one.input_ids.numel())
    parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
    devices = [module.device] if module.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), trainer.precision_plugin.train_step_context():
            torch.autograd.grad(module.uncounted_loss(piece), parameters, allow_unused=True)
        return piece.input_ids.numel()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
    return None


def refuses_memory(device: torch.device) -> bool:
    """Whether running out of memory is an error here that can be caught."""
    if device.type != "cpu":
        return True
    if sys.platform == "win32":
        return False
    import resource

    return resource.getrlimit(resource.RLIMIT_AS)[0] != resource.RLIM_INFINITY
