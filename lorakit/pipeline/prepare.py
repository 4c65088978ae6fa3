"""What a run knows before it has a folder: rows and tokens checked, settings chosen, memory
planned. It costs seconds, no weights.

``STEPS`` are its checks in their order; each reads what the ones before it have found.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.console import Console

from lorakit.callbacks.retain import Retain
from lorakit.config.optimization import build_optimization
from lorakit.config.schema import RunConfig
from lorakit.data.datamodule import LoRADataModule
from lorakit.errors import ConfigError
from lorakit.lora.plan import LoRAPlan, plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.model.families import packing_is_doubtful
from lorakit.pipeline import build
from lorakit.pipeline.allocator import tune_allocator
from lorakit.pipeline.autoconfig import RunFacts, choose
from lorakit.pipeline.printing import print_data_report, warn_of_idle_settings
from lorakit.pipeline.processes import Place, num_streams
from lorakit.pipeline.resume import find_run_to_resume
from lorakit.pipeline.strategy_choice import choose_strategy, refuse_unless_elementwise
from lorakit.planner.fitting import check_memory
from lorakit.planner.step_plan import describe, row_sizes, strategy_name
from lorakit.runs.files import find_write_problem
from lorakit.training.optim import auto_lr, lr_source
from lorakit.training.precision import why_precision
from lorakit.weights.adapter import open_init

log = logging.getLogger("lorakit")


@dataclass
class PreparedRun:
    """What a run knows before it has a folder. ``STEPS`` fill it in, from top to bottom."""

    config: RunConfig
    place: Place
    experiment: str
    console: Console
    datamodule: LoRADataModule = field(init=False)
    tokenizer: Any = field(init=False)
    retain: Retain | None = field(init=False)
    skeleton: Any = field(init=False)  # the model without weights
    model_config: Any = field(init=False)
    chosen: dict[str, Any] = field(init=False)  # what the settings that say ``auto`` came to
    spec: LoRASpec = field(init=False)
    plan: LoRAPlan = field(init=False)
    planned_bytes: int | None = field(init=False)  # of each process; None where it is surely little
    lr: float = field(init=False)
    total_steps: int = field(init=False)
    is_estimate: bool = field(init=False)

    def say(self, text: str) -> None:
        """Print a line."""
        self.console.print(text, highlight=False)

    @property
    def resolved(self) -> dict[str, Any]:
        """What the settings that depend on the machine came to."""
        return {
            "trainer.accelerator": self.place.accelerator,
            "trainer.precision": self.place.precision,
            "optim.lr": self.lr,
            **self.chosen,
        }


def prepare(config: RunConfig, place: Place, experiment: str, console: Console) -> PreparedRun:
    """Read and check everything that costs seconds. Raises LorakitError."""
    run = PreparedRun(config, place, experiment, console)
    for step in STEPS:
        step(run)
    return run


def check_runs_folder(run: PreparedRun) -> None:
    """Runs can be written, and the name is free: checked before anything is read."""
    if problem := find_write_problem(run.config.runs_folder / "a run"):
        raise ConfigError(f"paths.runs={run.config.paths.runs} cannot be used: {problem}")
    find_run_to_resume(run.config, run.experiment)


def read_rows(run: PreparedRun) -> None:
    """Rows and tokens are right, and go together with loss and strategy."""
    run.datamodule, run.tokenizer = build.load_data(run.config)
    build.check_pairs(run.config, run.datamodule)
    build.check_new_tokens(run.datamodule, run.tokenizer)
    if run.datamodule.has_images and run.config.sequence_parallel > 1:
        raise ConfigError(
            "rows with images cannot be shared by several processes; set"
            " strategy.sequence_parallel=1"
        )
    print_data_report(run.datamodule, run.console)
    run.retain = build.build_retain(run.config)


def check_rows_to_evaluate(run: PreparedRun) -> None:
    """What looks at evaluations has some."""
    if len(run.datamodule.val_indices):
        return
    entries = run.config.callbacks.values()
    if any(entry and entry.target.endswith("EarlyStopping") for entry in entries):
        raise ConfigError(
            "callbacks.early_stopping needs rows to evaluate on; set data.val_path or"
            " data.val_fraction"
        )
    watched = (run.config.sweep or {}).get("metric", "")
    if watched.startswith("val/"):
        raise ConfigError(
            f"sweep.metric={watched} needs rows to evaluate on; set data.val_path or"
            " data.val_fraction"
        )


def load_shapes(run: PreparedRun) -> None:
    """The model's shapes are known, without a weight."""
    run.skeleton = run.config.model.load_skeleton()
    run.model_config = run.config.model.load_config()


