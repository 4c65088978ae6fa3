"""The last step is evaluated too, where that was not due."""

from __future__ import annotations

import lightning as L


class LastEvaluation(L.Callback):
    """Runs the evaluation at the end of training, while the strategy still holds the model; not behind an interruption."""

    def __init__(self) -> None:
        self._validated_step = -1

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if not trainer.limit_val_batches or self._validated_step == trainer.global_step:  # an interruption sets the former to 0
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True
