"""One run from a plain config: data, tokenizer, plan, disk, folder, weights, fit, adapter."""

from __future__ import annotations

import contextlib
import io
import itertools
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import lightning as L
import psutil
import torch
import yaml
from rich.console import Console

from lorakit.callbacks.adapter_checkpoint import AdapterCheckpoint
from lorakit.callbacks.throughput import Throughput
from lorakit.config.schema import RunConfig
from lorakit.errors import CheckpointError, ConfigError, LorakitError
from lorakit.lora.state import adapter_state
from lorakit.pipeline import build
from lorakit.pipeline.prepare import PreparedRun, prepare
from lorakit.pipeline.processes import (
    Place,
    check_world,
    describe_base,
    describe_config,
    describe_program,
    num_streams,
    resume_if_restarted,
    silence,
)
from lorakit.pipeline.result import RunResult, find_callback, print_result
from lorakit.pipeline.resume import choose_run, command_to_continue, fill_run_folder
from lorakit.planner.step_plan import agree_on_memory
from lorakit.runs.checkpoint import STATE_FILE, newest_whole, remove_behind
from lorakit.runs.files import whole_folder
from lorakit.runs.folder import History, Run, hold
from lorakit.strategy.heartbeat import FINISHED, PHASES
from lorakit.strategy.world import (
    World,
    all_gather_object,
    broadcast_object,
    check_equal_on_all_ranks,
    current_world,
    join,
    raise_on_any_rank,
)
from lorakit.sweep.pruning import Pruning
from lorakit.training.module import LoRAModule
from lorakit.weights.adapter import active_config, write_adapter

DEFAULT_THREADS = torch.get_num_threads()
_RUNS = itertools.count()  # of this process
# of ``run.json``, written when a run ends
FIGURES = ("step", "loss", "val_loss", "adapter_bytes", "tokens_per_second", "steps_since_start")


