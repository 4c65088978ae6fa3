"""Time and money from operations."""

from __future__ import annotations

from dataclasses import dataclass

from lorakit.planner.trace import StepTrace


@dataclass(frozen=True, kw_only=True)
class Prices:
    """What is assumed of the machine.

    Args:
        tflops: 10^12 operations per second of a GPU, by its data sheet.
        utilisation: share of that which is reached.
        price_per_hour: of a GPU.
    """

    tflops: float
    utilisation: float
    price_per_hour: float

    def hours(self, trace: StepTrace, num_tokens: int, num_processes: int) -> float:
        """Hours that ``num_processes`` GPUs take for ``num_tokens``, communication left out."""
        operations = trace.num_flops / trace.num_tokens * num_tokens
        return operations / (self.tflops * 1e12 * self.utilisation * num_processes) / 3600

    def price(self, hours: float, num_processes: int) -> float:
        """What they cost."""
        return hours * num_processes * self.price_per_hour
