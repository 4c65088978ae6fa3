"""One adapter that is being trained: its numbers, the gradient that accumulates, its optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import nn

from lorakit.errors import CheckpointError, TrainingError
from lorakit.lora.adapter_batch import Adapter
from lorakit.lora.flat_parameters import FlatParameters
from lorakit.types import AdamParams


class TrainingState:
    """Everything that grows with one more adapter: four vectors, of which the optimiser's two are
    made at its first step.

    Each of several processes accumulates the gradient of what it computed; a step adds them up.

    Args:
        shards: each process holds the optimiser's state for its share of the vector alone.
    """

    def __init__(
        self,
        layout: FlatParameters,
        vector: torch.Tensor,
        device: torch.device,
        *,
        rank: int = 0,
        size: int = 1,
        shards: bool = False,
    ) -> None:
        self.layout, self.size = layout, size
        self._share = -(-layout.num_params // size) if shards else layout.num_params
        storage = torch.zeros(self._share * (size if shards else 1), device=device)
        self._shares = storage.split(self._share)
        self.vector = storage[: layout.num_params]
        self.vector.copy_(vector)
        self.adapter = Adapter(layout, self.vector, trains=True)
        gradient = torch.zeros_like(storage)
        self.gradient = gradient[: layout.num_params]
        self._gradient_views = [
            view for pair in layout.views(self.gradient).values() for view in pair
        ]
        self._mine = rank if shards else 0
        self._parameter = nn.Parameter(self._shares[self._mine])
        self._parameter.grad = gradient.split(self._share)[self._mine]
        self._optimizer = torch.optim.AdamW([self._parameter], fused=True)
        self.num_steps = 0

    @torch.no_grad()
    def add_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add what a pass found for each of ``adapter.leaves``."""
        torch._foreach_add_(self._gradient_views, list(gradients))

    def step(self, params: AdamParams) -> dict[str, float]:
        """Make one step of AdamW, and start a new gradient. The norm returned is that before
        clipping.

        Raises:
            TrainingError: the gradient is not finite; the step is not made, and the gradient is
                dropped.
        """
        if self.size > 1:
            dist.all_reduce(self.gradient)
        norm = torch.linalg.vector_norm(self.gradient)
        if not bool(torch.isfinite(norm)):
            self.gradient.zero_()
            raise TrainingError(
                "the gradient is not finite: no step was made, and the gradient is dropped; lower"
                " the learning rate, or clip"
            )
        if 0 < params.grad_clip_norm < float(norm):
            self.gradient.mul_(params.grad_clip_norm / norm)
        for group in self._optimizer.param_groups:
            group.update(
                lr=params.learning_rate,
                betas=(params.beta1, params.beta2),
                eps=params.eps,
                weight_decay=params.weight_decay,
            )
        self._optimizer.step()
        self.gradient.zero_()
        self.num_steps += 1
        with torch.no_grad():
            if len(self._shares) > 1:
                dist.all_gather(list(self._shares), self._shares[self._mine].clone())
        return {"grad_norm": float(norm), "unclipped_grad_l2:mean": float(norm)}

    def snapshot(self) -> Adapter:
        """Return the adapter as it is now, which later steps do not change."""
        return Adapter(self.layout, self.vector.clone())

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimiser's tensors by name, whole; empty before the first step. Collective."""
        found = {}
        for name, tensor in self._optimizer.state.get(self._parameter, {}).items():
            tensor = tensor.detach()
            if tensor.shape == self._parameter.shape and len(self._shares) > 1:
                parts = [torch.empty_like(tensor) for _ in self._shares]
                dist.all_gather(parts, tensor)
                tensor = torch.cat(parts)
            found[name] = tensor[: self.layout.num_params] if tensor.ndim else tensor
        return found

    @torch.no_grad()
    def load(
        self,
        vector: torch.Tensor,
        optimizer_state: Mapping[str, torch.Tensor] | None,
        num_steps: int = 0,
    ) -> None:
        """Load saved numbers; without ``optimizer_state`` the optimiser starts anew. The
        gradient starts at zero.
        """
        if vector.shape != self.vector.shape:
            raise CheckpointError(
                f"the saved adapter has {len(vector):,} numbers, this one {len(self.vector):,}"
            )
        self.vector.copy_(vector)
        self.gradient.zero_()
        self._optimizer.state.clear()
        if optimizer_state:
            start = self._mine * self._share
            mine = {}
            for name, tensor in optimizer_state.items():
                if tensor.ndim:
                    whole = tensor.new_zeros(self._share * len(self._shares))
                    whole[: len(tensor)] = tensor
                    tensor = whole[start : start + self._share]
                mine[name] = tensor.clone().to(self.vector.device)
            self._optimizer.state[self._parameter] = mine
        self.num_steps = num_steps if optimizer_state else 0
