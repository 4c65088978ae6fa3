"""A resolved config, as plain values, to the objects of a run."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import math
import os
import shlex
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning as L
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.callbacks.history import RunHistory
from lorakit.callbacks.last_evaluation import LastEvaluation
from lorakit.callbacks.memory_probe import MemoryProbe
from lorakit.callbacks.packing_guard import PackingGuard
from lorakit.callbacks.progress import StepProgress
from lorakit.callbacks.retain import Retain
from lorakit.callbacks.sequence_parallel import SequenceParallel
from lorakit.config.optimization import build_loss, build_optimization
from lorakit.config.schema import RunConfig
from lorakit.config.settings import Component, TrainerSettings
from lorakit.data.datamodule import LoRADataModule
from lorakit.data.datum import OnLong
from lorakit.data.images import ImageEncoder
from lorakit.data.specs import BatchSpec, RowSpec
from lorakit.errors import ConfigError
from lorakit.lora.plan import LoRAPlan
from lorakit.lora.spec import LoRASpec
from lorakit.model.spec import ModelSpec
from lorakit.pipeline.processes import num_streams
from lorakit.planner.fake_images import SampleShapes
from lorakit.planner.step_plan import StepPlan
from lorakit.strategy.heartbeat import PhaseCallback
from lorakit.strategy.world import World
from lorakit.training.module import LoRAModule
from lorakit.training.precision import resolve_accelerator, resolve_precision

log = logging.getLogger("lorakit")


def build_datamodule(config: RunConfig) -> LoRADataModule:
    """The DataModule, nothing read yet."""
    keywords = {**config.data.keywords(), **config.data_arguments}
    made: LoRADataModule = Component(config.data_target, keywords).build("data")
    return made


def load_data(config: RunConfig) -> tuple[LoRADataModule, Any]:
    """The DataModule with rows and tokens checked, and the tokenizer. Raises LorakitError with
    all problems of a step.
    """
    datamodule = build_datamodule(config)
    datamodule.check_rows()
    return datamodule, make_tokens(datamodule, config.model)


def make_tokens(datamodule: LoRADataModule, model: ModelSpec) -> Any:
    """Give ``datamodule`` the tokenizer of ``model``, and return it. Raises LorakitError."""
    tokenizer, model_config = model.load_tokenizer(), model.load_config()
    datamodule.set_tokenizer(
        tokenizer,
        load_images(model) if datamodule.has_images else None,
        image_token_id=getattr(model_config, "image_token_id", None),
        new_tokens=tokenizer.convert_tokens_to_ids(list(model.add_tokens or ())),
    )
    datamodule.check_tokens()
    return tokenizer


def check_new_tokens(datamodule: LoRADataModule, tokenizer: Any) -> None:
    """Raise ConfigError where no row has an added token; warn where only some were read."""
    report = datamodule.report
    assert report is not None
    if lost := [
        tokenizer.convert_ids_to_tokens(token)
        for token, count in report.num_new_tokens.items()
        if not count
    ]:
        said = (
            f"model.add_tokens: {', '.join(map(repr, lost))} in none of the"
            f" {report.num_rows_profiled:,} rows looked at"
        )
        if report.num_rows_profiled >= report.num_rows:
            raise ConfigError(
                f"{said}, so there is nothing to train; check the spelling, or leave it out"
            )
        log.warning("%s", said)


def load_images(model: ModelSpec) -> ImageEncoder:
    """What encodes images for ``model``. Raises ConfigError where it takes none."""
    if (processor := model.load_image_processor()) is None:
        raise ConfigError(f"model.path={model.path} is a model of text, but rows have images")
    return ImageEncoder(processor, model.load_config())


def resolve_total_steps(
    config: RunConfig, datamodule: LoRADataModule, world: World
) -> tuple[int, bool]:
    """Return (optimiser steps of the run, whether that is an estimate)."""
    max_steps, accumulate = config.trainer.max_steps, config.trainer.accumulate_grad_batches
    batches = datamodule.estimate_num_batches()
    if batches is None:
        if max_steps < 0:
            raise ConfigError(
                "data.epochs=null never ends; set trainer.max_steps, or data.epochs to a number"
            )
        return max_steps, False
    steps = math.ceil(batches / (accumulate * num_streams(config, world)))
    return (max_steps, False) if 0 <= max_steps <= steps else (steps, True)


def build_step_plan(
    config: RunConfig,
    skeleton: Any,
    planned: LoRAPlan,
    *,
    accelerator: str,
    precision: str,
    rows: SampleShapes | None = None,
    val_rows: SampleShapes | None = None,
) -> StepPlan:
    """The plan of a step's memory, with the optimiser of ``config``."""
    optimizer, _ = build_optimization(config, lr=1e-3, total_steps=1, precision=precision)
    return StepPlan(
        config,
        skeleton,
        planned,
        accelerator=accelerator,
        precision=precision,
        optimizer=optimizer,
        rows=rows,
        val_rows=val_rows,
    )


