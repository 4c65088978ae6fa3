"""Many adapters on one frozen base: rows of several adapters go through the base together.

The base is given hooks, not wrapped, so that nothing of it is copied and ZeRO-3 can partition it.
What the adapters of a pass compute is in `adapter_batch.py`.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from lorakit.lora.adapter_batch import AdapterBatch
from lorakit.lora.expert_function import FactorPair, run_experts
from lorakit.lora.flat_parameters import Key
from lorakit.lora.grouped import AdapterIds, can_group, few_tokens, is_plain_product
from lorakit.model.families import OF_IMAGES, ExpertStack, find_targets


class AdapterBank:
    """Gives ``model`` the hooks by which a ``AdapterBatch`` takes part in its passes."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self._adapter_batch: AdapterBatch | None = None
        head = model.get_output_embeddings()
        self.head_name = next(
            (name for name, module in model.named_modules() if module is head), None
        )
        # A vision tower's rows are patches, which belong to no token's adapter.
        targets = [target for target in find_targets(model) if target.family not in OF_IMAGES]
        modules = dict(model.named_modules())
        for name in dict.fromkeys(target.module for target in targets if target.outer):
            module = modules[name]
            module.forward = functools.partial(
                self._run_experts, name, ExpertStack(module), module.forward
            )
        for target in targets:
            if (
                target.parameter is None and target.module != self.head_name
            ):  # that one's adapter is the head's (`loss/head.py`)
                modules[target.module].register_forward_hook(
                    functools.partial(self._add_to_linear, Key(target.module))
                )

    @contextlib.contextmanager
    def active(self, adapter_batch: AdapterBatch) -> Iterator[None]:
        """Give passes of the model, forward and backward, the adapters of ``adapter_batch``."""
        before, self._adapter_batch = self._adapter_batch, adapter_batch
        try:
            yield
        finally:
            self._adapter_batch = before

    def on_head(
        self, adapter_batch: AdapterBatch, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None:
        """Return what the adapters of ``adapter_batch`` have on the unembedding: A, B and gate or
        scale, as ``AdapterBatch.pair``.
        """
        return adapter_batch.pair(Key(self.head_name), dtype) if self.head_name else None

    def _add_to_linear(
        self, key: Key, module: nn.Module, args: tuple[Any, ...], output: torch.Tensor
    ) -> torch.Tensor:
        if self._adapter_batch is None:
            return output
        if self._adapter_batch.is_sorted:
            if (stacked := self._adapter_batch.stacked(key, output.dtype)) is None:
                return output
            with torch.autocast(output.device.type, enabled=False):
                return stacked.add_to(
                    output.flatten(0, -2), args[0].flatten(0, -2).to(output.dtype)
                ).view(output.shape)
        if (found := self._adapter_batch.pair(key, output.dtype)) is None:
            return output
        a, b, gate = found
        x_TI = args[0].flatten(0, -2).to(output.dtype)
        scale = 1.0
        with torch.autocast(output.device.type, enabled=False):
            if isinstance(gate, float):
                narrow, scale = x_TI @ a.mT, gate
            else:
                narrow = (x_TI @ a.mT) * gate.to(output.dtype)
            return torch.addmm(output.flatten(0, -2), narrow, b.mT, alpha=scale).view(output.shape)

    def _run_experts(
        self,
        name: str,
        stack: ExpertStack,
        plain: Callable[..., torch.Tensor],
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor,
        top_k_weights: torch.Tensor,
    ) -> torch.Tensor:
        first: list[FactorPair] = []
        second: list[FactorPair] = []
        factors: list[torch.Tensor] = []
        adapter_ids = (
            None
            if self._adapter_batch is None
            else _adapter_ids_of_rows(self._adapter_batch, name, stack, top_k_index)
        )
        for key, is_second in _expert_keys(name, stack):
            if self._adapter_batch is None:
                break
            pairs = second if is_second else first
            index = len(factors) // 2
            columns = stack.columns(key.matrix)
            if adapter_ids is not None and not key.is_shared:
                if (by_adapter := self._adapter_batch.by_adapter(key)) is not None:
                    pairs.append(FactorPair(index, columns, 1.0, is_by_adapter=True))
                    factors += by_adapter
            elif (found := self._adapter_batch.pair(key, torch.float32)) is not None:
                a, b, gate = found
                scale, gate_TR = (gate, None) if isinstance(gate, float) else (1.0, gate)
                pairs.append(FactorPair(index, columns, scale, key.is_shared, gate_TR=gate_TR))
                factors += [a, b]
        if self._adapter_batch is None or (not factors and not _beats_plain(stack, top_k_index)):
            return plain(hidden_states, top_k_index, top_k_weights)
        return run_experts(
            stack.module,
            stack,
            hidden_states,
            top_k_index,
            top_k_weights,
            first,
            second,
            factors,
            adapter_ids=adapter_ids,
        )


def _adapter_ids_of_rows(
    adapter_batch: AdapterBatch, name: str, stack: ExpertStack, experts_TK: torch.Tensor
) -> AdapterIds | None:
    """The adapters of tokens where sorting rows by them pays, else None: then gates are used."""
    # rows to fill up: padding may overflow in it
    if adapter_batch.adapter_ids is None or stack.weight(stack.first).dtype == torch.float16:
        return None
    keys = [key for key, _ in _expert_keys(name, stack) if not key.is_shared]
    ranks = [
        x.layout.slots[key].rank
        for x in adapter_batch.adapters
        if x is not None
        for key in keys
        if key in x.factors
    ]
    if not ranks:
        return None
    first, second = stack.weight(stack.first), stack.weight(stack.second)
    base_cost = (first.numel() + second.numel()) / stack.num_experts
    widths = sum(
        stack.in_features(one) + stack.out_features(one) for one in (stack.first, stack.second)
    )
    pads = experts_TK.device.type == "cpu" or not can_group(experts_TK.numel(), *stack.weights())
    pays = adapter_batch.adapter_ids.pay(
        experts_TK,
        stack.num_experts,
        base_cost=base_cost,
        factor_cost=max(ranks) * widths,
        pads=pads,
    )
    return adapter_batch.adapter_ids if pays else None


def _beats_plain(stack: ExpertStack, experts_TK: torch.Tensor) -> bool:
    """Whether our products are faster than torch's grouped ones where nothing is adapted: on a
    CPU, for many tokens or by padding.
    """
    if torch.is_grad_enabled() or not is_plain_product(stack.weight(stack.first)):
        return False
    return (few := few_tokens()) is None or few.pads(
        stack.module, experts_TK, *stack.weights(), is_adapted=False
    )


@functools.cache
def _keys_of(name: str, first: str, has_gate: bool) -> tuple[tuple[Key, bool], ...]:
    shared_first = ("gate_proj", "up_proj") if has_gate else ("up_proj",)
    keys = [
        (Key(name, first), False),
        *((Key(name, matrix, True), False) for matrix in shared_first),
    ]
    return (*keys, (Key(name, "down_proj"), True), (Key(name, "down_proj", True), True))


def _expert_keys(name: str, stack: ExpertStack) -> tuple[tuple[Key, bool], ...]:
    """All keys of an adapter on a module of experts, and whether each is on the way out."""
    return _keys_of(name, stack.first, bool(stack.module.has_gate))
