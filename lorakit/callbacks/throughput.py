"""How fast training is, and what it uses."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import psutil
import torch

from lorakit.types import Batch


class Throughput(L.Callback):
    """Logs tokens/s, trained tokens/s, padding share and memory.

    What counts as time is making batches and stepping on them; not evaluation, samples, checkpoints and other callbacks.
    """

    def __init__(self) -> None:
        self.seconds = 0.0
        self.num_tokens = self.num_trained_tokens = self.num_positions = 0
        self._window = (0.0, 0, 0, 0)
        self._started = self._making_batches = 0.0

    @property
    def tokens_per_second(self) -> float:
        """Over the whole fit."""
        return self.num_tokens / max(self.seconds, 1e-9)

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int) -> None:
        self._started = time.perf_counter()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int) -> None:
        making_batches = getattr(trainer.train_dataloader, "seconds", 0.0)
        self.seconds += time.perf_counter() - self._started + making_batches - self._making_batches
        self._making_batches = making_batches
        self.num_tokens += batch.num_tokens
        self.num_trained_tokens += batch.num_trained_tokens
        self.num_positions += batch.input_ids.numel()
        if not trainer.fit_loop._should_accumulate():
            self._log(pl_module)

    def _log(self, pl_module: L.LightningModule) -> None:
        totals = (self.seconds, self.num_tokens, self.num_trained_tokens, self.num_positions)
        seconds, tokens, trained, positions = (now - then for now, then in zip(totals, self._window, strict=True))
        if seconds < 0.5 and self._window != (0.0, 0, 0, 0):
            return  # too short to say anything; the next log covers it
        self._window = totals
        pl_module.log("speed/tokens_per_second", tokens / max(seconds, 1e-9), prog_bar=True)
        pl_module.log("speed/trained_tokens_per_second", trained / max(seconds, 1e-9))
        pl_module.log("data/padding_share", 1 - tokens / max(positions, 1))
        pl_module.log("memory/gigabytes", memory_gigabytes())


def memory_gigabytes() -> float:
    """The GPU's peak allocation where there is one, else this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
