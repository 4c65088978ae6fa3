"""``lorakit runs``: a table of the runs with base, steps, loss and adapter size."""

from __future__ import annotations

import argparse
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.weights.run import History, Run, list_runs


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(prog="lorakit runs", description="List the runs, oldest first.")
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.table import Table

    runs = list_runs(Path(options.runs))
    if not runs:
        print(f"no runs in {Path(options.runs).resolve()}")
        return
    table = Table(box=None)
    for column in ("run", "state", "base", "steps", "loss", "held out", "adapter MB"):
        table.add_column(column, justify="right" if column in ("steps", "loss", "held out", "adapter MB") else "left")
    for run in runs:
        table.add_row(*_row(run))
    Console(soft_wrap=True).print(table)


def _row(run: Run) -> tuple[str, ...]:
    info = run.info
    step, loss = info.get("step"), info.get("loss")
    if step is None:  # still running, or killed: the history knows
        records = [record for record in History(run.folder).read() if "train/loss" in record]
        step, loss = (records[-1]["step"], records[-1]["train/loss"]) if records else (0, None)
    size = info.get("adapter_bytes")
    return (
        run.name,
        str(info.get("status", "?")),
        str(info.get("base", "?")),
        f"{step:,}/{info['total_steps']:,}" if info.get("total_steps") else f"{step:,}",
        "" if loss is None else f"{loss:.4f}",
        "" if info.get("val_loss") is None else f"{info['val_loss']:.4f}",
        "" if size is None else f"{size / 1e6:.2f}",
    )


if __name__ == "__main__":
    run_command(main)
