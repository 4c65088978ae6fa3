"""Adapter tensors in and out of a model, under PEFT's names."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch

from lorakit.errors import AdapterError, report
from lorakit.model.partition import whole


def adapter_state(model: Any) -> dict[str, torch.Tensor]:
    """Return the adapter's tensors by the names that PEFT writes into a file (detached, not copied
    unless ZeRO-3 has them in parts).

    All processes must ask together.
    """
    import peft

    with whole(parameter for parameter in model.parameters() if parameter.requires_grad) as is_copy:
        state = peft.get_peft_model_state_dict(model, save_embedding_layers=False)
        return {
            name: tensor.detach().clone() if is_copy else tensor.detach()
            for name, tensor in state.items()
        }


@contextlib.contextmanager
def adapters_off(model: Any) -> Iterator[None]:
    """Within, ``model`` computes what its base alone would. (PEFT's own ``disable_adapter`` also
    sets every ``requires_grad`` anew.)
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    layers = [
        module
        for module in model.modules()
        if isinstance(module, BaseTunerLayer | AuxiliaryTrainingWrapper)
    ]
    before = [layer._disable_adapters for layer in layers]
    try:
        for layer in layers:
            layer._disable_adapters = True
        yield
    finally:
        for layer, was_off in zip(layers, before, strict=True):
            layer._disable_adapters = was_off


@torch.no_grad()
def load_adapter_state(model: Any, tensors: Mapping[str, torch.Tensor], *, source: str) -> None:
    """Copy ``tensors`` into the adapter of ``model``, which must have exactly these, in these
    shapes.

    Raises:
        AdapterError: names or shapes differ, in either direction; nothing is changed then.
    """
    own = adapter_state(model)
    problems = [f"only in {source}: {name}" for name in tensors if name not in own]
    problems += [f"only in the plan: {name}" for name in own if name not in tensors]
    problems += [
        f"{name}: {tuple(tensors[name].shape)} in {source}, {tuple(own[name].shape)} in the plan"
        for name in own
        if name in tensors and tensors[name].shape != own[name].shape
    ]
    if problems:
        remedy = (
            "Set rank and targets of lora.* as the adapter has them; its adapter_config.json names"
            " them."
        )
        raise AdapterError(report(f"{source} does not fit the LoRA plan:", problems, remedy=remedy))
    adapter = model.active_adapter
    state = {_name_in_model(name, adapter): tensor for name, tensor in tensors.items()}
    result = model.load_state_dict(state, strict=False)
    assert not result.unexpected_keys, result.unexpected_keys


def _name_in_model(name: str, adapter: str) -> str:
    """What the model calls a tensor that PEFT's files call ``name``."""
    stem = f"{name.removesuffix('.weight')}.{adapter}"
    # those are modules of one weight
    return stem if name.endswith("trainable_tokens_delta") else f"{stem}.weight"
