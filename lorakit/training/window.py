"""What belongs to one optimiser step: the batches of its accumulation window, and their sums."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from lorakit.training.step import sums_by_origin
from lorakit.types import Batch, LossOutput


class Sums:
    """Sums over batches, of a window or of an evaluation: what the loss returns beside itself, by
    name, and loss and weight of each source of data, (2, S) float32.
    """

    def __init__(self) -> None:
        self.metrics: dict[str, torch.Tensor | float] = {}
        self.by_source: torch.Tensor | float = 0.0

    def add(self, output: LossOutput, batch: Batch, num_sources: int) -> None:
        """Add the output of ``batch``. With one source of data, there are no sums by source."""
        if num_sources:
            sums = sums_by_origin(output, batch, num_sources)
            self.by_source = self.by_source + sums.detach()
        for name, value in output.metrics.items():
            self.metrics[name] = self.metrics.get(name, 0.0) + value


class EvaluationSums(Sums):
    """Those of an evaluation: the loss's sum, and what it is divided by."""

    def __init__(self) -> None:
        super().__init__()
        self.loss_sum = self.denominator = 0.0


class AccumulationWindow(Sums):
    """The batches whose gradients one optimiser step adds up.

    ``loss`` is that of the window so far: the sum of its parts' losses, each divided by the weight
    of the whole window, (). It is known on the device only.
    """

    def __init__(self) -> None:
        super().__init__()
        self.batches: list[Batch] = []
        self.loss: torch.Tensor | float = 0.0

    def restart(self) -> None:
        """Forget the sums, not the batches: their gradient is about to be made anew."""
        self.loss, self.by_source, self.metrics = 0.0, 0.0, {}

    @property
    def weight(self) -> float:
        """What the loss is divided by: the weight of the window over all processes."""
        return self.batches[-1].window_weight

    @property
    def positions(self) -> int:
        """Positions of the latest batch; 0 where there is none."""
        return self.batches[-1].input_ids.numel() if self.batches else 0

    def tensors(self) -> Sequence[dict[str, torch.Tensor]]:
        """The tensors of all batches, to be saved."""
        return [batch.tensors() for batch in self.batches]