def build_module(
    config: RunConfig,
    spec: LoRASpec,
    *,
    lr: float,
    total_steps: int,
    tokenizer: Any,
    precision: str,
) -> LoRAModule:
    """The LoRAModule; its model is loaded when Lightning calls ``configure_model``."""
    optimizer, schedule = build_optimization(
        config, lr=lr, total_steps=total_steps, precision=precision
    )
    return LoRAModule(
        config.model,
        lora=spec,
        activation_checkpointing=config.trainer.activation_checkpointing,
        compile=config.trainer.compile,
        optimizer=optimizer,
        schedule=schedule,
        total_steps=total_steps,
        loss=build_loss(config.loss),
        clip_norm=config.clip_norm,
        max_bad_steps=config.trainer.max_bad_steps,
        tokenizer=tokenizer,
    )


def check_pairs(config: RunConfig, datamodule: LoRADataModule) -> None:
    """Raise ConfigError where rows and loss do not go together."""
    target, is_of_pairs = config.loss.target, config.is_of_pairs
    if is_of_pairs and not datamodule.are_pairs:
        formats = ", ".join(datamodule.source.formats)
        raise ConfigError(
            f"{target} is a loss of pairs, but these are rows of {formats}: give rows of chosen and"
            " rejected"
        )
    if datamodule.are_pairs and not is_of_pairs:
        raise ConfigError("rows of chosen and rejected need a loss of pairs: set loss=dpo")
    if is_of_pairs and config.sequence_parallel > 1:
        raise ConfigError(
            "pairs cannot be shared by several processes; set strategy.sequence_parallel=1"
        )


def build_trainer(
    config: RunConfig,
    folder: Path,
    *,
    precision: str,
    accelerator: str,
    total_steps: int,
    has_val: bool,
    world: World,
    retain: Retain | None = None,
    tries_longest: bool = False,
) -> L.Trainer:
    """Lightning's Trainer, with the callbacks and loggers of the config and of every run."""
    settings, accumulate = config.trainer, config.trainer.accumulate_grad_batches
    eval_every = settings.eval_every_steps or max(1, math.ceil(total_steps / 10))
    # first: a step has ended before other callbacks write or wait after it
    callbacks: list[L.Callback] = [PhaseCallback()]
    callbacks += [
        entry.build(f"callbacks.{name}")
        for name, entry in config.callbacks.items()
        if entry is not None
    ]
    callbacks += [
        PackingGuard(),
        *([MemoryProbe()] if tries_longest else []),
        SequenceParallel(),
        LastEvaluation(),
        RunHistory(folder),
        *([retain] if retain else []),
        AdapterCheckpoint(folder / "checkpoints", **vars(config.checkpoint)),
    ]
    callbacks += [StepProgress(total_steps)]
    strategy = build_strategy(config.strategy, precision=precision)
    # ZeRO brings its own. The type is Any: Lightning lists literals, and resolve_precision gives
    # one of them.
    accepted: Any = None if getattr(strategy, "_precision_plugin", None) is not None else precision
    return L.Trainer(
        default_root_dir=folder,
        accelerator=accelerator,
        devices=world.local_size,
        num_nodes=world.num_nodes,
        strategy=strategy,
        precision=accepted,
        # the user's limit itself: an estimate only shapes schedule and bar
        max_steps=settings.max_steps,
        max_epochs=1,  # the stream holds all epochs
        accumulate_grad_batches=accumulate,
        check_val_every_n_epoch=None,
        val_check_interval=eval_every * accumulate,
        limit_val_batches=None if has_val else 0,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_model_summary=False,
        log_every_n_steps=settings.log_every_n_steps,
        deterministic=settings.deterministic,
        use_distributed_sampler=False,
        logger=build_loggers(config.logger),
        callbacks=callbacks,
        # Said, not left to detection: in a job of SLURM Lightning would take over the signals, and
        # requeue by itself.
        plugins=[TorchElasticEnvironment() if "RANK" in os.environ else LightningEnvironment()],
    )