def choose_settings(run: PreparedRun) -> None:
    """What says ``auto`` has a value: that of the run which is resumed, or one that fits."""
    place, data = run.place, run.datamodule
    facts = RunFacts(
        run.skeleton,
        data.report,
        data.val_report,
        place,
        num_streams(run.config, place.world),
    )
    earlier = find_run_to_resume(run.config, run.experiment)
    run.config, run.chosen = choose(
        run.config, facts, run.say, earlier.info.get("resolved") if earlier else None
    )
    if run.chosen and run.config.trainer.precision == "auto":
        why = why_precision(place.precision, place.accelerator)
        run.say(f"trainer.precision=auto: {place.precision} ({why})")
    if "data.tokens_per_batch" in run.chosen:
        data.use_tokens_per_batch(
            run.chosen["data.tokens_per_batch"], run.chosen.get("data.pack_tokens")
        )


def plan_adapter(run: PreparedRun) -> None:
    """Which matrices get an adapter is known, and printed."""
    run.spec = run.config.lora_with_tokens
    if run.spec.init_from:
        open_init(run.spec, base=run.config.model.name)
    run.plan = plan_lora(run.skeleton, run.spec)
    run.console.print(run.plan.table())
    if run.plan.note:
        run.say(run.plan.note)
    run.console.print(run.plan.summary())


def plan_memory(run: PreparedRun) -> None:
    """The strategy is chosen, and a step fits into the memory there is."""
    place, memory_bytes = run.place, run.place.memory_per_process_bytes
    step = build.build_step_plan(
        run.config,
        run.skeleton,
        run.plan,
        accelerator=place.accelerator,
        precision=place.precision,
        rows=row_sizes(run.datamodule.report),
        val_rows=row_sizes(run.datamodule.val_report),
    )
    strategy = choose_strategy(step, place, run.say)
    memory = check_memory(step, strategy_name(strategy), place.world.size, memory_bytes)
    if memory:
        run.say(f"memory: {memory.total / 1e9:.1f} GB in each process ({describe(memory)})")
    run.planned_bytes = memory.total if memory else None
    run.config = run.config.with_values({"strategy": strategy})


def check_packing(run: PreparedRun) -> None:
    """Rows are packed only where the model can isolate what is packed."""
    if run.datamodule.is_packed and (reason := packing_is_doubtful(run.model_config)):
        log.warning("data.packing is off, rows are padded instead: %s", reason)
        run.datamodule.pad_rows()


def tune_memory(run: PreparedRun) -> None:
    """The C library knows what to do with memory that a step frees."""
    if run.place.accelerator == "cpu":
        memory_bytes = run.place.memory_per_process_bytes
        tune_allocator(run.planned_bytes, memory_bytes, run.plan.num_base_params)


def plan_steps(run: PreparedRun) -> None:
    """Learning rate and number of steps are known, and the optimiser accepts its settings."""
    config, place = run.config, run.place
    run.lr = _resolve_lr(run)
    run.total_steps, run.is_estimate = build.resolve_total_steps(
        config, run.datamodule, place.world
    )
    warn_of_idle_settings(config, run.datamodule, run.total_steps)
    optimizer: Callable[..., torch.optim.Optimizer]
    optimizer, _ = build_optimization(
        config, lr=run.lr, total_steps=run.total_steps, precision=place.precision
    )
    refuse_unless_elementwise(optimizer, config.strategy)


def check_disk(run: PreparedRun) -> None:
    """Checkpoints fit onto the disk."""
    kept = run.config.checkpoint
    build.check_disk(
        run.config.runs_folder, run.plan, keep_last=kept.keep_last, keep_best=kept.keep_best
    )


STEPS: tuple[Callable[[PreparedRun], None], ...] = (
    check_runs_folder,
    read_rows,
    load_shapes,
    choose_settings,
    plan_adapter,
    plan_memory,
    check_packing,
    tune_memory,
    plan_steps,
    check_rows_to_evaluate,
    check_disk,
)


def _resolve_lr(run: PreparedRun) -> float:
    lr = run.config.optim.get("lr")
    if lr != "auto":
        return float(lr)
    lr = auto_lr(run.model_config, run.spec)
    run.console.print(f"optim.lr=auto: {lr:.3g} ({lr_source(run.model_config)})")
    return lr
