"""What each process of a strategy holds, from one trace of the step; and what a machine has."""

from __future__ import annotations

import re
from dataclasses import astuple, dataclass
from pathlib import Path
from typing import Any

import psutil
import torch

from lorakit.planner.trace import StepTrace

STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")
WARN_SHARE, REFUSE_SHARE = 0.9, 1.1
# oneDNN keeps the code it makes for each shape of a 16-bit product, and experts have a new number
# of rows in every step. Measured on two cores with AVX512-BF16 and torch 2.13: 0.3 to 0.66 GB once
# the first steps are through, whatever the model's size; 0.4 to 0.6 MB for each shape.
ONEDNN_BYTES = 660_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes that one process holds at its worst moment."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    buffers: int  # of communication, layers that are gathered, and what libraries keep

    @property
    def total(self) -> int:
        return sum(astuple(self))


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What, apart from the step, decides how much a process holds."""

    # several micro-batches in a step, so that gradients are there before a backward pass
    accumulates: bool
    is_cuda: bool
    bucket_elements: int = 50_000_000
    live_elements: int = 100_000_000
    keeps_products: bool = False  # see ONEDNN_BYTES


def memory_of(strategy: str, num_processes: int, trace: StepTrace, settings: Settings) -> Memory:
    """Return what each of ``num_processes`` holds under ``strategy``, one of ``STRATEGIES``.

    ZeRO as DeepSpeed does it (arXiv 1910.02054, section 5), for a trained adapter in float32: a
    process keeps a part of a second copy of the adapter, which the optimiser steps, and a bucket in
    which gradients travel.
    """
    share = 1 / num_processes
    gradients = trace.adapter if settings.accumulates or strategy != "single" else trace.gradients
    # where the optimiser's step holds more than the backward
    in_step = trace.adapter + trace.step - gradients - trace.head
    activations = max(trace.activations, in_step)
    buffers = ONEDNN_BYTES if settings.keeps_products else 0
    weights, optimizer = trace.weights + trace.adapter, trace.optimizer
    if strategy == "ddp":
        buffers += trace.adapter
    elif strategy != "single":
        bucket = 4 * min(settings.bucket_elements, trace.num_params)
        buffers += bucket * (2 if settings.is_cuda else 1)
        optimizer = round((trace.optimizer + trace.adapter) * share)
        gradients = trace.adapter if strategy == "zero1" else round(trace.adapter * share)
    if strategy.startswith("zero3"):
        bytes_each = trace.weights / max(1, trace.num_base_params)
        gathered = trace.largest_layer + round(
            bytes_each * (settings.live_elements + settings.bucket_elements)
        )
        buffers += min(trace.weights, gathered)
        weights = round((trace.weights + trace.adapter) * share)
        if strategy == "zero3_offload" and settings.is_cuda:
            weights, optimizer, gradients = 0, 0, 0  # they are in the host's memory
    return Memory(weights, gradients, optimizer, activations, trace.head, buffers)


def available_bytes(accelerator: str, num_local: int = 1) -> int:
    """Return the bytes that a process of this machine may have: of its current GPU, or its share
    of the host's that is free.
    """
    if accelerator == "cuda":
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()
    return min(psutil.virtual_memory().available, _left_in_cgroup()) // num_local


def _left_in_cgroup() -> int:
    """What a container may still take; more than any machine has where nothing limits it."""
    folder, found = Path("/sys/fs/cgroup"), []
    for limit, used in (
        ("memory.max", "memory.current"),
        ("memory/memory.limit_in_bytes", "memory/memory.usage_in_bytes"),
    ):
        try:
            found.append(int((folder / limit).read_text()) - int((folder / used).read_text()))
        except (OSError, ValueError):  # absent, or "max"
            continue
    return min(found, default=1 << 62)


def rough_bound(
    skeleton: Any,
    num_params: int,
    *,
    num_tokens: int,
    num_positions: int,
    bytes_each: int,
    checkpointing: bool = False,
    keeps_scores: bool = False,
) -> int:
    """Return a number of bytes that a step surely stays below, of a model on the meta device. It
    takes no time, and is a few times too large.

    Of every matrix it counts what goes in and comes out twice over, in float32, of the vocabulary
    four times; of a checkpointed model that of one layer, and what goes into the others.

    Args:
        num_tokens: of a micro-batch.
        num_positions: of its longest row.
        keeps_scores: attention keeps the scores of all pairs, of every layer.
    """
    config = skeleton.config.get_text_config()
    top_k = max(1, int(getattr(config, "num_experts_per_tok", None) or 1))
    vocabulary = int(getattr(config, "vocab_size", None) or 0)
    num_base, words = 0, 0
    widths: dict[str, int] = {}  # of the matrices of each layer
    for name, parameter in skeleton.named_parameters():
        num_base += parameter.numel()
        width = sum(parameter.shape[-2:]) * (top_k if parameter.dim() == 3 else 1)
        if parameter.dim() == 2 and vocabulary in parameter.shape:
            words += width
            continue
        layer = re.match(r"(.*?\.\d+)\.", name)
        widths[layer[1] if layer else name] = widths.get(layer[1] if layer else name, 0) + width
    num_layers = max(1, len(widths))
    held, layers_with_scores = sum(widths.values()), num_layers if keeps_scores else 1
    if checkpointing:
        held = max(widths.values(), default=0) + num_layers * int(config.hidden_size)
        layers_with_scores = 1
    pairs = layers_with_scores * int(getattr(config, "num_attention_heads", 1)) * num_positions
    elements = num_tokens * (2 * held + 4 * words + (8 if keeps_scores else 2) * pairs)
    return num_base * bytes_each + 20 * num_params + 4 * elements
