"""What the commands print about data."""

from __future__ import annotations

from rich.console import Console
from rich.table import Table

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.examples import DataReport


def print_data_report(datamodule: LoRADataModule, console: Console, *, histogram: bool = False) -> None:
    """Print the figures of the training rows, and of the evaluation rows where there are any."""
    assert datamodule.report is not None
    _print_one("data", datamodule.path, datamodule.report, console)
    if datamodule.val_report:
        _print_one("held out", datamodule.val_path or f"{datamodule.val_fraction:g} of them", datamodule.val_report, console)
    for line in warnings_of(datamodule.report, datamodule):
        console.print(f"[yellow]warning[/yellow]: {line}", highlight=False)
    if histogram:
        console.print(_histogram(datamodule.report))


def _print_one(label: str, where: str, report: DataReport, console: Console) -> None:
    is_part = report.num_rows_surveyed < report.num_rows
    scope = f" (figures from the first {report.num_rows_surveyed:,})" if is_part else ""
    console.print(
        f"{label}: {where}: {report.num_rows:,} rows ({', '.join(report.formats)}){scope}, {report.num_examples:,} examples, "
        f"{report.num_tokens:,} tokens, {report.trained_share:.1%} trained, longest {int(report.lengths.max()):,}",
        markup=False,
        highlight=False,
    )
    cuts = report.cuts
    taken = []
    if report.num_rows_skipped:
        taken.append(f"{report.num_rows_skipped:,} rows skipped (data.on_error=skip)")
    if cuts.num_dropped:
        taken.append(f"{cuts.num_dropped:,} examples dropped as too long")
    if cuts.num_truncated:
        taken.append(f"{cuts.num_truncated:,} examples truncated by {cuts.num_tokens_cut:,} tokens")
    if taken:
        console.print(f"  {', '.join(taken)}", highlight=False)


def warnings_of(report: DataReport, datamodule: LoRADataModule) -> list[str]:
    """What about the data is likely not meant so."""
    found = []
    if report.num_without_stop:
        share = report.num_without_stop / report.num_examples
        found.append(
            f"in {share:.0%} of the examples no stop token is trained, so samples may not end; "
            "see data.append_eos and data.stop"
        )
    return found


def _histogram(report: DataReport) -> Table:
    table = Table(title="tokens per example", title_justify="left", box=None, show_header=False)
    bins = report.histogram()
    largest = max(count for *_, count in bins)
    for start, end, count in bins:
        table.add_row(f"{start:,}–{end:,}", "█" * max(int(count > 0), round(40 * count / largest)), f"{count:,}")
    return table
