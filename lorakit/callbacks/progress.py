"""A progress bar with loss, learning rate, tokens/s and time left; a line now and then where
nobody watches a terminal.
"""

from __future__ import annotations

import math
import sys
import time
from typing import Any

from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

LINE_SECONDS = 30.0  # between two lines of a log


class StepProgress(ProgressBar):
    """Counts optimiser steps, on standard error: a bar on a terminal, elsewhere a line every
    ``LINE_SECONDS``.
    """

    def __init__(self, total_steps: int | None = None) -> None:
        super().__init__()
        self._total = total_steps
        self._progress: Progress | None = None
        self._task: Any = None
        self._is_shown = True
        self._began = self._last_line = 0.0
        self._first_step = 0

    def disable(self) -> None:
        self._is_shown = False

    def enable(self) -> None:
        self._is_shown = True

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self._began = self._last_line = time.monotonic()
        self._first_step = trainer.global_step
        console = Console(stderr=True)
        if not (self._is_shown and console.is_terminal):
            return
        self._progress = Progress(
            BarColumn(bar_width=10),
            MofNCompleteColumn(),
            TextColumn("{task.fields[figures]}"),
            TimeRemainingColumn(compact=True),
            TextColumn("left"),
            console=console,
        )
        self._task = self._progress.add_task(
            "", total=self._total, completed=trainer.global_step, figures=""
        )
        self._progress.start()

    def on_train_batch_end(
        self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._progress:
            figures = _figures(trainer.callback_metrics)
            self._progress.update(self._task, completed=trainer.global_step, figures=figures)
        elif trainer.global_step > self._first_step and self._is_due():
            # figures are read from the device
            self._write(trainer, f"{_figures(trainer.callback_metrics)}{self._left(trainer)}")

    def on_validation_start(self, trainer: Any, pl_module: Any) -> None:
        if self._progress:
            figures = f"{_figures(trainer.callback_metrics)}  evaluating …"
            self._progress.update(self._task, figures=figures)
        elif self._began and self._is_due():
            self._write(trainer, "evaluating …")

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        self._close()

    def _is_due(self) -> bool:
        return self._is_shown and time.monotonic() - self._last_line >= LINE_SECONDS

    def _write(self, trainer: Any, text: str) -> None:
        self._last_line = time.monotonic()
        total = f"/{self._total:,}" if self._total else ""
        print(f"step {trainer.global_step:,}{total}  {text}", file=sys.stderr, flush=True)

    def _left(self, trainer: Any) -> str:
        """The time of the remaining steps at the pace so far, evaluations included."""
        if not self._total:
            return ""
        each = (time.monotonic() - self._began) / (trainer.global_step - self._first_step)
        minutes, seconds = divmod(round(each * (self._total - trainer.global_step)), 60)
        return f"  {minutes // 60}:{minutes % 60:02}:{seconds:02} left"

    def _close(self) -> None:
        if self._progress:
            self._progress.stop()
            self._progress = None


def _figures(metrics: dict[str, Any]) -> str:
    shown = []
    for name, label, form in (
        ("train/loss", "loss", ".4f"),
        ("val/loss", "held out", ".4f"),
        ("train/lr", "lr", ".1e"),
        ("speed/tokens_per_second", "tokens/s", ",.0f"),
    ):
        value = float(metrics[name]) if name in metrics else math.nan
        if not math.isnan(value):
            shown.append(f"{label} {value:{form}}")
    return "  ".join(shown)
