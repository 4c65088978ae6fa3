"""What each process of the strategy tests runs: the fits that a JSON file asks for, one after the
other.

``python train_fits.py plan.json``. For every fit it leaves, from the first process, ``<name>.pt``
in the plan's folder: the adapter at the start and at the end, and each step's figures.
"""

from __future__ import annotations

import contextlib
import functools
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import torch
import vision
from tiny_models import FakeTokenizer

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.callbacks.packing_guard import PackingGuard
from lorakit.callbacks.sequence_parallel import SequenceParallel
from lorakit.data.datamodule import LoRADataModule
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapter_state
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.model.layers import enable_checkpointing
from lorakit.model.load import load_model
from lorakit.runs.checkpoint import STATE_FILE, list_checkpoints
from lorakit.sampling.generate import generate
from lorakit.strategy.ddp import AdapterDDP
from lorakit.strategy.deepspeed import ZeroStrategy
from lorakit.strategy.world import current_world
from lorakit.training.module import LoRAModule
from lorakit.training.optim import cosine
from lorakit.types import Batch, LossOutput, SamplingParams

torch.set_num_threads(1)


class Record(L.Callback):
    """The adapter at the start, after the first step and at the end, each step's figures, and
    what the model writes at the end.
    """

    def __init__(self, stop_at: int | None = None) -> None:
        self.start: dict[str, torch.Tensor] = {}
        self.first: dict[str, torch.Tensor] = {}
        self.end: dict[str, torch.Tensor] = {}
        self.samples: list[tuple[int, ...]] = []
        self.steps: dict[int, dict[str, float]] = {}
        self.written: dict[int, int] = {}
        self.stop_at = stop_at

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.start = copies(pl_module.model)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        if not trainer.fit_loop._should_accumulate():
            self.steps[trainer.global_step] = {
                name: float(value) for name, value in trainer.callback_metrics.items()
            }
            # Bytes that this process has written so far, to the network among others.
            self.written[trainer.global_step] = int(Path("/proc/self/io").read_text().split()[3])
            trainer.should_stop = trainer.global_step == self.stop_at
            if trainer.global_step == 1:
                self.first = copies(pl_module.model)

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        self.end = copies(pl_module.model)
        params = SamplingParams(max_tokens=6, temperature=0.0, stop=[])
        samples = generate(pl_module.model, FakeTokenizer(), [[5, 6, 7], [9, 8]], params)
        self.samples = [sample.tokens for sample in samples]


def copies(model: Any) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in adapter_state(model).items()}


class NotFiniteOnce:
    """A loss that is NaN on one process in one of its calls."""

    def __init__(self, rank: int, call: int) -> None:
        self.rank, self.call, self.num_calls = rank, call, 0

    def __call__(self, logprobs: torch.Tensor, batch: Batch) -> LossOutput:
        output = cross_entropy(logprobs, batch)
        self.num_calls += torch.is_grad_enabled()
        is_here = (
            self.num_calls == self.call
            and current_world().rank == self.rank
            and torch.is_grad_enabled()
        )
        return replace(output, loss_sum=output.loss_sum * float("nan")) if is_here else output


class WatchedAutocast:
    """Cross entropy that remembers in which number format the model was run."""

    def __init__(self) -> None:
        self.dtypes: set[str] = set()

    def __call__(self, logprobs: torch.Tensor, batch: Batch) -> LossOutput:
        self.dtypes.add(
            str(torch.get_autocast_dtype("cpu")) if torch.is_autocast_enabled("cpu") else "none"
        )
        return cross_entropy(logprobs, batch)


def as_on_a_gpu() -> Any:
    """DeepSpeed asks for a GPU's autocast, and switches off the one that it finds."""
    ask = torch.is_autocast_enabled
    return mock.patch.object(torch, "is_autocast_enabled", lambda device=None: ask(device or "cpu"))


