"""One adapter that is being trained: its numbers, the gradient that accumulates, its optimiser."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from lorakit.errors import CheckpointError, TrainingError
from lorakit.lora.bank import Adapter
from lorakit.lora.flat import AdapterLayout
from lorakit.types import AdamParams


class Trainee:
    """Everything that grows with one more adapter: four vectors, of which the optimiser's two are made at its first step."""

    def __init__(self, layout: AdapterLayout, vector: torch.Tensor, device: torch.device) -> None:
        self.layout = layout
        self.vector = vector.to(device)
        self.adapter = Adapter(layout, self.vector, trains=True)
        self.gradient = torch.zeros_like(self.vector)
        self._gradient_views = [view for pair in layout.views(self.gradient).values() for view in pair]
        self._parameter = nn.Parameter(self.vector)
        self._parameter.grad = self.gradient
        self._optimizer = torch.optim.AdamW([self._parameter], fused=True)
        self.num_steps = 0

    @torch.no_grad()
    def add_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        """Add what a pass found for each of ``adapter.leaves``."""
        torch._foreach_add_(self._gradient_views, list(gradients))

    def step(self, params: AdamParams) -> dict[str, float]:
        """Make one step of AdamW, and start a new gradient. The norm returned is that before clipping.

        Raises:
            TrainingError: the gradient is not finite; the step is not made, and the gradient is dropped.
        """
        norm = torch.linalg.vector_norm(self.gradient)
        if not bool(torch.isfinite(norm)):
            self.gradient.zero_()
            raise TrainingError(
                "the gradient is not finite: no step was made, and the gradient is dropped; lower the learning rate, or clip"
            )
        if 0 < params.grad_clip_norm < float(norm):
            self.gradient.mul_(params.grad_clip_norm / norm)
        for group in self._optimizer.param_groups:
            group.update(
                lr=params.learning_rate, betas=(params.beta1, params.beta2), eps=params.eps, weight_decay=params.weight_decay
            )
        self._optimizer.step()
        self.gradient.zero_()
        self.num_steps += 1
        return {"grad_norm": float(norm), "unclipped_grad_l2:mean": float(norm)}

    def snapshot(self) -> Adapter:
        """Return the adapter as it is now, which later steps do not change."""
        return Adapter(self.layout, self.vector.clone())

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """The optimiser's tensors by name; empty before the first step."""
        return {name: tensor.detach() for name, tensor in self._optimizer.state.get(self._parameter, {}).items()}

    @torch.no_grad()
    def load(self, vector: torch.Tensor, optimizer_state: Mapping[str, torch.Tensor] | None, num_steps: int = 0) -> None:
        """Take up saved numbers; without ``optimizer_state`` the optimiser starts anew. The gradient starts at zero."""
        if vector.shape != self.vector.shape:
            raise CheckpointError(f"the saved adapter has {len(vector):,} numbers, this one {len(self.vector):,}")
        self.vector.copy_(vector)
        self.gradient.zero_()
        self._optimizer.state.clear()
        if optimizer_state:
            state = {name: tensor.clone().to(self.vector.device) for name, tensor in optimizer_state.items()}
            self._optimizer.state[self._parameter] = state
        self.num_steps = num_steps if optimizer_state else 0
