"""``lorakit runs``: a table of the runs with base, steps, loss and adapter size."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from lorakit.cli.guard import run_command
from lorakit.errors import ConfigError
from lorakit.runs.folder import Run, list_runs


def main(arguments: list[str]) -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(
        prog="lorakit runs", description="List the runs, oldest first."
    )
    parser.add_argument("--runs", help="folder of the runs (default: runs, in the current folder)")
    options = parser.parse_args(arguments)
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    root = Path(options.runs or "runs").expanduser()
    if options.runs and not root.is_dir():
        raise ConfigError(f"--runs {options.runs}: no such folder")
    runs = list_runs(root)
    if not runs:
        print(f"no runs in {root.resolve()}")
        return
    table = Table(box=None)
    for column in ("run", "state", "base", "steps", "loss", "held out", "adapter MB", "settings"):
        table.add_column(
            column,
            justify="right" if column in ("steps", "loss", "held out", "adapter MB") else "left",
        )
    common = set.intersection(*(_overrides(run) for run in runs))
    for run in runs:
        table.add_row(
            *(Text(cell) for cell in _row(run)),
            Text(" ".join(sorted(_overrides(run) - common)), overflow="fold"),
        )
    is_terminal = sys.stdout.isatty()
    # a line for each run where it goes into a pipe
    Console(width=None if is_terminal else 1000).print(table)


def _row(run: Run) -> tuple[str, ...]:
    info = run.info
    step, loss = run.last_step
    size = info.get("adapter_bytes")
    return (
        run.name,
        run.state,
        str(info.get("base", "?")),
        f"{step:,}/{info['total_steps']:,}" if info.get("total_steps") else f"{step:,}",
        "" if loss is None else f"{loss:.4f}",
        "" if info.get("val_loss") is None else f"{info['val_loss']:.4f}",
        "" if size is None else f"{size / 1e6:.2f}",
    )


def _overrides(run: Run) -> set[str]:
    """What was typed for ``run``, without what all runs have in common."""
    return {
        text
        for text in run.info.get("overrides", ())
        if not text.startswith(("run=", "resume=", "paths.runs=", "launch"))
    }


if __name__ == "__main__":
    run_command(main)
