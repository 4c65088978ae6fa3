"""What training makes the model forget: loss on unrelated text, of base and adapted model."""

from __future__ import annotations

import itertools
from typing import Any

import lightning as L

from lorakit.callbacks.history import append_or_warn
from lorakit.data.datamodule import LoRADataModule
from lorakit.evaluation.held_out import mean_loss
from lorakit.lora.state import adapters_off
from lorakit.runs.folder import History


class Retain(L.Callback):
    """Measures the loss on rows that are not trained, at every evaluation and at the end:
    ``retain/loss``, ``retain/base_loss``.

    Args:
        datamodule: of the rows, with a tokenizer, in batches of one row and in their order.
        num_rows: of these, at most.
    """

    def __init__(self, datamodule: LoRADataModule, num_rows: int) -> None:
        self.datamodule, self.num_rows = datamodule, num_rows
        self.base_loss = self.loss = float("nan")
        self._step = -1

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        """Measure the base itself, with the adapter switched off."""
        with adapters_off(pl_module.model):
            self.base_loss = self._measure(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._take(trainer, pl_module)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._take(trainer, pl_module)

    def _take(self, trainer: L.Trainer, pl_module: Any) -> None:
        if self._step == trainer.global_step:
            return
        self._step, self.loss = trainer.global_step, self._measure(trainer, pl_module)
        figures = {"retain/loss": self.loss, "retain/base_loss": self.base_loss}
        for logger in trainer.loggers:
            logger.log_metrics(figures, step=max(0, trainer.global_step - 1))
        if trainer.is_global_zero:
            append_or_warn(
                History(trainer.default_root_dir), {"step": trainer.global_step, **figures}
            )

    def _measure(self, trainer: L.Trainer, pl_module: Any) -> float:
        """Every process takes all rows: under ZeRO-3 they gather the base together."""
        rows = itertools.islice(self.datamodule.train_dataloader(), self.num_rows)
        with trainer.precision_plugin.val_step_context():
            return mean_loss(pl_module.model, rows, pl_module.device)
