"""How much goes through the model at a time, and what to do when the memory is not enough for
it.
"""

from __future__ import annotations

import gc
import logging

import torch

from lorakit.data.batch.split import halve_batch, split_batch
from lorakit.errors import TrainingError
from lorakit.types import Batch

log = logging.getLogger("lorakit")


class MicroBatchSplitter:
    """How many positions of a micro-batch go through the model at a time: all, until there was
    no memory for them.
    """

    def __init__(self) -> None:
        self.max_positions: int | None = None

    def parts(self, batch: Batch) -> list[Batch]:
        """``batch`` in parts for which there is room."""
        return split_batch(batch, self.max_positions)

    def shrink(self, batch: Batch) -> None:
        """Halve what goes through the model at a time, after ``batch`` did not.

        Raises:
            TrainingError: one document is too much already.
        """
        largest = max(self.parts(batch), key=lambda part: part.input_ids.numel())
        positions, halves = largest.input_ids.numel(), halve_batch(largest)
        free_memory()
        if len(halves) == 1:
            raise TrainingError(
                f"out of memory with a single row of {positions:,} positions; set data.max_tokens"
                " or lora.rank lower, trainer.activation_checkpointing=true or"
                " model.dtype=bfloat16 (`lorakit plan` says what each would take)"
            )
        self.max_positions = max(half.input_ids.numel() for half in halves)
        log.warning(
            "out of memory with %d positions at a time: now at most %d, and what was computed of"
            " this step is computed again. The step and its gradient stay the same;"
            " data.tokens_per_batch=%d would spare the try",
            positions,
            self.max_positions,
            self.max_positions,
        )


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
