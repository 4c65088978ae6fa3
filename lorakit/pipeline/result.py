"""What a run returns, and the lines that it prints when it ends."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any, TypeVar

import lightning as L
from rich.console import Console

from lorakit.callbacks.history import describe_curve
from lorakit.callbacks.retain import Retain
from lorakit.callbacks.samples import Samples
from lorakit.callbacks.throughput import Throughput
from lorakit.data.datamodule import LoRADataModule
from lorakit.lora.plan import LoRAPlan
from lorakit.pipeline.printing import prompt_to_try
from lorakit.pipeline.resume import command_to_continue
from lorakit.quoting import quote_for_shell
from lorakit.runs.folder import Run
from lorakit.training.module import LoRAModule

LONG_SECONDS = 60.0  # a wait that is worth a hint
Found = TypeVar("Found", bound=L.Callback)


@dataclass(frozen=True)
class RunResult:
    """What a run returns."""

    run: Run
    module: LoRAModule
    datamodule: LoRADataModule
    plan: LoRAPlan
    metrics: dict[str, float]  # the last value of each
    seconds: float
    first_step_seconds: float | None
    tokens_per_second: float
    adapter_bytes: int
    interrupt: int | None  # the signal that ended it before its last step


def find_callback(trainer: Any, kind: type[Found]) -> Found | None:
    """Return the trainer's callback of ``kind``, or None."""
    return next((callback for callback in trainer.callbacks if isinstance(callback, kind)), None)


def print_result(
    result: RunResult, trainer: L.Trainer, console: Console, *, requeues: bool
) -> None:
    """Print figures, what was skipped, files, and what to type next."""
    run, metrics, num_steps = result.run, result.metrics, trainer.global_step
    figures = [f"loss {metrics['train/loss']:.4f}"] if "train/loss" in metrics else []
    figures += [f"held out {metrics['val/loss']:.4f}"] if "val/loss" in metrics else []
    figures += [f"{result.tokens_per_second:,.0f} tokens/s"] if result.tokens_per_second else []
    state = "pruned after" if run.info["pruned"] else "finished"
    state = "interrupted after" if result.interrupt else state
    seconds = result.first_step_seconds
    first = f", the first {seconds:.1f} s after the start" if seconds else ""
    made = run.info["steps_since_start"]
    here = "" if made == num_steps else f", {made:,} of them now,"
    console.print(
        f"{state} {num_steps:,} steps{here} in {result.seconds:.1f} s{first}: {', '.join(figures)}"
    )
    _print_time(
        find_callback(trainer, Throughput),
        console,
        samples=find_callback(trainer, Samples) is not None,
    )
    _print_skipped(result, console)
    if retain := find_callback(trainer, Retain):
        console.print(
            f"unrelated text {retain.datamodule.spec.rows.title}: loss {retain.base_loss:.4f}"
            f" before, {retain.loss:.4f} after ({retain.loss - retain.base_loss:+.4f})",
            highlight=False,
        )
    console.print(
        f"adapter {run.adapter}: {result.adapter_bytes / 1e6:.2f} MB in bf16"
        f" ({result.plan.num_params * 4 / 1e6:.2f} MB in checkpoints)"
    )
    console.print(describe_curve(run.folder), markup=False)
    if result.interrupt:
        if requeues:
            console.print("SLURM queues an interrupted job again by itself; to do it by hand:")
        console.print(f"continue with: {command_to_continue(run)}", markup=False)
        return
    name = quote_for_shell(run.name)
    prompt = quote_for_shell(prompt_to_try(result.datamodule) or "your prompt")
    console.print(
        f"next: lorakit sample {name} -- {prompt}    or: lorakit merge {name}",
        markup=False,
        highlight=False,
    )


def _print_skipped(result: RunResult, console: Console) -> None:
    """Print which steps, tokens and rows were left out."""
    module, examples = result.module, result.datamodule.train_examples
    if module.num_bad_steps or module.num_empty_windows:
        console.print(
            f"skipped: {module.num_bad_steps} steps not finite, {module.num_empty_windows} windows"
            " without a weight"
        )
    cuts = examples.cuts
    if any(vars(cuts).values()):
        console.print(
            f"cut while training, over all epochs: {cuts.num_dropped:,} examples dropped,"
            f" {cuts.num_truncated:,} truncated by {cuts.num_tokens_cut:,} tokens"
        )
    if examples.num_skipped:
        console.print(f"rows skipped while training, over all epochs: {examples.num_skipped:,}")


def _print_time(throughput: Throughput | None, console: Console, *, samples: bool) -> None:
    """Say what else took time, and what would make it less where evaluations took a third of a
    run that was waited for.
    """
    if throughput is None or not throughput.num_evaluations:
        return
    total, evaluations = time.time() - throughput.began, throughput.evaluation_seconds
    count = (
        f"{throughput.num_evaluations} evaluation{'s' if throughput.num_evaluations > 1 else ''}"
    )
    with_samples = " with samples" if samples else ""
    console.print(
        f"in all {total:.1f} s, of which {evaluations:.1f} s for {count}{with_samples}",
        highlight=False,
    )
    if evaluations > total / 3 and total > LONG_SECONDS:
        keys = ["trainer.eval_every_steps=… (default: a tenth of the run)", "data.val_rows=…"]
        keys += ["callbacks.samples.max_tokens=…", "callbacks.samples=null"] if samples else []
        console.print(
            f"fewer or shorter evaluations: {', '.join(keys)}", highlight=False, markup=False
        )
