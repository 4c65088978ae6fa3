"""Runs as one page: a table to sort, curves, samples side by side, settings that differ."""

from __future__ import annotations

from typing import Any

from lorakit.extras import find_problem
from lorakit.reports.comparison import Comparison, as_number, shown
from lorakit.reports.page import render
from lorakit.reports.plots import colors_of, describe, draw_curves, draw_figures, draw_settings
from lorakit.runs.folder import History

MAX_PROMPTS = 8
_FIGURES = ("first", "best", "at step", "steps", "tokens/s")


def as_page(comparison: Comparison, *, is_sweep: bool = True) -> str:
    """The page, as HTML that needs no other file. Runs that are no sweep have all their figures,
    settings and samples on it. Where matplotlib is missing, it says so instead of plots.
    """
    rows, no_plots = comparison.rows, find_problem("matplotlib")
    kind = "sweep" if is_sweep else "run" if len(rows) == 1 else "runs"
    states = [row.run.state for row in rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    best = rows[0] if is_sweep and rows[0].last is not None else None
    plots: dict[str, Any] = {}
    if not no_plots:
        plots = {
            "curves": draw_curves(comparison),
            "by_setting": draw_settings(comparison) if is_sweep else "",
            "figures": "" if is_sweep else draw_figures(comparison),
        }
    return render(
        "runs",
        title=f"{kind} {comparison.name}",
        counts=f"{len(states)} run{'s' * (len(states) > 1)}: {counts}",
        metric=comparison.metric,
        is_maximized=comparison.is_maximized,
        is_sweep=is_sweep,
        best=best,
        best_with=f" with {describe(comparison, best)}" if best and comparison.keys else "",
        heads=["run", "state", *comparison.keys, comparison.metric, *_FIGURES],
        lines=[{"row": row, "values": _values(comparison, row)} for row in rows],
        rows=rows,
        keys=comparison.keys,
        colors=[] if no_plots else colors_of(comparison),
        no_plots=no_plots,
        samples=[] if is_sweep else _samples(comparison),
        as_number=as_number,
        shown=shown,
        **plots,
    )


def _values(comparison: Comparison, row: Any) -> list[Any]:
    """A run's settings and figures, in the order of the table's columns."""
    best, speed = comparison.best_point(row), row.tokens_per_second
    return [
        *(row.settings.get(key) for key in comparison.keys),
        row.last,
        row.points[0][1] if row.points else None,
        best and best[1],
        best and best[0],
        row.run.last_step[0],
        speed and round(speed),
    ]


def _samples(comparison: Comparison) -> list[tuple[str, list[tuple[int, list[str]]]]]:
    """What the runs wrote over time: by prompt, by step, a text of each run."""
    found = [History(row.run.folder, "samples.jsonl").read() for row in comparison.rows]
    prompts = dict.fromkeys(str(record.get("prompt")) for records in found for record in records)
    samples = []
    for prompt in list(prompts)[:MAX_PROMPTS]:
        said = [
            {r["step"]: str(r.get("sample")) for r in records if str(r.get("prompt")) == prompt}
            for records in found
        ]
        steps = sorted({step for one in said for step in one})
        samples.append((prompt, [(step, [one.get(step, "") for one in said]) for step in steps]))
    return samples
