"""What a client holds: a model under training, and weights to sample from."""

from __future__ import annotations

import weakref
from dataclasses import dataclass
from typing import Any

from lorakit.service.engine import Engine
from lorakit.service.training_state import TrainingState


@dataclass
class Model:
    """One adapter under training."""

    id: str
    owner: str
    base_model: str
    engine: Engine
    lora: dict[str, Any]

    def made(self) -> TrainingState:
        """Its numbers. Raises CheckpointError where its making failed."""
        return self.engine.worker.training_state(self.id)


class Weights:
    """What is sampled: an adapter as it was at some moment, or none, on a base. It is forgotten
    when nobody holds this.
    """

    def __init__(self, base_model: str, engine: Engine, snapshot_id: str | None = None) -> None:
        self.base_model, self.engine, self.snapshot_id = base_model, engine, snapshot_id
        if snapshot_id is not None:
            # Runs in whatever thread collects garbage, the engine's own in the middle of its queue
            # included: it may take no lock, only append.
            weakref.finalize(self, engine.dropped.append, snapshot_id)
