"""One run from a plain config: data, tokenizer, plan, disk, folder, weights, fit, adapter."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import shlex
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import lightning as L
import torch
from rich.console import Console

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.callbacks.throughput import Throughput
from lorakit.cli import assemble
from lorakit.cli.reports import print_data_report, warn_of_idle_settings
from lorakit.cli.resume import choose_run, fill_run_folder, find_run_to_resume
from lorakit.cli.schema import check_settings
from lorakit.data.datamodule import LoRADataModule
from lorakit.errors import CheckpointError, ConfigError
from lorakit.lora.inject import LoRAPlan, plan
from lorakit.lora.spec import LoRASpec
from lorakit.model.families import packing_is_doubtful
from lorakit.model.load import base_name, load_config, load_skeleton
from lorakit.training.module import LoRAModule
from lorakit.training.optim import LR_SOURCE, auto_lr
from lorakit.weights.adapter import open_init, save_adapter
from lorakit.weights.checkpoint import STATE_FILE, newest_whole, remove_behind
from lorakit.weights.files import find_write_problem, whole_folder
from lorakit.weights.run import History, Run, hold

log = logging.getLogger("lorakit")
DEFAULT_THREADS = torch.get_num_threads()
SMALL_MODEL_PARAMS = 100_000_000
Found = TypeVar("Found", bound=L.Callback)


@dataclass(frozen=True)
class Outcome:
    """What a run leaves behind."""

    run: Run
    module: LoRAModule
    datamodule: LoRADataModule
    plan: LoRAPlan
    seconds: float
    tokens_per_second: float
    adapter_bytes: int
    interrupt: int | None  # the signal that ended it before its last step


def train_run(
    config: dict[str, Any], *, experiment: str, command: str = "", overrides: Sequence[str] = (), console: Console | None = None
) -> Outcome:
    """Train as the resolved ``config`` says and return what came of it. Raises LorakitError."""
    console = console or Console(soft_wrap=True)
    check_settings(config)
    root, kept = Path(config["paths"]["runs"]).expanduser(), config["checkpoint"]
    if problem := find_write_problem(root / "a run"):
        raise ConfigError(f"paths.runs={root} cannot be used: {problem}")
    find_run_to_resume(config, root, experiment)  # a name that is taken is told before anything is read
    torch.set_num_threads(config["trainer"]["threads"] or DEFAULT_THREADS)  # of this job, not of the sweep's last one
    datamodule, tokenizer = assemble.load_data(config)
    print_data_report(datamodule, console)
    spec, model_config, planned = _plan(config, console)
    accelerator, precision = assemble.resolve_devices(config)
    if datamodule.packing and (reason := packing_is_doubtful(model_config)):
        log.warning("data.packing is off, rows are padded instead: %s", reason)
        datamodule.packing = False
    if accelerator == "cpu" and planned.num_base_params < SMALL_MODEL_PARAMS:
        keep_freed_memory()
    lr = _resolve_lr(config, model_config, spec, console)
    total_steps, is_estimate = assemble.resolve_total_steps(config, datamodule)
    warn_of_idle_settings(config, datamodule, total_steps)
    assemble.build_optimization(
        config, lr=lr, total_steps=total_steps, precision=precision
    )  # refuses bad settings before there is a folder
    stops_early = any(entry and entry["_target_"].endswith("EarlyStopping") for entry in config["callbacks"].values())
    if stops_early and not len(datamodule.val_indices):
        raise ConfigError("callbacks.early_stopping needs rows to evaluate on; set data.val_path or data.val_fraction")
    assemble.check_disk(root, planned, keep_last=kept["keep_last"], keep_best=kept["keep_best"])
    run, resumes = choose_run(
        config, root, experiment=experiment, data_fingerprint=datamodule.fingerprint, command=command, overrides=list(overrides),
        resolved={"trainer.accelerator": accelerator, "trainer.precision": precision, "optim.lr": lr},
    )  # fmt: skip
    lock = hold(run)
    run = run.update(formats=datamodule.source.formats)
    console.print(
        f"run {run.folder}: {total_steps:,}{' steps (about)' if is_estimate else ' steps'}, {precision} on {accelerator}"
    )
    config = _with_run_folder(config, run)
    module = assemble.build_module(
        config, spec, lr=lr, total_steps=total_steps, tokenizer=tokenizer, device=accelerator, precision=precision
    )
    trainer = assemble.build_trainer(
        config, run.folder, precision=precision, accelerator=accelerator, total_steps=total_steps,
        has_val=len(datamodule.val_indices) > 0,
    )  # fmt: skip
    for logger in trainer.loggers:
        logger.log_hyperparams(config)
    L.seed_everything(config["seed"], verbose=False)
    with lock:
        return _fit(run, trainer, module, datamodule, planned, resumes=resumes, total_steps=total_steps, console=console)


def _plan(config: dict[str, Any], console: Console) -> tuple[LoRASpec, Any, LoRAPlan]:
    spec, settings = assemble.build_spec(config), config["model"]
    options = {"revision": settings["revision"], "trust_remote_code": settings["trust_remote_code"]}
    model_config = load_config(settings["path"], **options)
    if spec.init_from:
        open_init(spec, base=base_name(settings["path"]))
    planned = plan(load_skeleton(settings["path"], **options), spec)
    console.print(planned.table())
    if planned.note:
        console.print(planned.note, highlight=False)
    console.print(planned.summary())
    return spec, model_config, planned


def _resolve_lr(config: dict[str, Any], model_config: Any, spec: LoRASpec, console: Console) -> float:
    lr = config["optim"]["lr"]
    if lr != "auto":
        return float(lr)
    lr = auto_lr(model_config, spec)
    console.print(f"optim.lr=auto: {lr:.3g} ({LR_SOURCE})")
    return lr


def _fit(
    run: Run, trainer: L.Trainer, module: LoRAModule, datamodule: LoRADataModule, planned: LoRAPlan, *, resumes: bool,
    total_steps: int, console: Console,
) -> Outcome:  # fmt: skip
    checkpoint = newest_whole(run.checkpoints, lambda text: console.print(text)) if resumes else None
    if resumes:
        console.print(f"resuming from step {checkpoint.step}" if checkpoint else "no checkpoint yet: starting from step 0")
        remove_behind(run.checkpoints, checkpoint.step if checkpoint else 0)
    state = checkpoint.folder / STATE_FILE if checkpoint else None
    shutil.rmtree(run.adapter, ignore_errors=True)  # of an interruption; what a killed run has is its checkpoints
    figures: dict[str, Any] = dict.fromkeys(("step", "loss", "val_loss", "adapter_bytes"))
    run = run.update(status="running", total_steps=total_steps, **figures)
    try:
        trainer.fit(module, datamodule=datamodule, ckpt_path=state, weights_only=True if state else None)
        metrics = _final_metrics(trainer, module, datamodule, run)
    except BaseException as error:
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            run.update(status="failed", error=f"{type(error).__name__}: {error}"[:500])
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            raise CheckpointError(
                f"{where}{error.strerror or error}; the last good checkpoint in {run.checkpoints} stays in force: "
                f"mend the cause and go on with run={run.name} resume=true"
            ) from error
        raise
    finally:
        notes = assemble.finish_loggers(trainer.loggers)
    interrupt = _checkpoints_of(trainer).interrupt
    with whole_folder(run.adapter) as aside:
        adapter_bytes = save_adapter(module.model, aside, dtype=torch.bfloat16)
    throughput = _find_callback(trainer, Throughput)
    run = run.update(
        status="interrupted" if interrupt else "finished",
        step=trainer.global_step,
        loss=metrics.get("train/loss"),
        val_loss=metrics.get("val/loss"),
        adapter_bytes=adapter_bytes,
        bad_steps=module.num_bad_steps,
        empty_windows=module.num_empty_windows,
        cuts=vars(datamodule.train_examples.cuts),
        skipped_rows=datamodule.train_examples.num_skipped + datamodule.source.num_skipped,
    )
    outcome = Outcome(
        run, module, datamodule, planned, throughput.seconds if throughput else 0.0,
        throughput.tokens_per_second if throughput else 0.0, adapter_bytes, interrupt,
    )  # fmt: skip
    _print_end(outcome, trainer, metrics, console)
    for note in notes:
        console.print(note, markup=False)
    return outcome


def _final_metrics(trainer: L.Trainer, module: LoRAModule, datamodule: LoRADataModule, run: Run) -> dict[str, float]:
    """The metrics at the end; the last step is evaluated where that was not due."""
    metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
    checkpoints = _checkpoints_of(trainer)
    if len(datamodule.val_indices) and not checkpoints.interrupt and checkpoints.validated_step != trainer.global_step:
        step = trainer.global_step
        (found,) = trainer.validate(module, datamodule=datamodule, verbose=False)
        metrics["val/loss"] = float(found["val/loss"])
        History(run.folder).append({"step": step, "val/loss": metrics["val/loss"]})
    return metrics


def _checkpoints_of(trainer: L.Trainer) -> AdapterCheckpoint:
    found = _find_callback(trainer, AdapterCheckpoint)
    assert found is not None  # build_trainer gives every run one
    return found


def _find_callback(trainer: Any, kind: type[Found]) -> Found | None:
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def _print_end(outcome: Outcome, trainer: L.Trainer, metrics: dict[str, float], console: Console) -> None:
    run, module = outcome.run, outcome.module
    figures = [f"loss {metrics['train/loss']:.4f}"] if "train/loss" in metrics else []
    figures += [f"held out {metrics['val/loss']:.4f}"] if "val/loss" in metrics else []
    figures += [f"{outcome.tokens_per_second:,.0f} tokens/s"] if outcome.tokens_per_second else []
    state = "interrupted after" if outcome.interrupt else "finished"
    console.print(f"{state} {trainer.global_step:,} steps in {outcome.seconds:.1f} s: {', '.join(figures)}")
    if module.num_bad_steps or module.num_empty_windows:
        console.print(f"skipped: {module.num_bad_steps} steps not finite, {module.num_empty_windows} windows without a weight")
    cuts = vars(outcome.datamodule.train_examples.cuts)
    if any(cuts.values()):
        console.print(
            f"cut while training, over all epochs: {cuts['num_dropped']:,} examples dropped, {cuts['num_truncated']:,} truncated "
            f"by {cuts['num_tokens_cut']:,} tokens"
        )
    if skipped := outcome.datamodule.train_examples.num_skipped:
        console.print(f"rows skipped while training, over all epochs: {skipped:,}")
    fp32_bytes = outcome.plan.num_params * 4
    console.print(
        f"adapter {run.adapter}: {outcome.adapter_bytes / 1e6:.2f} MB in bf16 ({fp32_bytes / 1e6:.2f} MB in checkpoints)"
    )
    console.print(f"loss curve {run.folder / 'loss.png'}")
    name = shlex.quote(run.name)
    if outcome.interrupt:
        console.print(f"continue with: the same command and run={name} resume=true", markup=False)
    else:
        console.print(f"next: lorakit sample {name} -- 'your prompt'    or: lorakit merge {name}", markup=False)


def _with_run_folder(config: dict[str, Any], run: Run) -> dict[str, Any]:
    """The config with ``${paths.run}`` filled in, and the run's name where a logger has none."""
    filled = fill_run_folder(config, run.folder)
    for entry in filled["logger"].values():
        if entry and "name" in entry and entry["name"] is None:
            entry["name"] = run.name
    return filled


def keep_freed_memory() -> None:
    """Let the C library keep what a step frees for the next: a small model on the CPU spends a tenth of its time on that."""
    if sys.platform == "linux" and "MALLOC_TRIM_THRESHOLD_" not in os.environ:
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD
