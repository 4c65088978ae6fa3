"""What the commands print about data."""

from __future__ import annotations

import logging
from typing import Any

from rich.console import Console
from rich.table import Table

from lorakit.config.schema import RunConfig
from lorakit.data.datamodule import LoRADataModule
from lorakit.data.examples import DatasetReport
from lorakit.data.read.columns import explain_unused
from lorakit.data.read.rows import Chat, PromptCompletion

log = logging.getLogger("lorakit")
PROMPT_CHARACTERS = 120  # a longer one is not typed


def print_data_report(
    datamodule: LoRADataModule, console: Console, *, histogram: bool = False
) -> None:
    """Print the figures of the training rows, and of the evaluation rows where there are any."""
    assert datamodule.report is not None
    _print_one("data", datamodule.spec.rows.title, datamodule.report, console)
    _print_shares(datamodule.report, console)
    if datamodule.val_report:
        _print_one(
            "held out",
            datamodule.spec.rows.val_path or f"{datamodule.spec.rows.val_fraction:g} of them",
            datamodule.val_report,
            console,
        )
    for line in warnings_of(datamodule.report, datamodule):
        console.print(f"[yellow]warning[/yellow]: {line}", highlight=False)
    if histogram:
        console.print(_histogram(datamodule.report))


def _print_one(label: str, where: str, report: DatasetReport, console: Console) -> None:
    is_part = report.num_rows_profiled < report.num_rows
    scope = f" (figures from the first {report.num_rows_profiled:,})" if is_part else ""
    images = (
        f", {report.num_images:,} images of {report.num_image_tokens:,} tokens"
        if report.num_images
        else ""
    )
    console.print(
        f"{label}: {where}: {report.num_rows:,} rows ({', '.join(report.formats)}){scope},"
        f" {report.num_examples:,} examples, {report.num_tokens:,} tokens,"
        f" {report.trained_share:.1%} trained, longest {int(report.lengths.max()):,}{images}",
        markup=False,
        highlight=False,
    )
    cuts = report.cuts
    taken = []
    if report.num_rows_skipped:
        taken.append(
            f"{report.num_rows_skipped:,} rows skipped (data.on_error=skip), the first:"
            f" {report.first_skipped}"
        )
    if cuts.num_dropped:
        taken.append(f"{cuts.num_dropped:,} examples dropped as too long")
    if cuts.num_truncated:
        taken.append(f"{cuts.num_truncated:,} examples truncated by {cuts.num_tokens_cut:,} tokens")
    if taken:
        console.print(f"  {', '.join(taken)}", markup=False, highlight=False)
    if report.unused_columns:
        console.print(
            f"  columns not used: {', '.join(report.unused_columns)}", markup=False, highlight=False
        )


def _print_shares(report: DatasetReport, console: Console) -> None:
    """What each source gives to training."""
    total = sum(share.trained_per_epoch for share in report.shares.values()) or 1.0
    for name, share in report.shares.items():
        console.print(
            f"  {name}: {share.num_rows:,} rows, {share.weight:g} times an epoch,"
            f" {share.trained_per_epoch / total:.1%} of the trained tokens",
            markup=False,
            highlight=False,
        )


def warnings_of(report: DatasetReport, datamodule: LoRADataModule) -> list[str]:
    """What about the data is likely not meant so."""
    found = []
    if report.num_without_stop:
        share = report.num_without_stop / report.num_examples
        found.append(
            f"in {share:.0%} of the examples no stop token is trained, so samples may not end; "
            "see data.append_eos and data.stop"
        )
    if report.num_empty_answers:
        found.append(
            f"{report.num_empty_answers:,} of the answers that are trained are empty, so the model"
            f" learns to say nothing; the first: {report.first_empty_answer}"
        )
    for column, format in report.unused_columns.items():
        if reason := explain_unused(column, format):
            found.append(f"the column `{column}` is not used by the format {format}: {reason}")
    return found


def prompt_to_try(datamodule: LoRADataModule) -> str | None:
    """What comes before the first answer to evaluate, or to train, as one types it; None where
    that is long or not text.
    """
    has_val = len(datamodule.val_indices) > 0
    source, indices = (
        (datamodule.val_source, datamodule.val_indices)
        if has_val
        else (datamodule.source, datamodule.train_indices)
    )
    row = source.row(int(indices[0]))
    text: Any = row.prompt if isinstance(row, PromptCompletion) else None
    if isinstance(row, Chat):
        text = next((message.content for message in row.messages if message.role == "user"), None)
    return text if isinstance(text, str) and 0 < len(text) <= PROMPT_CHARACTERS else None


def warn_of_idle_settings(config: RunConfig, datamodule: LoRADataModule, total_steps: int) -> None:
    """Say which settings have no effect on this data."""
    max_steps = config.trainer.max_steps
    if max_steps > total_steps:
        log.warning(
            "trainer.max_steps=%d will not be reached: data.epochs=%s ends after about %d steps;"
            " data.epochs=null continues until then",
            max_steps,
            config.data.batches.epochs,
            total_steps,
        )
    if not datamodule.has_images and (
        datamodule.spec.images.min_pixels or datamodule.spec.images.max_pixels
    ):
        log.warning("no row has an image, so data.min_pixels and data.max_pixels have no effect")
    if len(datamodule.val_indices):
        return
    keys = ("data.val_rows", "data.val_batch_size", "trainer.eval_every_steps")
    spec = config.data
    values = dict(
        zip(
            keys,
            (spec.rows.val_rows, spec.batches.val_batch_size, config.trainer.eval_every_steps),
            strict=True,
        )
    )
    if idle := [f"{key}={value}" for key, value in values.items() if value is not None]:
        log.warning(
            "no rows are held out, so %s has no effect; see data.val_path and data.val_fraction",
            ", ".join(idle),
        )


def _histogram(report: DatasetReport) -> Table:
    table = Table(title="tokens per example", title_justify="left", box=None, show_header=False)
    bins = report.histogram()
    largest = max(count for *_, count in bins)
    for start, end, count in bins:
        table.add_row(
            f"{start:,}–{end:,}",
            "█" * max(int(count > 0), round(40 * count / largest)),
            f"{count:,}",
        )
    return table
