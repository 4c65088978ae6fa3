"""A whole model in every process; the adapters' gradients are averaged."""

from __future__ import annotations

import datetime
import warnings
from typing import Any

from lightning.pytorch.strategies import DDPStrategy


class AdapterDDP(DDPStrategy):
    """Lightning's DDP, that sends nothing but the adapters' gradients.

    DDP would send the whole frozen base over the network at the start. Every process reads it from
    disk, and makes the adapter from the same seed.

    Args:
        timeout_seconds: how long a process waits for the others.
        sequence_parallel: how many processes share each row of tokens (``strategy/sequence.py``).
    """

    def __init__(
        self, *, timeout_seconds: float = 600.0, sequence_parallel: int = 1, **options: Any
    ) -> None:
        super().__init__(
            init_sync=False,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
            # of a vision tower, say, where only other processes have images
            find_unused_parameters=True,
            timeout=datetime.timedelta(seconds=timeout_seconds),
            **options,
        )
        self.sequence_parallel = sequence_parallel

    def _setup_model(self, model: Any) -> Any:
        with warnings.catch_warnings():
            # torch 2.13 renames broadcast_buffers, and 2.10 does not know the new name.
            warnings.filterwarnings("ignore", message=".*broadcast_buffers.*")
            # Whether there are unused parameters depends on the batch; torch suggests to switch the
            # search off after one without.
            warnings.filterwarnings("ignore", message=".*find_unused_parameters.*")
            return super()._setup_model(model)
