"""One base with its adapters in one process. Every process of a service has the same, and does
the same to it, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from lorakit.errors import CheckpointError, ConfigError, DataError
from lorakit.lora.adapter_batch import Adapter
from lorakit.lora.spec import LoRASpec
from lorakit.sampling.request import Request, SampledSequence
from lorakit.sampling.sampler import Sampler
from lorakit.service.base import Base
from lorakit.service.forward_request import ForwardRequest
from lorakit.service.model_runner import ModelRunner
from lorakit.service.training_state import TrainingState
from lorakit.strategy.world import World
from lorakit.types import AdamParams, ForwardBackwardOutput


@dataclass(frozen=True)
class SampleOrder:
    """A request as it can be sent. ``request`` has no adapter and calls nobody."""

    number: int
    snapshot_id: str | None
    request: Request


class Worker:
    """What commands are executed on (`service/executor.py`).

    Args:
        max_pass_tokens: positions of a forward pass, padding included.
        max_sample_rows, max_cache_tokens, batch_invariant: as `sampling/sampler.py:Sampler` has
            them.
    """

    def __init__(
        self,
        base: Base,
        world: World,
        *,
        max_pass_tokens: int = 16_384,
        max_sample_rows: int = 256,
        max_cache_tokens: int = 1 << 20,
        batch_invariant: bool = False,
    ) -> None:
        self.base, self.world = base, world
        self.runner = ModelRunner(base, max_tokens=max_pass_tokens, world=world)
        self.sampler = Sampler(
            base.model,
            base.tokenizer,
            bank=base.bank,
            max_rows=max_sample_rows,
            max_cache_tokens=max_cache_tokens,
            run_pass=base.run_pass,
            batch_invariant=batch_invariant,
        )
        self.training_states: dict[str, TrainingState] = {}
        self.snapshots: dict[str, Adapter] = {}
        # callbacks that follow a sample as it grows, by number of its order; only here
        self.listeners: dict[int, Callable[[SampledSequence], None]] = {}
        self._requests: dict[int, Request] = {}
        self._finished: list[tuple[int, Any]] = []

    # ---- training

    def make(self, model_id: str, spec: LoRASpec, start: int | torch.Tensor) -> None:
        """Make an adapter: from a seed, or from its numbers. Raises ConfigError."""
        layout = self.base.layout(spec)
        vector = start if isinstance(start, torch.Tensor) else layout.draw(start)
        self.training_states[model_id] = TrainingState(
            layout,
            vector,
            self.base.device,
            rank=self.world.rank,
            size=self.world.size,
            shards=self.base.shards_optimizer,
        )

    def free(self, model_id: str) -> None:
        """Forget an adapter and its optimiser."""
        self.training_states.pop(model_id, None)

    def load(
        self,
        model_id: str,
        vector: torch.Tensor,
        optimizer_state: dict[str, torch.Tensor] | None,
        num_steps: int,
    ) -> None:
        """Let an adapter be what was saved. Raises CheckpointError."""
        self.training_state(model_id).load(vector, optimizer_state, num_steps)

    def run(
        self, requests: Sequence[ForwardRequest]
    ) -> list[ForwardBackwardOutput | BaseException]:
        """Return what each request came to."""
        states = {request.model_id: self.training_state(request.model_id) for request in requests}
        return self.runner.run(requests, states)

    def step(self, model_id: str, params: AdamParams) -> dict[str, float]:
        """Make an optimiser step. Raises TrainingError."""
        return self.training_state(model_id).step(params)

    def state(self, model_id: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """Return an adapter's numbers and its optimiser's state, whole."""
        training_state = self.training_state(model_id)
        return training_state.vector, training_state.optimizer_state()

    def training_state(self, model_id: str) -> TrainingState:
        """Raises CheckpointError where there is none, because its making failed or it was freed."""
        if model_id not in self.training_states:
            raise CheckpointError(f"there is no model {model_id}: see what its creation said")
        return self.training_states[model_id]

    # ---- sampling

    def snapshot(self, model_id: str, snapshot_id: str) -> None:
        """Keep an adapter as it is now, to be sampled."""
        self._keep(snapshot_id, self.training_state(model_id).snapshot())

    def put_snapshot(self, snapshot_id: str, spec: LoRASpec, vector: torch.Tensor) -> None:
        """Keep a saved adapter, to be sampled."""
        self._keep(snapshot_id, Adapter(self.base.layout(spec), vector.to(self.base.device)))

    def _keep(self, snapshot_id: str, adapter: Adapter) -> None:
        """Beside others in one pass, what is not finite would spoil their samples too. Raises
        CheckpointError.
        """
        if not bool(adapter.vector.isfinite().all()):
            raise CheckpointError(
                "this adapter has numbers that are not finite, so it cannot be sampled"
            )
        self.snapshots[snapshot_id] = adapter

    def drop_snapshot(self, snapshot_id: str) -> None:
        """Forget one."""
        self.snapshots.pop(snapshot_id, None)

    def sample(
        self, orders: Sequence[SampleOrder], cancelled: Sequence[int]
    ) -> list[tuple[int, Any]]:
        """Let requests join, generate a token for each row, and return what was finished, by
        number of its order.
        """
        for order in orders:
            try:
                self._admit(order)
            except Exception as error:  # of this order alone
                self._finished.append((order.number, error))
        for number in cancelled:
            self.listeners.pop(number, None)
            if (request := self._requests.pop(number, None)) is not None:
                request.is_cancelled = True
        if self.sampler.is_busy:
            self.sampler.step()
        finished, self._finished = self._finished, []
        for number, _ in finished:
            self._requests.pop(number, None)
            self.listeners.pop(number, None)
        return finished

    def _admit(self, order: SampleOrder) -> None:
        if self.base.sampling_problem:
            raise ConfigError(
                f"{self.base.name} cannot be sampled here: {self.base.sampling_problem}"
            )
        if order.snapshot_id is not None and order.snapshot_id not in self.snapshots:
            raise DataError("what was to be sampled is gone")
        adapter = None if order.snapshot_id is None else self.snapshots[order.snapshot_id]
        request = replace(
            order.request,
            adapter=adapter,
            done=lambda outcome: self._finished.append((order.number, outcome)),
            each=self.listeners.get(order.number),
        )
        self.sampler.add(request)
        self._requests[order.number] = request

    def fail_samples(self, error: BaseException) -> None:
        """End everything that is being sampled."""
        self.sampler.fail_all(error)
        self._finished.clear()
        self._requests.clear()
        self.listeners.clear()
