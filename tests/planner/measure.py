"""What a step really takes: ``python measure.py CASES.json`` trains random models for a few steps
and prints the bytes, a line each.

On a CPU a case has a process of its own, whose allocator is told to give back at once what is
freed: else the resident set is what it once was. A GPU's allocator counts what is in use, for one
case after the other.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss import LOSSES
from lorakit.model.attention import attend_by_document
from lorakit.model.layers import enable_checkpointing
from lorakit.model.load import model_class
from lorakit.planner.memory import Settings, memory_of
from lorakit.planner.trace import StepShape, trace_step
from lorakit.training.step import compute_loss
from lorakit.types import Batch, Images

NUM_STEPS = 3
make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)


class HostMemory:
    """This process's resident set."""

    def settled(self) -> int:
        gc.collect()
        ctypes.CDLL(None).malloc_trim(0)
        return self._status("VmRSS")

    def begin_peak(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        return self._status("VmHWM")

    @staticmethod
    def _status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


class GpuMemory:
    """What torch's allocator has given out."""

    def settled(self) -> int:
        gc.collect()
        torch.cuda.empty_cache()
        return torch.cuda.memory_allocated()

    def begin_peak(self) -> None:
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated()


def measure(case: dict[str, Any]) -> dict[str, Any]:
    settings, device = dict(case["model"]), case.get("device", "cpu")
    memory: HostMemory | GpuMemory = HostMemory() if device == "cpu" else GpuMemory()
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    spec, dtype = LoRASpec(**case["lora"]), getattr(torch, case["shape"]["dtype"])
    with torch.device("meta"):
        skeleton = model_class(config).from_config(config)
    shape = StepShape(device=device, **case["shape"])
    trace = trace_step(skeleton, spec, shape, make_optimizer)
    a = torch.randn(64, 64, dtype=dtype, device=device, requires_grad=True)
    (a @ a).sum().backward()  # the libraries' own start
    before = memory.settled()
    with torch.device(device):
        base = model_class(config).from_config(config, dtype=dtype).requires_grad_(False).eval()
    model = inject(base, spec)
    if shape.checkpointing:
        enable_checkpointing(model)
    if (num_documents := case.get("documents", 1)) > 1:
        attend_by_document(model.get_base_model())
    model.train()
    loaded = memory.settled() - before
    memory.begin_peak()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    batches = [_batch(shape, config, num_documents).to(device) for _ in range(NUM_STEPS)]
    seconds = []
    for batch in batches:
        began = time.perf_counter()
        with torch.autocast(device, dtype=torch.bfloat16, enabled=shape.precision == "bf16-mixed"):
            output = compute_loss(model, batch, LOSSES["cross_entropy"])
        output.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        del output
        seconds.append(time.perf_counter() - began)
    return {
        "planned": memory_of(
            "single", 1, trace, Settings(accumulates=False, is_cuda=device != "cpu")
        ).total,
        "measured": memory.peak() - before,
        "loaded": loaded,
        "trainable_planned": trace.num_params,
        "trainable": sum(parameter.numel() for parameter in trained),
        "weights_planned": trace.weights,
        "weights": _bytes(model.parameters(), trained=False) + _bytes(model.buffers()),
        "optimizer_planned": trace.optimizer,
        "optimizer": sum(_bytes(state.values()) for state in optimizer.state.values()),
        "seconds": min(seconds),
        "num_flops": trace.num_flops,
        "num_tokens": trace.num_tokens,
        "reserved": torch.cuda.max_memory_reserved() if device != "cpu" else None,
    }


def _batch(shape: StepShape, config: Any, num_documents: int) -> Batch:
    size, length = (shape.num_rows, shape.num_positions), shape.num_positions // num_documents
    tokens, images = torch.randint(0, config.get_text_config().vocab_size - 16, size), None
    spans = tuple(
        (row, start, start + length)
        for row in range(size[0])
        for start in range(0, size[1], length)
    )
    positions = (torch.arange(size[1]) % length).expand(size) if num_documents > 1 else None
    if shape.image_tokens:
        vision, merge = config.vision_config, config.vision_config.spatial_merge_size
        tokens.view(-1)[: sum(shape.image_tokens)] = config.image_token_id
        grids = torch.tensor([[1, merge, merge * count] for count in shape.image_tokens])
        width = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
        images = Images(torch.randn(int(grids.prod(-1).sum()), width), grids)
        positions = torch.arange(size[1]).expand(4, *size)
    return Batch(tokens, tokens.roll(-1), torch.ones(size), positions, spans, images=images)


def _bytes(tensors: Any, *, trained: bool | None = None) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
        for t in tensors
        if trained in (None, t.requires_grad)
    }
    return sum(storages.values())


if __name__ == "__main__":
    for number, case in enumerate(json.loads(Path(sys.argv[1]).read_text())):
        try:
            print(json.dumps(measure(case)), flush=True)
        except torch.OutOfMemoryError as error:
            print(json.dumps({"error": f"case {number}: {error}"}), flush=True)
