"""The model that is trained: a frozen base with LoRA injected."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapter_state
from lorakit.model.layers import compile_layers, enable_checkpointing
from lorakit.model.spec import ModelSpec
from lorakit.strategy.world import check_equal_on_all_ranks
from lorakit.training.precision import base_dtype
from lorakit.weights.adapter import start_from


def build_adapted_model(
    model: ModelSpec,
    lora: LoRASpec,
    *,
    precision: str,
    device: str,
    activation_checkpointing: bool = False,
    compile: bool = False,
) -> Any:
    """Load the base, inject LoRA, and start from another adapter where ``lora.init_from`` says so.

    Args:
        precision: Lightning's name of it; the base's dtype follows where that is auto.
        device: ``cpu``, ``cuda`` or ``mps``.

    Raises:
        ConfigError: several processes do not have the same adapter at the start.
    """
    if model.add_tokens:
        lora = dataclasses.replace(lora, token_ids=model.added_token_ids())
    dtype = base_dtype(model.dtype, precision)
    base = model.load(dtype, device=None if device == "cpu" else device)
    adapted = inject(base, lora, base_name=model.name)
    if activation_checkpointing:
        enable_checkpointing(adapted)
    if compile:
        compile_layers(adapted)
    if lora.init_from:
        start_from(adapted, lora, base=model.name)
    name = "the adapter at the start"
    check_equal_on_all_ranks(lambda: {name: fingerprint(adapter_state(adapted))})
    return adapted


def fingerprint(tensors: Mapping[str, torch.Tensor]) -> str:
    """A short hash of names, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:12]
