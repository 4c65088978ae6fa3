"""What a run knows before it has a folder: rows and tokens checked, settings chosen, memory
planned. It costs seconds, no weights.
"""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from lorakit.callbacks.retain import Retain
from lorakit.data.datamodule import LoRADataModule
from lorakit.errors import ConfigError
from lorakit.lora.inject import LoRAPlan, plan
from lorakit.lora.spec import LoRASpec
from lorakit.model.families import packing_is_doubtful
from lorakit.model.load import base_name, load_config, load_skeleton
from lorakit.pipeline import build
from lorakit.pipeline.allocator import tune_allocator
from lorakit.pipeline.autoconfig import RunFacts, choose
from lorakit.pipeline.printing import print_data_report, warn_of_idle_settings
from lorakit.pipeline.processes import num_streams
from lorakit.pipeline.resume import find_run_to_resume
from lorakit.pipeline.strategy_choice import choose_strategy, refuse_unless_elementwise
from lorakit.planner.fitting import check_memory
from lorakit.planner.step_plan import describe, name_of, row_sizes
from lorakit.runs.files import find_write_problem
from lorakit.strategy.world import World
from lorakit.training.optim import auto_lr, lr_source
from lorakit.training.precision import why_precision
from lorakit.weights.adapter import open_init

log = logging.getLogger("lorakit")


@dataclass(frozen=True)
class PreparedRun:
    """What a run knows before it has a folder."""

    config: dict[str, Any]
    datamodule: LoRADataModule
    tokenizer: Any
    spec: LoRASpec
    plan: LoRAPlan
    lr: float
    total_steps: int
    is_estimate: bool
    retain: Retain | None
    resolved: dict[str, Any]  # what the settings that say ``auto`` came to


def prepare(
    config: dict[str, Any],
    world: World,
    there: int,
    accelerator: str,
    precision: str,
    experiment: str,
    console: Console,
) -> PreparedRun:
    """Read and check everything that costs seconds. Raises LorakitError."""
    root, kept = Path(config["paths"]["runs"]).expanduser(), config["checkpoint"]
    if problem := find_write_problem(root / "a run"):
        raise ConfigError(f"paths.runs={root} cannot be used: {problem}")
    # a name that is taken is told before anything is read
    find_run_to_resume(config, root, experiment)
    datamodule, tokenizer = build.load_data(config)
    build.check_pairs(config, datamodule)
    build.check_new_tokens(datamodule, tokenizer)
    if datamodule.has_images and config["strategy"].get("sequence_parallel", 1) > 1:
        raise ConfigError(
            "rows with images cannot be shared by several processes; set"
            " strategy.sequence_parallel=1"
        )
    print_data_report(datamodule, console)
    retain = build.build_retain(config)
    skeleton, model_config = _load_shapes(config)
    known = RunFacts(
        skeleton,
        datamodule.report,
        datamodule.val_report,
        accelerator,
        precision,
        there,
        world,
        num_streams(config, world),
    )
    run = find_run_to_resume(config, root, experiment)
    config, chosen = choose(
        config,
        known,
        lambda text: console.print(text, highlight=False),
        (run.info if run else {}).get("resolved"),
    )
    if chosen and config["trainer"]["precision"] == "auto":
        console.print(
            f"trainer.precision=auto: {precision} ({why_precision(precision, accelerator)})",
            highlight=False,
        )
    if "data.tokens_per_batch" in chosen:
        datamodule.use_tokens_per_batch(
            chosen["data.tokens_per_batch"], chosen.get("data.pack_tokens")
        )
    spec, planned = _plan(config, skeleton, console)
    plan_of_step = build.build_step_plan(
        config,
        skeleton,
        planned,
        accelerator=accelerator,
        precision=precision,
        rows=row_sizes(datamodule.report),
        val_rows=row_sizes(datamodule.val_report),
    )
    strategy = choose_strategy(
        plan_of_step,
        there=there,
        precision=precision,
        accelerator=accelerator,
        world=world,
        say=lambda text: console.print(text, highlight=False),
    )
    memory = check_memory(plan_of_step, name_of(strategy), world.size, there)
    if memory:
        console.print(
            f"memory: {memory.total / 1e9:.1f} GB in each process ({describe(memory)})",
            highlight=False,
        )
    config = {**config, "strategy": strategy}
    if datamodule.is_packed and (reason := packing_is_doubtful(model_config)):
        log.warning("data.packing is off, rows are padded instead: %s", reason)
        datamodule.pad_rows()
    if accelerator == "cpu":
        tune_allocator(memory.total if memory else None, there, planned.num_base_params)
    lr = _resolve_lr(config, model_config, spec, console)
    total_steps, is_estimate = build.resolve_total_steps(config, datamodule, world)
    warn_of_idle_settings(config, datamodule, total_steps)
    # Refuses bad settings before there is a folder.
    optimizer, _ = build.build_optimization(
        config, lr=lr, total_steps=total_steps, precision=precision
    )
    refuse_unless_elementwise(optimizer, strategy)
    stops_early = any(
        entry and entry["_target_"].endswith("EarlyStopping")
        for entry in config["callbacks"].values()
    )
    if stops_early and not len(datamodule.val_indices):
        raise ConfigError(
            "callbacks.early_stopping needs rows to evaluate on; set data.val_path or"
            " data.val_fraction"
        )
    watched = (config["sweep"] or {}).get("metric", "")
    if watched.startswith("val/") and not len(datamodule.val_indices):
        raise ConfigError(
            f"sweep.metric={watched} needs rows to evaluate on; set data.val_path or"
            " data.val_fraction"
        )
    build.check_disk(root, planned, keep_last=kept["keep_last"], keep_best=kept["keep_best"])
    resolved = {
        "trainer.accelerator": accelerator,
        "trainer.precision": precision,
        "optim.lr": lr,
        **chosen,
    }
    return PreparedRun(
        config, datamodule, tokenizer, spec, planned, lr, total_steps, is_estimate, retain, resolved
    )


def _load_shapes(config: dict[str, Any]) -> tuple[Any, Any]:
    """The model without weights, and its config."""
    settings = config["model"]
    options = {"revision": settings["revision"], "trust_remote_code": settings["trust_remote_code"]}
    skeleton = load_skeleton(settings["path"], add_tokens=settings["add_tokens"], **options)
    return skeleton, load_config(settings["path"], **options)


def _plan(config: dict[str, Any], skeleton: Any, console: Console) -> tuple[LoRASpec, LoRAPlan]:
    spec, settings = build.build_spec(config), config["model"]
    if spec.init_from:
        open_init(spec, base=base_name(settings["path"]))
    planned = plan(skeleton, spec)
    console.print(planned.table())
    if planned.note:
        console.print(planned.note, highlight=False)
    console.print(planned.summary())
    return spec, planned


def _resolve_lr(
    config: dict[str, Any], model_config: Any, spec: LoRASpec, console: Console
) -> float:
    lr = config["optim"]["lr"]
    if lr != "auto":
        return float(lr)
    lr = auto_lr(model_config, spec)
    console.print(f"optim.lr=auto: {lr:.3g} ({lr_source(model_config)})")
    return lr