def train(
    config: RunConfig,
    *,
    experiment: str = "run",
    command: str = "",
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> RunResult:
    """Train as ``config`` says, in this process and those that were started with it, and return
    what came of it.

    Args:
        experiment, command, overrides: what ``run.json`` says of where the run comes from.
        console: prints what is done; None is standard output.

    Raises:
        LorakitError: the run cannot begin, or cannot continue.
    """
    # with the process, or with the job of a sweep
    began = time.time() if next(_RUNS) else psutil.Process().create_time()
    world, config = check_world(config), resume_if_restarted(config)
    place = _join(config, world)
    if not world.is_rank_zero:
        console = Console(file=io.StringIO())
    console = console or Console(soft_wrap=True)
    # of this job, not of the sweep's last one
    torch.set_num_threads(config.trainer.threads or DEFAULT_THREADS)
    prepared = raise_on_any_rank(lambda: prepare(config, place, experiment, console))
    check_equal_on_all_ranks(lambda: _facts_of_all(prepared))
    run, resumes = raise_on_any_rank(
        lambda: _open_run(config, prepared, experiment, command, list(overrides))
    )
    if resumes:
        run = run.update(command=command or run.info.get("command"))  # the latest one
        _share_window_of(run, prepared)
    with hold(run) if run.writes else contextlib.nullcontext():
        run = run.update(formats=prepared.datamodule.source.formats)
        if run.writes and prepared.datamodule.spec.rendering.chat_template:
            # its file may change, or go
            run.chat_template.write_text(prepared.tokenizer.chat_template, encoding="utf-8")
        about = " (about)" if prepared.is_estimate else ""
        console.print(
            f"run {run.folder}: {prepared.total_steps:,} steps{about},"
            f" {place.precision} on {place.accelerator}{_where(world)}"
        )
        module, trainer = _build(prepared, run)
        if throughput := find_callback(trainer, Throughput):
            throughput.began = began
        L.seed_everything((config.seed + world.rank) % 2**32, verbose=False)
        state, first_step = broadcast_object(
            _clear_for(run, resumes, console) if run.writes else (None, 0)
        )
        figures: dict[str, Any] = dict.fromkeys(FIGURES)
        run = run.update(status="running", total_steps=prepared.total_steps, **figures)
        notes = _fit(run, trainer, module, prepared, state)
        result = _finish(run, trainer, module, prepared, first_step)
        print_result(result, trainer, console, requeues=bool(config.launch.get("requeue")))
        for note in notes:
            console.print(note, markup=False)
        PHASES.enter(FINISHED)
        return result


def _join(config: RunConfig, world: World) -> Place:
    """Join the processes, and find out what each of them has."""
    accelerator, precision = build.resolve_devices(config.trainer)
    if world.size > 1:
        join(
            world,
            device=accelerator,
            timeout_seconds=config.launch.get("collective_timeout_seconds"),
            watched=True,
        )
        silence(world)
        check_equal_on_all_ranks(lambda: describe_program() | describe_config(config))
    memory_bytes = agree_on_memory(config.plan.memory_gb, accelerator, world)
    return Place(world, accelerator, precision, memory_bytes)


def _facts_of_all(prepared: PreparedRun) -> dict[str, str]:
    """What must be the same in all processes before a model is loaded."""
    return {
        "the rows": prepared.datamodule.fingerprint,
        "total steps": str(prepared.total_steps),
        "the strategy": str(prepared.config.strategy.to_dict()),
        **{f"{key}=auto": str(value) for key, value in prepared.resolved.items()},
        **describe_base(prepared.config.model),
    }


def _build(prepared: PreparedRun, run: Run) -> tuple[LoRAModule, L.Trainer]:
    config, place = _with_run_folder(prepared.config, run), prepared.place
    module = build.build_module(
        config,
        prepared.spec,
        lr=prepared.lr,
        total_steps=prepared.total_steps,
        tokenizer=prepared.tokenizer,
        precision=place.precision,
    )
    trainer = build.build_trainer(
        config,
        run.folder,
        precision=place.precision,
        accelerator=place.accelerator,
        total_steps=prepared.total_steps,
        has_val=len(prepared.datamodule.val_indices) > 0,
        world=place.world,
        retain=prepared.retain,
        tries_longest="data.tokens_per_batch" in prepared.resolved,
    )
    for logger in trainer.loggers:
        logger.log_hyperparams(config.to_dict())
    return module, trainer


def _where(world: World) -> str:
    """How many processes there are, and on which machines where these are several; the others
    say whom they follow.
    """
    hosts = list(dict.fromkeys(all_gather_object(socket.gethostname())))
    if len(hosts) > 1 and world.local_rank == 0 and not world.is_rank_zero:
        print(
            f"lorakit: {world.describe()} follows rank 0 on {hosts[0]}, which prints the progress",
            file=sys.stderr,
            flush=True,
        )
    job = f", job {number}" if (number := os.environ.get("SLURM_JOB_ID")) else ""
    processes = f", {world.size} processes" if world.size > 1 else ""
    return f"{processes} on {', '.join(hosts)}{job}" if len(hosts) > 1 else f"{processes}{job}"


def _open_run(
    config: RunConfig,
    prepared: PreparedRun,
    experiment: str,
    command: str,
    overrides: list[str],
) -> tuple[Run, bool]:
    """The run, chosen by rank 0 for all, and whether it continues. Raises LorakitError."""
    world, found, problem = current_world(), None, None
    if world.is_rank_zero:
        try:
            found = choose_run(
                config,
                experiment=experiment,
                data_fingerprint=prepared.datamodule.fingerprint,
                command=command,
                overrides=overrides,
                resolved=prepared.resolved,
                batches_per_step=prepared.config.trainer.accumulate_grad_batches
                * num_streams(prepared.config, world),
            )
        except (LorakitError, OSError) as error:
            problem = error
    found, problem = broadcast_object((found, problem))
    if problem is not None:
        raise problem
    assert found is not None
    run, resumes = found
    return Run(run.folder, run.info, writes=world.is_rank_zero), resumes


def _share_window_of(run: Run, prepared: PreparedRun) -> None:
    """Give each process its share of the micro-batches that the run has in a step, however many
    processes it began with.

    Raises:
        ConfigError: they cannot be shared out evenly, or another number is asked for.
    """
    config, world = prepared.config, prepared.place.world
    streams, accumulate = num_streams(config, world), config.trainer.accumulate_grad_batches
    key = "trainer.accumulate_grad_batches"
    then = (
        run.info.get("resolved", {}).get(key)
        or yaml.safe_load(run.config_text())["trainer"]["accumulate_grad_batches"]
    )
    wanted = run.info.get("batches_per_step", then)
    if accumulate not in (then, wanted / streams):
        raise ConfigError(
            f"{run.folder} cannot be continued with trainer.accumulate_grad_batches={accumulate} in"
            f" {world.size} processes: it has {wanted} micro-batches in a step; leave the setting"
            f" at {then}, and each process gets its share"
        )
    if wanted % streams:
        parts = world.size // streams
        fitting = [str(size * parts) for size in range(1, wanted + 1) if wanted % size == 0]
        raise ConfigError(
            f"{run.folder} has {wanted} micro-batches in a step, which {world.size} processes"
            f" cannot share evenly; continue with {', '.join(fitting)}"
        )
    if wanted == accumulate * streams:
        return
    prepared.console.print(
        f"trainer.accumulate_grad_batches={wanted // streams}: the run has {wanted} micro-batches"
        " in a step"
    )
    prepared.config = config.with_values({key: wanted // streams})
    prepared.total_steps, prepared.is_estimate = build.resolve_total_steps(
        prepared.config, prepared.datamodule, world
    )


def _fit(
    run: Run,
    trainer: L.Trainer,
    module: LoRAModule,
    prepared: PreparedRun,
    state: Path | None,
) -> list[str]:
    """Train from ``state`` on, and return what the loggers say at the end."""
    try:
        trainer.fit(
            module,
            datamodule=prepared.datamodule,
            ckpt_path=state,
            weights_only=True if state else None,
        )
    except BaseException as error:  # Ctrl-C, too: the folder says how the run ended
        with contextlib.suppress(OSError):  # a full disk may be what ended the run
            run.update(status="failed", error=f"{type(error).__name__}: {error}"[:500])
        if isinstance(error, OSError):
            where = f"{error.filename}: " if error.filename else ""
            raise CheckpointError(
                f"{where}{error.strerror or error}; the last good checkpoint in {run.checkpoints}"
                f" is still valid: fix the cause and continue with: {command_to_continue(run)}"
            ) from error
        raise
    finally:
        notes = build.finish_loggers(trainer.loggers)
    return notes


def _finish(
    run: Run, trainer: L.Trainer, module: LoRAModule, prepared: PreparedRun, first_step: int
) -> RunResult:
    """Write the adapter, and the figures into ``run.json``."""
    # A run that continues after its last step has computed nothing: its figures are those that it
    # has written down.
    metrics = {
        name: value for record in History(run.folder).read() for name, value in record.items()
    }
    metrics |= {name: float(value) for name, value in trainer.callback_metrics.items()}
    interrupt = _checkpoints_of(trainer).interrupt
    tensors, adapter_bytes = adapter_state(module.model), 0
    if run.writes:
        with whole_folder(run.adapter) as aside:
            adapter_bytes = write_adapter(
                tensors, active_config(module.model), aside, dtype=torch.bfloat16
            )
            if prepared.config.model.add_tokens:
                prepared.tokenizer.save_pretrained(aside)
    datamodule = prepared.datamodule
    throughput, pruning = find_callback(trainer, Throughput), find_callback(trainer, Pruning)
    run = run.update(
        status="interrupted" if interrupt else "finished",
        pruned=bool(pruning and pruning.is_pruned),
        step=trainer.global_step,
        steps_since_start=trainer.global_step - first_step,
        loss=metrics.get("train/loss"),
        val_loss=metrics.get("val/loss"),
        adapter_bytes=adapter_bytes,
        first_step_seconds=throughput and throughput.first_step_seconds,
        tokens_per_second=throughput and throughput.tokens_per_second,
        bad_steps=module.num_bad_steps,
        empty_windows=module.num_empty_windows,
        cuts=vars(datamodule.train_examples.cuts),
        skipped_rows=datamodule.train_examples.num_skipped + datamodule.source.num_skipped,
    )
    return RunResult(
        run,
        module,
        datamodule,
        prepared.plan,
        metrics,
        seconds=throughput.seconds if throughput else 0.0,
        first_step_seconds=throughput.first_step_seconds if throughput else None,
        tokens_per_second=throughput.tokens_per_second if throughput else 0.0,
        adapter_bytes=adapter_bytes,
        interrupt=interrupt,
    )


def _clear_for(run: Run, resumes: bool, console: Console) -> tuple[Path | None, int]:
    """Return the training state to continue from, or None, and its step; remove what an
    interruption has left after it.
    """
    checkpoint = (
        newest_whole(run.checkpoints, lambda text: console.print(text)) if resumes else None
    )
    if resumes:
        console.print(
            f"resuming from step {checkpoint.step}"
            if checkpoint
            else "no checkpoint yet: starting from step 0"
        )
        remove_behind(run.checkpoints, checkpoint.step if checkpoint else 0)
    # of an interruption; what a killed run has is its checkpoints
    shutil.rmtree(run.adapter, ignore_errors=True)
    return (checkpoint.folder / STATE_FILE, checkpoint.step) if checkpoint else (None, 0)


def _checkpoints_of(trainer: L.Trainer) -> AdapterCheckpoint:
    found = find_callback(trainer, AdapterCheckpoint)
    assert found is not None  # build_trainer gives every run one
    return found


def _with_run_folder(config: RunConfig, run: Run) -> RunConfig:
    """The config with ``${paths.run}`` filled in, and the run's name where a logger has none."""
    changes: dict[str, Any] = {}
    for group, node in config.to_dict().items():
        for name, value in node.items() if isinstance(node, dict) else ():
            is_component = group in ("callbacks", "logger") and value is not None
            for key, given in value.items() if is_component else [("", value)]:
                filled = fill_run_folder(given, run.folder)
                if group == "logger" and key == "name" and given is None:
                    filled = run.name
                if filled != given:
                    changes[f"{group}.{name}.{key}".rstrip(".")] = filled
    return config.with_values(changes)
