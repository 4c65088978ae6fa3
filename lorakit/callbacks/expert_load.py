"""How evenly the experts of each layer are used."""

from __future__ import annotations

from typing import Any

import lightning as L
import torch

from lorakit.model.families import router_modules
from lorakit.model.partition import full_shape
from lorakit.types import Batch


class ExpertLoad(L.Callback):
    """Logs, per layer, the busiest expert's share of tokens times the number of experts: 1 is
    even, E is all on one.
    """

    def __init__(self) -> None:
        self._counts: dict[str, torch.Tensor] = {}
        self._handles: list[Any] = []
        self._is_token: torch.Tensor | None = None  # (B * L,): False where there is only padding

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        routers = router_modules(pl_module.model)
        for layer, (_, router) in enumerate(routers):
            self._handles.append(router.register_forward_hook(self._make_hook(f"{layer:02d}")))

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: Any, batch: Batch, batch_idx: int
    ) -> None:
        is_token_BL = torch.zeros(batch.input_ids.shape, dtype=torch.bool)
        for row, start, end in batch.spans_here:
            is_token_BL[row, start:end] = True
        self._is_token = is_token_BL.flatten().to(batch.input_ids.device)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if trainer.fit_loop._should_accumulate():
            return
        for layer, own in self._counts.items():
            counts: Any = trainer.strategy.reduce(own, reduce_op="sum")
            load = counts.float() / counts.sum().clamp(min=1) * len(counts)
            pl_module.log(f"expert_load/layer_{layer}_max", load.max())
        self._counts.clear()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        self._counts.clear()

    def teardown(self, trainer: L.Trainer, pl_module: Any, stage: str) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _make_hook(self, layer: str) -> Any:
        def hook(router: torch.nn.Module, inputs: Any, output: Any) -> None:
            if not router.training or not isinstance(output, tuple):
                return
            indices = next((tensor for tensor in output if not tensor.is_floating_point()), None)
            if indices is not None:
                if self._is_token is not None and len(indices) == len(self._is_token):
                    indices = indices[self._is_token]
                weight: Any = router.weight
                num_experts = full_shape(weight)[0]
                counts = torch.bincount(indices.flatten(), minlength=num_experts)
                self._counts[layer] = self._counts.get(layer, torch.zeros_like(counts)) + counts

        return hook
