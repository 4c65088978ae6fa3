"""How fast training is, and what it uses."""

from __future__ import annotations

import time
from typing import Any

import lightning as L
import psutil
import torch
import torch.distributed as dist

from lorakit.types import Batch


class Throughput(L.Callback):
    """Logs tokens/s and trained tokens/s of all processes, padding share, and the memory of the one
    that uses most.

    What counts as time is making batches and stepping on them; not evaluation, samples, checkpoints
    and other callbacks, whose time is counted apart.
    """

    def __init__(self) -> None:
        # the latter with samples, and with checkpoints that follow an evaluation
        self.seconds = self.evaluation_seconds = 0.0
        self.num_evaluations = 0
        self.num_tokens = self.num_trained_tokens = self.num_positions = 0
        self.all_seconds = self.all_tokens = 0.0  # of all processes, as of the last step
        self.began = time.time()  # when the run did, as far as is known here
        self.first_step_seconds: float | None = None  # from then to the end of the first step
        self._window: tuple[float, ...] = (0.0, 0, 0, 0)
        self._started = self._making_batches = 0.0
        self._evaluating_since: float | None = None

    @property
    def tokens_per_second(self) -> float:
        """Over the whole fit, of all processes."""
        return self.all_tokens / max(self.all_seconds, 1e-9)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Batch, batch_idx: int
    ) -> None:
        self._started = time.perf_counter()
        making_batches = getattr(trainer.train_dataloader, "seconds", 0.0)
        self._end_evaluation(making_batches - self._making_batches)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.sanity_checking:
            self._evaluating_since = time.perf_counter()
            self.num_evaluations += 1

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._end_evaluation()

    def _end_evaluation(self, making_batches: float = 0.0) -> None:
        if self._evaluating_since is not None:
            self.evaluation_seconds += time.perf_counter() - self._evaluating_since - making_batches
            self._evaluating_since = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Batch, batch_idx: int
    ) -> None:
        making_batches = getattr(trainer.train_dataloader, "seconds", 0.0)
        self.seconds += time.perf_counter() - self._started + making_batches - self._making_batches
        self._making_batches = making_batches
        self.num_tokens += batch.num_tokens
        self.num_trained_tokens += batch.num_trained_tokens
        self.num_positions += batch.input_ids.numel()
        if not trainer.fit_loop._should_accumulate():
            if self.first_step_seconds is None:
                self.first_step_seconds = time.time() - self.began
                figures = {"speed/first_step_seconds": self.first_step_seconds}
                for logger in trainer.loggers:
                    logger.log_metrics(figures, step=trainer.global_step - 1)
            self._log(trainer, pl_module)

    def _log(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        own = torch.tensor(
            [self.seconds, self.num_tokens, self.num_trained_tokens, self.num_positions],
            dtype=torch.float64,
        )
        most = torch.tensor([memory_gigabytes()])
        if trainer.world_size > 1:
            own, most = own.to(trainer.strategy.root_device), most.to(trainer.strategy.root_device)
            dist.all_reduce(own)
            dist.all_reduce(most, op=dist.ReduceOp.MAX)
            own[0] /= trainer.world_size
        totals = tuple(own.tolist())
        self.all_seconds, self.all_tokens = totals[:2]
        seconds, tokens, trained, positions = (
            now - then for now, then in zip(totals, self._window, strict=True)
        )
        if seconds < 0.5 and self._window != (0.0, 0, 0, 0):
            return  # too short to say anything; the next log covers it
        self._window = totals
        pl_module.log("speed/tokens_per_second", tokens / max(seconds, 1e-9), prog_bar=True)
        pl_module.log("speed/trained_tokens_per_second", trained / max(seconds, 1e-9))
        pl_module.log("data/padding_share", 1 - tokens / max(positions, 1))
        pl_module.log("memory/gigabytes", float(most))


def memory_gigabytes() -> float:
    """The GPU's peak allocation where there is one, else this process's resident memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return psutil.Process().memory_info().rss / 1e9
