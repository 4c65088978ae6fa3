"""A callback: any of Lightning's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lightning as L


class Seen(L.Callback):
    """Writes into the run's folder how many micro-batches each process has seen."""

    def __init__(self, folder: str, word: str = "rows") -> None:
        self.folder, self.word, self.count = Path(folder), word, 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        (self.folder / f"seen-{trainer.global_rank}.txt").write_text(f"{self.count} of {self.word}")
