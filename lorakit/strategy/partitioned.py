"""ZeRO-3 for a frozen base alone: its parameters are partitioned over the processes, and gathered
layer by layer in every pass.

Adapters are not DeepSpeed's here: their own training reduces their gradients. So nothing of the
base has a gradient or a state.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from lorakit.strategy.deepspeed import nothing_is_sent, prepare_deepspeed, zero_config
from lorakit.strategy.world import current_world, lift_limits

Pass = Callable[[], tuple[torch.Tensor, Any]]


class PartitionedBase:
    """A model whose parameters are partitioned. All processes make it, and run it, together.

    Args:
        build: loads the model by transformers.
        offload: hold the parts in the host's memory.
    """

    def __init__(self, build: Callable[[], Any], *, offload: bool = False) -> None:
        prepare_deepspeed()
        import deepspeed
        from transformers.integrations import HfDeepSpeedConfig

        os.environ.setdefault("LOCAL_RANK", str(current_world().local_rank))
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(dist.get_backend(), auto_mpi_discovery=False, verbose=False)
        config = zero_config(3, offload)
        # transformers partitions what it loads for as long as this is alive
        known = HfDeepSpeedConfig(copy.deepcopy(config))
        self.model = build()
        del known
        self._root = _Root(self.model)
        with nothing_is_sent():
            self._engine, self._hooks, _, _ = deepspeed.initialize(
                model=self._root, config=config, dist_init_required=False
            )
        lift_limits()

    def run(self, compute: Pass) -> tuple[torch.Tensor, Any]:
        """Return what ``compute`` returns, a tensor and anything, with the model's parameters
        gathered where it needs them.
        """
        return self._root(compute), self._root.found

    def release(self) -> None:
        """Part again what a backward pass has left whole; after each."""
        with torch.no_grad():
            self._hooks.partition_all_parameters()


class _Root(torch.nn.Module):
    """What a pass begins and ends with: DeepSpeed's hooks need a module that returns the loss."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model
        self.found: Any = None

    def forward(self, compute: Pass) -> torch.Tensor:
        tensor, self.found = compute()
        return tensor
