"""Every step's figures in the run folder, and the loss curve as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lorakit.extras import find_problem, is_installed, require
from lorakit.runs.files import write_whole
from lorakit.runs.folder import History


class RunHistory(L.Callback):
    """Appends each step's metrics to ``history.jsonl`` and draws ``loss.png`` from it at the end,
    where matplotlib is installed.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.history = History(self.folder)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.is_global_zero:
            self.history.cut_behind(trainer.global_step)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if not trainer.fit_loop._should_accumulate():
            epoch = batch.cursor.epoch if batch.cursor else 0
            # callback_metrics keep what earlier steps logged; a window that was skipped has no loss
            # of its own.
            stale = ("train/loss", "train/grad_norm") if batch.window_weight == 0 else ()
            self._append(trainer, {"epoch": epoch}, prefix_out=("val/", *stale))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking and trainer.state.fn == "fit":
            self._append(trainer, {}, prefix_in="val/")

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.is_global_zero and is_installed("matplotlib"):
            draw_losses(self.history.read(), self.folder / "loss.png")

    def _append(
        self,
        trainer: L.Trainer,
        record: dict[str, Any],
        *,
        prefix_in: str = "",
        prefix_out: tuple[str, ...] = (),
    ) -> None:
        metrics = {
            name: float(value)
            for name, value in trainer.callback_metrics.items()
            if name.startswith(prefix_in)
            and not name.startswith(prefix_out)
            and not _is_absent(name, float(value))
        }
        if not metrics or not trainer.is_global_zero:
            return
        append_or_warn(self.history, {"step": trainer.global_step, **record, **metrics})


def append_or_warn(history: History, record: dict[str, Any]) -> None:
    """Add a line; a disk that is full ends no run."""
    try:
        history.append(record)
    except OSError as error:
        rank_zero_warn(
            f"{history.path}: step {record['step']} could not be written: {error.strerror}"
        )


def _is_absent(name: str, value: float) -> bool:
    """Whether it is the loss of a source of data of which this step had nothing."""
    return name.count("/") == 2 and math.isnan(value)


def describe_curve(folder: Path) -> str:
    """Where the loss curve of the run in ``folder`` is, or what to install for the next run's."""
    return find_problem("matplotlib", "loss.png") or f"loss curve {folder / 'loss.png'}"


def draw_losses(records: list[dict[str, Any]], path: Path) -> None:
    """Draw training and evaluation loss over the steps into ``path``, a PNG. Raises ConfigError
    where matplotlib is missing.
    """
    require("matplotlib")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, label, style in (
        ("train/loss", "training", "-"),
        ("val/loss", "held out", "o-"),
        ("retain/loss", "unrelated text", "s:"),
    ):
        points = [(record["step"], record[name]) for record in records if name in record]
        if points:
            axes.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=4)
    values = [record["train/loss"] for record in records if record.get("train/loss", 0) > 0]
    if values and max(values) / min(values) > 20:
        axes.set_yscale("log")
    axes.set(xlabel="optimiser step", ylabel="loss per trained token (nats)")
    axes.set_title(path.parent.name)
    axes.grid(alpha=0.3, which="both")
    if axes.lines:
        axes.legend(frameon=False)
    write_whole(path, lambda aside: figure.savefig(aside, format="png"))
