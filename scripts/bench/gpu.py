"""Qwen3-30B-A3B's real shapes on one GPU, random weights made there: tokens/s, utilisation, memory,
beside PEFT.

    python scripts/bench/gpu.py [--out FOLDER] [--steps N] python scripts/bench/gpu.py --device cpu
    --layers 2 --small     # the same program on small shapes, to see that it runs

Needs torch, transformers and peft; no hub and no files. First a small model is compared between CPU
and GPU: loss and gradients, in float32 and bf16. Then a model of one layer, then the whole one, at
4,096 and 8,192 tokens per step, in packed documents of 1,024 tokens, rank 32 (or the rank named) on
all linear layers and experts, AdamW with float32 adapters and moments.

Utilisation is of the dense bf16 peak of the device. Model operations per token, after PaLM (arXiv
2204.02311, appendix B) with
frozen weights, whose own gradients nobody computes: 4 N for the N weights that a token meets
(forward, and back towards the input), 6 per trained parameter that it meets, and 3 x 4 x width of
the heads x mean length of what a token attends to, for each layer.
Hardware operations add what activation checkpointing computes again: 2 N, 2 per trained parameter,
and a third of attention's.
"""

from __future__ import annotations

import argparse
import datetime
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import torch
import transformers

from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.attention import attend_by_document
from lorakit.model.layers import compile_layers, enable_checkpointing
from lorakit.training.step import compute_loss
from lorakit.types import Batch

DOCUMENT_TOKENS, LR = 1024, 1e-4
# dense bf16 operations per second, from NVIDIA's data sheets
PEAKS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
REAL: dict[str, Any] = {
    "vocab_size": 151_936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "norm_topk_prob": True,
    "tie_word_embeddings": False,
    "max_position_embeddings": 40_960,
    "rope_theta": 1e6,
}
SMALL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "moe_intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_experts": 8,
    "num_experts_per_tok": 2,
}
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
CONTENDERS = ["shared_outer-32", "per_expert-32", "shared_outer-8", "peft-32"]
Step = Callable[[], float]


def make_model(config: Any, device: str, dtype: torch.dtype) -> Any:
    """The model with random weights, made on ``device`` in ``dtype``."""
    torch.manual_seed(0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype)
    return model.requires_grad_(False)


def make_batch(tokens: int, document: int, vocab_size: int, device: str) -> Batch:
    """One packed row of random documents, all of whose tokens are trained."""
    generator = torch.Generator().manual_seed(1)
    drawn = torch.randint(0, vocab_size, (1, tokens + 1), generator=generator)
    spans = tuple((0, start, min(start + document, tokens)) for start in range(0, tokens, document))
    positions = torch.cat([torch.arange(end - start) for _, start, end in spans])[None]
    batch = Batch(
        drawn[:, :-1],
        drawn[:, 1:],
        torch.ones(1, tokens),
        positions if len(spans) > 1 else None,
        spans,
    )
    return batch.to(device)


def wrap(model: Any, who: str, rank: int) -> Any:
    """``model`` with the adapter of a contender: peft, per_expert or shared_outer."""
    if who == "peft":
        config = peft.LoraConfig(
            r=rank, lora_alpha=rank, target_modules=TARGETS, target_parameters=STACKS
        )
        wrapped = peft.get_peft_model(model, config, autocast_adapter_dtype=True)
    else:
        wrapped = inject(model, LoRASpec(rank=rank, alpha=rank, expert_layout=who))
    return wrapped.train()


