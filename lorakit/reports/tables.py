"""Tables in a terminal: runs beside one another, figures of an evaluation."""

from __future__ import annotations

import sys
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from lorakit.reports.comparison import Comparison, shown, sparkline


def print_comparison(comparison: Comparison, *, is_sweep: bool) -> None:
    """Print a line for each run, and what failed; into a file or a pipe without wrapping."""
    console = Console(width=None if sys.stdout.isatty() else 1000)
    table = Table(box=None)
    numbers = [comparison.metric, "best", "at step", "steps", "tokens/s"]
    for head in ("run", "state", *comparison.keys, *numbers, "course"):
        is_number = head in (*numbers, *comparison.keys)
        table.add_column(head, justify="right" if is_number else "left", overflow="fold")
    for row in comparison.rows:
        best, speed = comparison.best_point(row), row.tokens_per_second
        cells = [
            row.run.name,
            row.run.state,
            *(shown(row.settings.get(key)) for key in comparison.keys),
            "" if row.last is None else f"{row.last:.4f}",
            f"{best[1]:.4f}" if best else "",
            f"{best[0]:,}" if best else "",
            f"{row.run.last_step[0]:,}",
            "" if speed is None else f"{speed:,.0f}",
            sparkline(row.points),
        ]
        table.add_row(*map(Text, cells))
    order = f", {'most' if comparison.is_maximized else 'least'} first" if is_sweep else ""
    console.print(f"{'sweep ' if is_sweep else ''}{comparison.name}: {comparison.metric}{order}")
    console.print(table)
    for row in comparison.rows:
        if row.error:
            console.print(Text(f"{row.run.name} failed: {row.error}"))


def figures_table(figures: dict[str, Any]) -> str:
    """A line for each figure of ``lorakit evaluate``, the base's beside the adapter's."""
    base = figures.get("base") or {}
    tasks = {
        f"{task} {name}": (value, ((base.get("tasks") or {}).get(task) or {}).get(name))
        for task, found in (figures.get("tasks") or {}).items()
        for name, value in found.items()
    }
    plain = {key: value for key, value in figures.items() if key not in ("base", "tasks")}
    pairs = {key: (value, base.get(key)) for key, value in plain.items()} | tasks
    width = max(map(len, pairs))
    lines = [f"{'':{width}}  {'adapter':>12}  {'base':>12}"] if base else []
    for key, (value, other) in pairs.items():
        is_figure = isinstance(value, float)
        shown = f"{value:>12.4f}" if is_figure else str(value)
        lines.append(
            f"{key:{width}}  {shown}"
            + (f"  {other:>12.4f}" if is_figure and isinstance(other, float) else "")
        )
    return "\n".join(lines)
