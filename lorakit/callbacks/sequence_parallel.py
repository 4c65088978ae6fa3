"""Rows that several processes share, where the strategy says so."""

from __future__ import annotations

from typing import Any

import lightning as L

from lorakit.data.specs import DataSpec
from lorakit.model.load import base_of
from lorakit.strategy.sequence import share_rows


class SequenceParallel(L.Callback):
    """Prepares the loaded model. The data module gives each process its positions."""

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        sp_size = getattr(trainer.strategy, "sequence_parallel", 1)
        if sp_size > 1:
            spec = getattr(getattr(trainer, "datamodule", None), "spec", None)
            max_tokens = spec.rendering.max_tokens if isinstance(spec, DataSpec) else None
            share_rows(base_of(pl_module.model), sp_size, max_tokens)
