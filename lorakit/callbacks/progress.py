"""A progress bar with loss, learning rate, tokens/s and time left; silent where nobody watches."""

from __future__ import annotations

import math
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn


class StepProgress(ProgressBar):
    """Counts optimiser steps. Writes to standard error, and only where that is a terminal."""

    def __init__(self, total_steps: int | None = None) -> None:
        super().__init__()
        self._total = total_steps
        self._progress: Progress | None = None
        self._task: Any = None

    def disable(self) -> None:
        self._total = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        console = Console(stderr=True)
        if not console.is_terminal:
            return
        self._progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task("", total=self._total, completed=trainer.global_step, figures="")
        self._progress.start()

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if self._progress:
            self._progress.update(self._task, completed=trainer.global_step, figures=_figures(trainer.callback_metrics))

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def _figures(metrics: dict[str, Any]) -> str:
    shown = []
    for name, label, form in (
        ("train/loss", "loss", ".4f"),
        ("val/loss", "val", ".4f"),
        ("train/lr", "lr", ".1e"),
        ("speed/tokens_per_second", "tok/s", ",.0f"),
    ):
        value = float(metrics[name]) if name in metrics else math.nan
        if not math.isnan(value):
            shown.append(f"{label} {value:{form}}")
    return "  ".join(shown)
