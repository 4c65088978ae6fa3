"""The plots of a page of runs, as SVG: learning curves, other figures over the steps, the figure
at the end by each setting.
"""

from __future__ import annotations

import html
import io
import math
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorakit.reports.comparison import Comparison, Points, Row, as_number, points_of, shown

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLUMNS = 3  # panels in a line
FIGURES = (
    "train/grad_norm",
    "train/lr",
    "speed/tokens_per_second",
    "memory/gigabytes",
    "data/padding_share",
    "retain/loss",
)
SHOWN_BESIDE = (
    "val/",
    "train/loss/",
    "train/share/",
    "train/rewards/",
    "train/bad_steps",
    "train/empty_windows",
)
FEW = 6  # values of a setting that are shown side by side


def colors_of(comparison: Comparison) -> list[str]:
    """A colour for each row: dark for the best, light for the worst, grey without a figure."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    ranked = sum(row.is_ranked for row in comparison.rows)
    shades = [
        to_hex(colormaps["viridis"](0.9 * number / max(1, ranked - 1))) for number in range(ranked)
    ]
    return shades + ["#98a2b3"] * (len(comparison.rows) - ranked)


def draw_curves(comparison: Comparison) -> str:
    """The figure, and the training loss, over the steps."""
    panels = [(comparison.metric, [row.points for row in comparison.rows])]
    if comparison.metric != "train/loss":
        panels.append(("train/loss", [row.losses for row in comparison.rows]))
    return _draw_panels(comparison, panels, columns=2, height=3.8)


def draw_figures(comparison: Comparison) -> str:
    """What else the runs logged over their steps: gradient norm, learning rate, speed, memory,
    and what their loss or data brought.
    """
    there = [name for name in comparison.figures if name not in (comparison.metric, "train/loss")]
    known = [name for name in FIGURES if name in there]
    others = [name for name in there if name not in known and name.startswith(SHOWN_BESIDE)]
    panels = [
        (name, [points_of(row.history, name) for row in comparison.rows])
        for name in (*known, *others)
    ]
    return _draw_panels(comparison, panels, columns=COLUMNS, height=2.8) if panels else ""


def _draw_panels(
    comparison: Comparison,
    panels: Sequence[tuple[str, list[Points]]],
    *,
    columns: int,
    height: float,
) -> str:
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    lines = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(11, height * lines), layout="constrained")
    colors = colors_of(comparison)
    for place, (name, curves) in enumerate(panels):
        axes = figure.add_subplot(lines, min(columns, len(panels)), place + 1)
        for number, points in reversed(list(enumerate(curves))):  # the best is on top
            if points:
                xs, ys = zip(*points, strict=True)
                (line,) = axes.plot(
                    xs, ys, marker="o" if len(points) < 30 else "", markersize=3, linewidth=1.4
                )
                line.set(color=colors[number], gid=f"run{number}-curve{place}")
        axes.set(xlabel="optimiser step", title=name)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        _finish(axes, [value for points in curves for _, value in points])
    return _as_svg(figure, comparison)


def draw_settings(comparison: Comparison) -> str:
    """The figure at the end by each setting that differs, or nothing where none does."""
    from matplotlib.figure import Figure

    ranked = [(number, row) for number, row in enumerate(comparison.rows) if row.is_ranked]
    keys = [
        key for key in comparison.keys if len({str(row.settings.get(key)) for _, row in ranked}) > 1
    ]
    if not keys:
        return ""
    lines = math.ceil(len(keys) / COLUMNS)
    figure = Figure(figsize=(11, 3.4 * lines), layout="constrained")
    colors = colors_of(comparison)
    ys = [row.last or 0.0 for _, row in ranked]
    for place, key in enumerate(keys):
        axes = figure.add_subplot(lines, COLUMNS, place + 1)
        xs = _place(axes, [row.settings.get(key) for _, row in ranked])
        for (number, _), x, y in zip(ranked, xs, ys, strict=True):
            gid = f"run{number}-panel{place}"
            axes.plot([x], [y], "o", color=colors[number], markersize=7, alpha=0.9, gid=gid)
        axes.set(xlabel=key, ylabel=comparison.metric)
        _finish(axes, ys)
    return _as_svg(figure, comparison)


def describe(comparison: Comparison, row: Row) -> str:
    """The settings of ``row`` in which the runs differ."""
    return " ".join(f"{key}={shown(row.settings[key])}" for key in comparison.keys)


def _place(axes: Axes, values: Sequence[Any]) -> list[float]:
    """Many numbers where they are, logarithmic where they span a factor of 10; a few values, and
    all else, side by side.
    """
    numbers = [number for value in values if (number := as_number(value)) is not None]
    if len(numbers) == len(values) and len(set(numbers)) > FEW:
        if min(numbers) > 0 and max(numbers) / min(numbers) > 10:
            axes.set_xscale("log")
        return numbers
    names = {shown(value): as_number(value) for value in values}
    order = sorted(names, key=lambda name: (names[name] is None, names[name] or 0.0, name))
    axes.set_xticks(range(len(order)), order)
    axes.set_xlim(-0.6, len(order) - 0.4)
    return [order.index(shown(value)) for value in values]


def _finish(axes: Axes, values: Sequence[float]) -> None:
    finite = [value for value in values if math.isfinite(value)]
    if finite and min(finite) > 0 and max(finite) / min(finite) > 20:
        axes.set_yscale("log")
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)


def _as_svg(figure: Figure, comparison: Comparison) -> str:
    """The drawing, with the run's name and settings where the pointer rests on it."""
    import matplotlib

    buffer = io.StringIO()
    with matplotlib.rc_context(
        {"svg.fonttype": "none", "font.family": "sans-serif", "svg.hashsalt": "lorakit"}
    ):
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    drawn = buffer.getvalue()
    return re.sub(
        r'<g id="run(\d+)-[^"]+">',
        lambda found: found[0] + _tooltip(comparison, int(found[1])),
        drawn[drawn.index("<svg") :],
    )


def _tooltip(comparison: Comparison, number: int) -> str:
    row: Row = comparison.rows[number]
    figure = "" if row.last is None else f"\n{comparison.metric} {row.last:.4f}"
    return f"<title>{html.escape(f'{row.run.name}: {describe(comparison, row)}{figure}')}</title>"