def build_retain_rows(config: RunConfig) -> LoRADataModule | None:
    """The rows of unrelated text, where the config names some; nothing read yet."""
    settings, rendering = config.eval, config.data.rendering
    if not settings.retain_path:
        return None
    return LoRADataModule(
        rows=RowSpec(path=settings.retain_path, check_token_rows=settings.retain_rows),
        rendering=dataclasses.replace(rendering, on_long=OnLong.TRUNCATE_RIGHT),
        batches=BatchSpec(batch_size=1, shuffle=False, window_rows=settings.retain_rows),
        images=config.data.images,
    )


def build_retain(config: RunConfig) -> Retain | None:
    """What measures the loss on unrelated text, where the config names some; its rows checked.
    Raises LorakitError.
    """
    if (datamodule := build_retain_rows(config)) is None:
        return None
    datamodule.check_rows()
    if datamodule.are_pairs:
        raise ConfigError(
            f"eval.retain_path={config.eval.retain_path}: pairs have no loss of their own;"
            " give rows of text"
        )
    make_tokens(datamodule, config.model)
    return Retain(datamodule, config.eval.retain_rows)


def build_loggers(components: Mapping[str, Component | None]) -> list[Any]:
    """The loggers."""
    loggers = []
    for name, entry in components.items():
        if entry is None:
            continue
        if entry.target.endswith(("WandbRun", "WandbLogger")):
            os.environ.setdefault("WANDB_SILENT", "true")
        loggers.append(entry.build(f"logger.{name}"))
        # wandb warns of it, and Lightning always passes it
        getattr(loggers[-1], "_wandb_init", {}).pop("anonymous", None)
    return loggers


def finish_loggers(loggers: list[Any]) -> list[str]:
    """Close what stays open after a run (W&B keeps one run per process until it is finished);
    return notes for the user.
    """
    if not any(
        kind.__name__ == "WandbLogger" for logger in loggers for kind in type(logger).__mro__
    ):
        return []
    import wandb

    notes = []
    if wandb.run is not None and wandb.run.offline:
        folders = sorted(
            Path(wandb.run.settings.sync_dir).parent.glob("*run-*"),
            key=lambda path: path.name.split("run-")[-1],
        )
        notes = [
            f"the W&B run is offline; upload it with: wandb sync {shlex.join(map(str, folders))}"
        ]
    wandb.finish()
    return notes


def check_disk(folder: Path, planned: LoRAPlan, *, keep_last: int, keep_best: int) -> None:
    """Refuse a run whose checkpoints will not fit: each holds adapter and two moments in
    float32, one more while it is written.
    """
    needed = planned.num_params * 4 * 3 * (keep_last + keep_best + 1) + planned.num_params * 2
    existing = next(path for path in (folder, *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(existing).free
    if free < needed:
        raise ConfigError(
            f"{existing}: {free / 1e9:.2f} GB free, but checkpoints need {needed / 1e9:.2f} GB; "
            "free some, set paths.runs to another disk, or lower checkpoint.keep_last"
        )


def resolve_devices(settings: TrainerSettings) -> tuple[str, str]:
    """Return (accelerator, precision) as Lightning names them."""
    accelerator = resolve_accelerator(settings.accelerator)
    return accelerator, resolve_precision(settings.precision, accelerator)


def build_strategy(strategy: Component, *, precision: str) -> Any:
    """The strategy; it is given ``precision`` where it has to know it."""
    target = strategy.imported("strategy")
    arguments = copy.deepcopy(dict(strategy.arguments))
    if "precision" in inspect.signature(target).parameters:
        arguments["precision"] = precision
    return target(**arguments)
