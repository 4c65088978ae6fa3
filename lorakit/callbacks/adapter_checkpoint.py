"""Checkpoints while training, and a clean end at Ctrl-C or SIGTERM."""

from __future__ import annotations

import functools
import io
import random
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import lightning as L
import numpy as np
import torch
from lightning.pytorch.utilities import rank_zero_warn

from lorakit.lora.state import adapter_state
from lorakit.runs.checkpoint import list_checkpoints, prune, save_checkpoint
from lorakit.strategy.world import all_gather_object
from lorakit.weights.adapter import active_config, write_adapter


class AdapterCheckpoint(L.Callback):
    """Writes a checkpoint every ``every_steps`` optimiser steps, after each evaluation, and at the
    end.

    A write that fails (a full disk) leaves the last good checkpoint in force and says so. The
    random state is part of a checkpoint. At the first Ctrl-C, or SIGTERM (how batch systems
    announce the end of a job's time), the step is finished, a checkpoint written and the fit ended;
    at a second Ctrl-C it stops at once.

    With several processes the first writes, and all learn whether it could; a signal to any of
    them ends the fit of all at the same step.

    Args:
        folder: where ``step-000100`` and so on are written.
        every_steps: 0 writes only after evaluations and at the end.
        keep_last, keep_best: how many stay, newest and by evaluation loss.
    """

    def __init__(
        self, folder: str | Path, *, every_steps: int = 100, keep_last: int = 2, keep_best: int = 1
    ) -> None:
        self.folder = Path(folder)
        self.every_steps, self.keep_last, self.keep_best = every_steps, keep_last, keep_best
        # the signal that ended the fit; one after the last step ends nothing
        self.interrupt: int | None = None
        self._signal: int | None = None  # the first that has come
        self._saved_step = -1
        self._random_state: dict[str, Any] | None = None
        self._old_handlers: dict[int, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._saved_step = trainer.global_step
        # A run that was killed after its last checkpoint had decided to stop, which EarlyStopping
        # itself does not remember.
        trainer.should_stop |= any(
            stopper.wait_count >= stopper.patience for stopper in trainer.early_stopping_callbacks
        )
        try:
            self._old_handlers = {
                number: signal.signal(number, self._on_interrupt)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not in the main thread: the caller handles signals there
            self._old_handlers = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        if self._random_state is not None:
            _set_random_state(self._random_state)
            self._random_state = None

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.global_step == self._saved_step or trainer.fit_loop._should_accumulate():
            return
        self.interrupt = self._agree_on_interrupt(trainer)
        if self.interrupt:
            trainer.should_stop = True
            trainer.limit_val_batches = 0  # else Lightning evaluates once more before it stops
            self._save(trainer, pl_module)
        elif (
            self.every_steps
            and trainer.global_step % self.every_steps == 0
            and not _will_validate(trainer)
        ):
            self._save(trainer, pl_module)

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        if trainer.global_step != self._saved_step:
            loss = trainer.callback_metrics.get("val/loss")
            self._save(trainer, pl_module, val_loss=None if loss is None else float(loss))

    def on_train_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if trainer.global_step != self._saved_step:
            self._save(trainer, pl_module)
        self._restore_handlers()

    def on_exception(self, trainer: L.Trainer, pl_module: Any, exception: BaseException) -> None:
        self._restore_handlers()

    def on_save_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Keep the random state of every process."""
        own, packed = _get_random_state(), io.BytesIO()
        torch.save(own, packed)  # pickle itself fails on numpy's unsigned integers as tensors
        everyone = all_gather_object(packed.getvalue())
        checkpoint["lorakit_random"] = [
            torch.load(io.BytesIO(state), weights_only=True) for state in everyone
        ]

    def on_load_checkpoint(
        self, trainer: L.Trainer, pl_module: Any, checkpoint: dict[str, Any]
    ) -> None:
        """Restore this process's; another number of processes continues with the states they were
        started with.
        """
        states = checkpoint.get("lorakit_random", [])
        self._random_state = (
            states[trainer.global_rank] if len(states) == trainer.world_size else None
        )

    def _agree_on_interrupt(self, trainer: L.Trainer) -> int | None:
        if trainer.world_size == 1:
            return self._signal
        number = torch.tensor(self._signal or 0, device=trainer.strategy.root_device)
        return int(trainer.strategy.reduce(number, reduce_op="max")) or None

    def _save(self, trainer: L.Trainer, pl_module: Any, val_loss: float | None = None) -> None:
        step = trainer.global_step
        # What all processes must do together comes first, so that the first one is alone where
        # writing fails.
        tensors = adapter_state(pl_module.model)
        # optimiser and loops too
        state = trainer._checkpoint_connector.dump_checkpoint(weights_only=False)
        is_saved = False
        if trainer.is_global_zero:
            is_saved = self._write(trainer, pl_module, step, tensors, state, val_loss)
        if trainer.strategy.broadcast(is_saved):
            self._saved_step = step

    def _write(
        self,
        trainer: L.Trainer,
        pl_module: Any,
        step: int,
        tensors: dict[str, Any],
        state: dict[str, Any],
        val_loss: float | None,
    ) -> bool:
        write = functools.partial(
            write_adapter, tensors, active_config(pl_module.model), dtype=torch.float32
        )
        write_state = functools.partial(trainer.strategy.checkpoint_io.save_checkpoint, state)
        try:
            save_checkpoint(
                self.folder,
                step=step,
                save_adapter=write,
                save_state=write_state,
                val_loss=val_loss,
            )
        except (OSError, RuntimeError) as error:  # torch.save wraps a full disk into a RuntimeError
            if isinstance(error, RuntimeError) and not _is_write_failure(error):
                raise
            steps = [checkpoint.step for checkpoint in list_checkpoints(self.folder)]
            in_force = f"step {steps[-1]} is still valid" if steps else "there is none yet"
            rank_zero_warn(
                f"checkpoint of step {step} could not be written ({error}); the last good one:"
                f" {in_force}"
            )
            return False
        prune(self.folder, keep_last=self.keep_last, keep_best=self.keep_best)
        return True

    def _on_interrupt(self, signum: int, frame: FrameType | None) -> None:
        self._signal = self._signal or signum
        # batch systems may send SIGTERM twice; a person means it
        signal.signal(signal.SIGINT, self._old_handlers[signal.SIGINT])

    def _restore_handlers(self) -> None:
        for number, handler in self._old_handlers.items():
            signal.signal(number, handler)
        self._old_handlers = {}


def _will_validate(trainer: L.Trainer) -> bool:
    """Whether an evaluation follows this step; the checkpoint then waits for its loss.

    One after the last step, written before, would be the end of a run that is killed then: it
    would never be evaluated.
    """
    if not trainer.enable_validation:
        return False
    every = trainer.val_check_batch
    is_due = isinstance(every, int) and (trainer.fit_loop.total_batch_idx + 1) % every == 0
    return is_due or trainer.is_last_batch or trainer.global_step == trainer.max_steps


def _is_write_failure(error: RuntimeError) -> bool:
    text = str(error)
    return "PytorchStreamWriter" in text or "unexpected pos" in text or "file write failed" in text


def _get_random_state() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": list(random.getstate()[1]),
        "numpy": {
            "kind": str(kind),
            "keys": torch.from_numpy(np.array(keys)),
            "rest": [int(position), int(has_gauss), float(gauss)],
        },
    }
    if torch.cuda.is_available():
        state["cuda"] = torch.cuda.get_rng_state_all()
    return state


def _set_random_state(state: dict[str, Any]) -> None:
    torch.set_rng_state(state["torch"].cpu())
    random.setstate((3, tuple(state["python"]), None))
    position, has_gauss, gauss = state["numpy"]["rest"]
    np.random.set_state(
        (state["numpy"]["kind"], state["numpy"]["keys"].numpy(), position, has_gauss, gauss)
    )
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state_all([tensor.cpu() for tensor in state["cuda"]])