def build_strategy(name: str, parts: int, precision: Any) -> Any:
    if name == "single":
        return "auto"
    if name == "ddp":
        return AdapterDDP(sequence_parallel=parts)
    # Some tensors stay whole, some do not.
    return ZeroStrategy(
        stage=int(name[4]),
        offload=name.endswith("offload"),
        persist_elements=100,
        sequence_parallel=parts,
        precision=precision,
    )


OPTIMIZERS = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.02),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2),
}


def fit(folder: Path, plan: dict[str, Any], name: str, options: dict[str, Any]) -> None:
    world = current_world()
    L.seed_everything(7, verbose=False)
    datamodule = LoRADataModule(
        path=options.get("rows", plan["rows"]),
        batch_size=options.get("batch_size", 2),
        epochs=options.get("epochs"),
        max_tokens=options.get("max_tokens", 32),
        val_path=plan["rows"],
        val_rows=5,
        val_batch_size=2,
        packing=options.get("packing", False),
        shuffle=options.get("shuffle", True),
    )
    if plan.get("has_images"):
        datamodule.set_tokenizer(vision.make_tokenizer(), vision.make_encoder())
    else:
        datamodule.set_tokenizer(FakeTokenizer())

    precision: Any = options.get("precision", "32-true")
    watched = WatchedAutocast()

    def build_model() -> Any:
        spec = LoRASpec(
            rank=4,
            experts=options.get("experts", True),
            dropout=options.get("dropout", 0.0),
            vision=options.get("vision", False),
            merger=options.get("vision", False),
        )
        model = inject(
            load_model(plan["model"], dtype="bfloat16" if precision == "bf16-mixed" else "float32"),
            spec,
        )
        if options.get("checkpointing"):
            enable_checkpointing(model)
        return model

    module = LoRAModule(
        build_model,
        optimizer=OPTIMIZERS[options["optimizer"]],
        schedule=cosine,
        total_steps=options["steps"],
        clip_norm=options.get("clip_norm", 0.0),
        loss=NotFiniteOnce(*options["not_finite"])
        if "not_finite" in options
        else watched
        if precision == "bf16-mixed"
        else "cross_entropy",
    )
    record = Record(options.get("stop_at"))
    checkpoints = AdapterCheckpoint(
        folder / "checkpoints" / name, every_steps=options.get("save_every", 0), keep_last=9
    )
    strategy = build_strategy(plan["strategy"], plan.get("parts", 1), precision)
    trainer = L.Trainer(
        default_root_dir=folder,
        accelerator="cpu",
        devices=world.local_size,
        num_nodes=world.num_nodes,
        precision=None if isinstance(strategy, ZeroStrategy) else precision,
        strategy=strategy,
        max_steps=options["steps"],
        max_epochs=1,
        accumulate_grad_batches=options["accumulate"],
        check_val_every_n_epoch=None,
        val_check_interval=options.get("eval_every", 10_000) * options["accumulate"],
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        callbacks=[PackingGuard(), SequenceParallel(), record, checkpoints],
    )
    state = None
    if resume := options.get("resume"):
        state = list_checkpoints(Path(resume))[-1].folder / STATE_FILE
    with as_on_a_gpu() if precision == "bf16-mixed" else contextlib.nullcontext():
        trainer.fit(
            module, datamodule=datamodule, ckpt_path=state, weights_only=True if state else None
        )
    if world.is_rank_zero:
        found = {
            "start": record.start,
            "first": record.first,
            "end": record.end,
            "steps": record.steps,
            "written": record.written,
        }
        found |= {"samples": record.samples, "num_bad_steps": module.num_bad_steps}
        frozen = {
            str(getattr(p, "ds_tensor", p).dtype)
            for p in module.model.parameters()
            if not p.requires_grad
        }
        found |= {"computed_in": sorted(watched.dtypes), "frozen_in": sorted(frozen)}
        torch.save(found, folder / f"{name}.pt")


def main() -> None:
    plan = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    folder = Path(sys.argv[1]).parent
    for name, options in plan["fits"].items():
        fit(folder, plan, name, options)


if __name__ == "__main__":
    main()
