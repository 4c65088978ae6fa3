"""A trial of a sweep that will not be among the best ends at an evaluation."""

from __future__ import annotations

import math
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lightning as L
from lightning.pytorch.utilities import rank_zero_warn

from lorakit.strategy.world import broadcast_object
from lorakit.sweep.study import open_storage

if TYPE_CHECKING:
    import optuna


class Pruning(L.Callback):
    """Reports each evaluation to the sweep's study and stops the run where ``pruner`` says so, all
    processes together.

    Args:
        folder: of the sweep.
        storage: ``sqlite`` or ``journal``.
        trial: its number; None, outside of a sweep, does nothing.
        metric: the figure that is reported.
        pruner: one of Optuna's; None lets each trial end.
    """

    def __init__(
        self,
        *,
        folder: str,
        storage: str,
        trial: int | None,
        metric: str,
        pruner: optuna.pruners.BasePruner | None = None,
    ) -> None:
        self.folder = Path(folder).expanduser()
        self.storage = storage
        self.number = trial
        self.metric = metric
        self.pruner = pruner
        self.is_pruned = self._has_ended = False
        self._trial: optuna.Trial | None = None

    def on_train_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        # resumed: it may have been killed after the evaluation that would have ended it
        if trainer.global_step:
            self._stop(trainer, self._reports(trainer) and self._report(trainer.global_step, None))

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        value = trainer.callback_metrics.get(self.metric)
        said = False
        if self._reports(trainer) and value is not None:
            said = self._report(trainer.global_step, float(value))
        is_last = self._has_ended or trainer.global_step >= (pl_module.total_steps or math.inf)
        self._stop(trainer, said and not is_last)

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._has_ended = True  # one more evaluation may follow

    def _reports(self, trainer: L.Trainer) -> bool:
        return trainer.is_global_zero and self.pruner is not None and self.number is not None

    def _stop(self, trainer: L.Trainer, is_pruned: bool) -> None:
        if broadcast_object(is_pruned):
            self.is_pruned = trainer.should_stop = True

    def _report(self, step: int, value: float | None) -> bool:
        """Return whether the trial shall end. A study that cannot be read does not end a run."""
        import optuna

        try:
            if self._trial is None:
                study = optuna.load_study(
                    study_name=self.folder.name,
                    storage=open_storage(self.folder, self.storage),
                    pruner=self.pruner,
                )
                known = study.get_trials(deepcopy=False)[self.number or 0]
                self._trial = optuna.Trial(study, known._trial_id)
            if value is not None:
                with warnings.catch_warnings():
                    # a trial that continues reports some steps again
                    warnings.simplefilter("ignore")
                    self._trial.report(value, step)
            return self._trial.should_prune()
        except (optuna.exceptions.OptunaError, OSError) as error:
            rank_zero_warn(
                f"{self.folder}: step {step} was not reported to the sweep, and cannot be pruned"
                f" ({error})"
            )
            return False
