"""The last step is evaluated too, where that was not due."""

from __future__ import annotations

from typing import Any

import lightning as L
from lightning.pytorch.loops.fit_loop import _FitLoop


class LastEvaluation(L.Callback):
    """Runs the evaluation at the end of training, while the strategy still holds the model; not
    after an interruption.

    Checkpoints tell which step was evaluated last, so that a run which ended in between is
    evaluated when it continues.
    """

    def __init__(self) -> None:
        self._validated_step = -1

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            trainer.fit_loop = _LoopWithAnEnd.of(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validated_step = trainer.global_step

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        # an interruption sets the former to 0
        if not trainer.limit_val_batches or self._validated_step == trainer.global_step:
            return
        trainer.validating = True
        trainer.fit_loop.epoch_loop.val_loop.run()
        trainer.training = True

    def state_dict(self) -> dict[str, Any]:
        return {"validated_step": self._validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._validated_step = state_dict["validated_step"]


class _LoopWithAnEnd(_FitLoop):
    """Lightning's loop, which calls no hook where a run continues after its last step; here those
    of the end are called.
    """

    @classmethod
    def of(cls, trainer: L.Trainer) -> _LoopWithAnEnd:
        loop = cls(trainer)
        vars(loop).update(vars(trainer.fit_loop))  # data and limits are in it already
        return loop

    @property
    def skip(self) -> bool:
        return self.trainer.limit_train_batches == 0
