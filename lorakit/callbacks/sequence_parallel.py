"""Rows that several processes share, where the strategy says so."""

from __future__ import annotations

from typing import Any

import lightning as L

from lorakit.model.load import base_of
from lorakit.strategy.sequence import share_rows


class SequenceParallel(L.Callback):
    """Prepares the loaded model before the first step. The data module gives each process its
    part of every row.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        parts = getattr(trainer.strategy, "sequence_parallel", 1)
        if parts > 1:
            datamodule = getattr(trainer, "datamodule", None)
            share_rows(base_of(pl_module.model), parts, getattr(datamodule, "max_tokens", None))