def build_step(model: Any, batch: Batch) -> Step:
    """A training step: forward, loss, backward, clip, AdamW; under autocast where the base is in
    bf16.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=LR, weight_decay=0.0, fused=True)
    is_mixed = model.dtype == torch.bfloat16

    def step() -> float:
        with torch.autocast(batch.input_ids.device.type, dtype=torch.bfloat16, enabled=is_mixed):
            loss = compute_loss(model, batch, cross_entropy).loss_sum / batch.weight
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return float(loss.detach())

    return step


def operations_per_token(
    model: Any, config: Any, document: int, *, checkpointing: bool
) -> tuple[float, float]:
    """Return (model, hardware) operations per token; the formula stands at the top of this file."""
    share = config.num_experts_per_tok / config.num_experts
    frozen = trained = 0.0
    for name, parameter in model.named_parameters():
        if parameter.dim() < 2 or "embed_tokens" in name:
            continue
        is_for_each_expert = ".experts." in name and (
            parameter.dim() < 3 or parameter.shape[0] == config.num_experts
        )
        used = parameter.numel() * (share if is_for_each_expert else 1.0)
        trained, frozen = (
            (trained + used, frozen) if parameter.requires_grad else (trained, frozen + used)
        )
    attention = (
        4
        * config.num_hidden_layers
        * config.num_attention_heads
        * config.head_dim
        * (document + 1)
        / 2
    )
    of_model = 4 * frozen + 6 * trained + 3 * attention
    return of_model, of_model + (2 * frozen + 2 * trained + attention if checkpointing else 0)


def timed(step: Step, device: str, count: int) -> tuple[float, float]:
    """Return (median seconds of a step, peak bytes on the device)."""
    step()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        step()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    return sorted(seconds)[
        len(seconds) // 2
    ], torch.cuda.max_memory_allocated() if device == "cuda" else float("nan")


def check_against_cpu(device: str) -> dict[str, dict[str, float]]:
    """Loss and gradients of a small model on ``device`` beside those in float32 on the CPU, in both
    layouts and number formats.

    bf16 is what is measured later, by other kernels than float32. Raises where they differ.
    """
    # Products of float32 on a GPU are TF32 in places; bf16 keeps eight bits.
    cases = {"float32": (torch.float32, 1e-5, 1e-3), "bfloat16": (torch.bfloat16, 1e-2, 0.1)}
    return {
        f"{who}, {name}": _compare(
            device, who, dtype, most_loss=most_loss, most_gradient=most_gradient
        )
        for who in ("per_expert", "shared_outer")
        for name, (dtype, most_loss, most_gradient) in cases.items()
    }


def _compare(
    device: str, who: str, dtype: torch.dtype, *, most_loss: float, most_gradient: float
) -> dict[str, float]:
    config = transformers.Qwen3MoeConfig(**{**REAL, **SMALL, "num_hidden_layers": 2})
    found = []
    for place, number_format in (("cpu", torch.float32), (device, dtype)):
        model = wrap(make_model(config, "cpu", torch.float32).to(place, number_format), who, 8)
        generator = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
        attend_by_document(model.get_base_model())
        with torch.autocast(place, dtype=torch.bfloat16, enabled=number_format == torch.bfloat16):
            loss = compute_loss(model, make_batch(256, 100, 512, place), cross_entropy).loss_sum
        loss.backward()
        gradient = torch.cat(
            [p.grad.flatten().cpu() for p in model.parameters() if p.requires_grad]
        )
        found.append((float(loss.detach()), gradient))
    (loss_cpu, gradient_cpu), (loss_device, gradient_device) = found
    difference = float((gradient_cpu - gradient_device).norm() / gradient_cpu.norm())
    figures = {"loss": abs(loss_cpu - loss_device) / abs(loss_cpu), "gradients": difference}
    if not (figures["loss"] <= most_loss and difference <= most_gradient):
        raise RuntimeError(f"{device} differs from the CPU, {who}, {dtype}: {figures}")
    return figures


def measure(options: argparse.Namespace, layers: int) -> Iterator[dict[str, Any]]:
    """Yield a record for each contender, rank, tokens per step and checkpointing mode; what does
    not fit is said.
    """
    settings = {**REAL, **(SMALL if options.small else {}), "num_hidden_layers": layers}
    config = transformers.Qwen3MoeConfig(**settings)
    dtype = torch.float32 if options.small else torch.bfloat16
    peak = next(
        (
            rate
            for name, rate in PEAKS.items()
            if options.device == "cuda" and name in torch.cuda.get_device_name()
        ),
        None,
    )
    for who, rank in (name.rsplit("-", 1) for name in options.contenders):
        for checkpointing in (True, False):
            model = step = None
            record = {
                "who": who,
                "rank": int(rank),
                "checkpointing": checkpointing,
                "layers": layers,
                "compile": options.compile,
            }
            try:
                model = wrap(make_model(config, options.device, dtype), who, int(rank))
                if checkpointing:
                    enable_checkpointing(model)
                # Random routers may choose otherwise for a rounding, so that the check of packed
                # rows fails: it is told.
                record["masked_because"] = (
                    None if who == "peft" else attend_by_document(model.get_base_model())
                )
                if options.compile:
                    compile_layers(model)
                for tokens in options.tokens:
                    record["tokens"] = tokens
                    step = build_step(
                        model,
                        make_batch(tokens, DOCUMENT_TOKENS, config.vocab_size, options.device),
                    )
                    seconds, peak_bytes = timed(step, options.device, options.steps)
                    if options.profile and who != "peft":
                        profile(
                            step,
                            options.out
                            / f"profile_{layers}_{who}_{rank}_{tokens}_{checkpointing}.txt",
                        )
                    counts = operations_per_token(
                        model, config, min(DOCUMENT_TOKENS, tokens), checkpointing=checkpointing
                    )
                    rates = [count * tokens / seconds / peak if peak else None for count in counts]
                    yield record | {
                        "seconds": seconds,
                        "tokens_per_second": tokens / seconds,
                        "peak_bytes": peak_bytes,
                        "model_utilisation": rates[0],
                        "hardware_utilisation": rates[1],
                    }
            except torch.OutOfMemoryError:
                yield record | {"error": "out of memory"}
            model = step = None  # which holds it as well
            gc.collect()
            if options.device == "cuda":
                torch.cuda.empty_cache()


def profile(step: Step, path: Path) -> None:
    """Write what one step spends its time on, by kernel and by operation."""
    step()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as found:
        step()
    averages = found.key_averages()
    tables = [
        averages.table(sort_by=key, row_limit=45, max_name_column_width=90)
        for key in ("cuda_time_total", "self_cpu_time_total")
    ]
    path.write_text("\n".join(tables), encoding="utf-8")


def main() -> None:
    """Compare, measure, write ``bench_gpu.json``."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--layers", type=int, nargs="+", default=[1, 48], help="of the models measured"
    )
    parser.add_argument("--tokens", type=int, nargs="+", default=[4096, 8192], help="per step")
    parser.add_argument("--steps", type=int, default=5, help="measured steps")
    parser.add_argument(
        "--contenders", nargs="+", default=CONTENDERS, help="layout, or peft, and rank"
    )
    parser.add_argument("--compile", action="store_true", help="each layer by torch.compile")
    parser.add_argument(
        "--profile", action="store_true", help="write what a step spends its time on"
    )
    parser.add_argument("--small", action="store_true", help="small shapes, to see that it runs")
    parser.add_argument("--out", type=Path, default=Path("runs/bench"))
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU here: nothing is measured, and the table stays open")
        return
    about = {
        "date": datetime.date.today().isoformat(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "peft": peft.__version__,
        "device": torch.cuda.get_device_name() if options.device == "cuda" else options.device,
        "differences_to_cpu": check_against_cpu(options.device),
    }
    print(json.dumps(about), flush=True)
    records = []
    options.out.mkdir(parents=True, exist_ok=True)
    for record in (record for layers in options.layers for record in measure(options, layers)):
        print(json.dumps(record), flush=True)
        records.append(record)
        (options.out / "bench_gpu.json").write_text(
            json.dumps({**about, "records": records}, indent=2) + "\n", encoding="utf-8"
        )


if __name__ == "__main__":
    main()
