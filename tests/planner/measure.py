"""What a step really takes: ``python measure.py CASE.json`` trains a random model for a few steps and prints the bytes as JSON.

In a process of its own, whose allocator is told to give back at once what is freed: else the resident set is what it once was.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import json
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss import LOSSES
from lorakit.model.layers import enable_checkpointing
from lorakit.model.load import model_class
from lorakit.planner.memory import Settings, memory_of
from lorakit.planner.trace import StepShape, trace_step
from lorakit.training.step import compute_loss
from lorakit.types import Batch

NUM_STEPS = 3
make_optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, fused=True)


def status(name: str) -> int:
    """A figure of this process in bytes, ``VmRSS`` or ``VmHWM``."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024


def measure(case: dict[str, Any]) -> dict[str, Any]:
    settings = dict(case["model"])
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    spec, dtype = LoRASpec(**case["lora"]), getattr(torch, case["shape"]["dtype"])
    with torch.device("meta"):
        skeleton = model_class(config).from_config(config)
    shape = StepShape(device="cpu", **case["shape"])
    trace = trace_step(skeleton, spec, shape, make_optimizer)
    a = torch.randn(64, 64, dtype=dtype)
    _ = a @ a  # the libraries' own start
    before = _settled()
    model = inject(model_class(config).from_config(config, dtype=dtype).requires_grad_(False).eval(), spec)
    if shape.checkpointing:
        enable_checkpointing(model)
    model.train()
    loaded = _settled() - before
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins again
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    size = (shape.num_rows, shape.num_positions)
    for _ in range(NUM_STEPS):
        tokens = torch.randint(0, config.vocab_size, size)
        spans = tuple((row, 0, shape.num_positions) for row in range(shape.num_rows))
        batch = Batch(tokens, tokens.roll(-1), torch.ones(size), None, spans)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=shape.precision == "bf16-mixed"):
            output = compute_loss(model, batch, LOSSES["cross_entropy"])
        output.loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
        del output
    return {
        "planned": memory_of("single", 1, trace, Settings(accumulates=False, is_cuda=False)).total,
        "measured": status("VmHWM") - before, "loaded": loaded,
        "trainable_planned": trace.num_params, "trainable": sum(parameter.numel() for parameter in trained),
        "weights_planned": trace.weights, "weights": _bytes(model.parameters(), trained=False) + _bytes(model.buffers()),
        "optimizer_planned": trace.optimizer,
        "optimizer": sum(_bytes(state.values()) for state in optimizer.state.values()),
    }  # fmt: skip


def _bytes(tensors: Any, *, trained: bool | None = None) -> int:
    storages = {
        t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors if trained in (None, t.requires_grad)
    }
    return sum(storages.values())


def _settled() -> int:
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return status("VmRSS")


if __name__ == "__main__":
    print(json.dumps(measure(json.loads(Path(sys.argv[1]).read_text()))))
