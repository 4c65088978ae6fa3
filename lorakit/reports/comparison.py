"""Runs beside one another, those of a sweep or any, from their folders alone: what differed, and
how the figures moved.
"""

from __future__ import annotations

import csv
import io
import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from lorakit.errors import CheckpointError
from lorakit.runs.folder import History, Run, find_run, flatten, list_runs

DEFAULT_METRICS = ("val/loss", "train/loss")
_NAMES = ("run", "resume", "group", "sweep.trial", "paths.runs")
# unless it was typed
_NEVER_COMPARED = (*_NAMES, "sweep", "paths.", "logger.", "plan.", "checkpoint.", "callbacks.")
_BARS = "▁▂▃▄▅▆▇█"
Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Row:
    """One of the runs.

    Args:
        settings: those in which the runs differ, by key in dots.
        points: (step, figure) of every evaluation, or step, that has it.
        losses: (step, training loss).
    """

    run: Run
    settings: dict[str, Any]
    points: Points
    losses: Points
    tokens_per_second: float | None
    history: list[dict[str, Any]] = field(default_factory=list, repr=False)

    @property
    def last(self) -> float | None:
        """The figure at the end."""
        return self.points[-1][1] if self.points else None

    @property
    def is_ranked(self) -> bool:
        """Whether it has a figure to compare."""
        return self.last is not None and math.isfinite(self.last)

    @property
    def error(self) -> str:
        """Why it failed, in a line."""
        text = str(self.run.info.get("error") or "").strip()
        return text.splitlines()[0] if text and self.run.state == "failed" else ""


@dataclass(frozen=True)
class Comparison:
    """Runs, best first, those without a figure last; runs that were named, in that order."""

    name: str
    metric: str
    is_maximized: bool
    keys: list[str]
    rows: list[Row]

    @property
    def figures(self) -> list[str]:
        """All that any of the runs has logged, by name."""
        return list(_figures(row.history for row in self.rows))

    def best_point(self, row: Row) -> tuple[int, float] | None:
        """(step, figure) where ``row`` was best, or None."""
        finite = [point for point in row.points if math.isfinite(point[1])]
        sign = -1 if self.is_maximized else 1
        return min(finite, key=lambda point: sign * point[1], default=None)

    def as_csv(self) -> str:
        """All that is known of each run, a line for each."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        figures = [
            self.metric,
            *(f"{self.metric} {at}" for at in ("first", "best", "best at step")),
        ]
        facts = ["train/loss", "steps", "tokens_per_second", "adapter_bytes", "error"]
        writer.writerow(["run", "state", *self.keys, *figures, *facts])
        for row in self.rows:
            step, best = self.best_point(row) or (None, None)
            writer.writerow(
                [
                    row.run.name,
                    row.run.state,
                    *(row.settings.get(key) for key in self.keys),
                    row.last,
                    row.points[0][1] if row.points else None,
                    best,
                    step,
                    row.losses[-1][1] if row.losses else None,
                    row.run.last_step[0],
                    row.tokens_per_second,
                    row.run.info.get("adapter_bytes"),
                    row.error,
                ]
            )
        return text.getvalue()


def compare(
    root: Path, sweep: str | None, *, metric: str | None = None, is_maximized: bool | None = None
) -> Comparison:
    """Compare the runs in ``root`` whose ``group`` is ``sweep``; None takes that of the last run
    that has one.

    Args:
        metric: a figure of ``history.jsonl``; None takes the sweep's own, or the evaluation loss,
            or the training loss.
        is_maximized: whether more of it is better; None takes the sweep's own direction.

    Raises:
        CheckpointError: there is no such sweep, or no run has the figure.
    """
    configs = [(run, config) for run in list_runs(root) if (config := _config_of(run)).get("group")]
    if not configs:
        raise CheckpointError(
            f"no run of a sweep in {root.resolve()}; --runs names another folder of runs"
        )
    name = sweep or str(configs[-1][1]["group"])
    chosen = [(run, config) for run, config in configs if str(config["group"]) == name]
    if not chosen:
        known = ", ".join(dict.fromkeys(str(config["group"]) for _, config in configs[::-1]))
        raise CheckpointError(f"no sweep called {name!r} in {root.resolve()}; there are: {known}")
    found = _beside(name, chosen, metric, is_maximized)
    return replace(found, rows=sorted(found.rows, key=lambda row: _order(row, found.is_maximized)))


def sweeps_in(root: Path) -> list[str]:
    """The names of the sweeps that have runs in ``root``, the last one first."""
    groups = (_config_of(run).get("group") for run in list_runs(root)[::-1])
    return list(dict.fromkeys(str(group) for group in groups if group))


def compare_runs(
    root: Path, names: Sequence[str], *, metric: str | None = None, is_maximized: bool | None = None
) -> Comparison:
    """Compare the runs that ``names`` name; the last one where there is none.

    Raises:
        CheckpointError: there is no such run, or none has the figure.
    """
    runs = [find_run(root, name) for name in names] or [find_run(root, None)]
    chosen = [(run, _config_of(run)) for run in runs]
    return _beside(", ".join(run.name for run in runs), chosen, metric, is_maximized)


def _beside(
    name: str,
    chosen: Sequence[tuple[Run, dict[str, Any]]],
    metric: str | None,
    is_maximized: bool | None,
) -> Comparison:
    histories = [History(run.folder).read() for run, _ in chosen]
    own = chosen[-1][1].get("sweep") or {}
    figure = (
        metric
        or own.get("metric")
        or next((known for known in DEFAULT_METRICS if _has(histories, known)), "val/loss")
    )
    if metric and not _has(histories, metric):
        known = ", ".join(sorted(_figures(histories))) or "none"
        raise CheckpointError(f"no run of {name} has a figure {metric}; there are: {known}")
    settings = [_settings(run, config) for run, config in chosen]
    keys = _differing(chosen, settings)
    rows = [
        Row(
            run,
            {key: one.get(key) for key in keys},
            points_of(history, figure),
            points_of(history, "train/loss"),
            _speed(run, history),
            history,
        )
        for (run, _), one, history in zip(chosen, settings, histories, strict=True)
    ]
    down = own.get("direction") == "maximize" if is_maximized is None else is_maximized
    return Comparison(name, figure, down, keys, rows)


def _speed(run: Run, history: list[dict[str, Any]]) -> float | None:
    """Tokens/s as the run said at its end, of the time since it went on; or the median of what
    was logged.
    """
    figure = "speed/tokens_per_second"
    logged = [record[figure] for record in history if figure in record]
    return run.info.get("tokens_per_second") or (statistics.median(logged) if logged else None)


def shown(value: Any) -> str:
    """A setting or figure as tables show it."""
    return f"{value:.4g}" if isinstance(value, float) else "" if value is None else str(value)


def as_number(value: Any) -> float | None:
    """``value`` where it is a number, or None."""
    if isinstance(value, bool):
        return None
    try:
        return float(value)
    except (TypeError, ValueError):
        return None


def sparkline(points: Points, width: int = 12) -> str:
    """The course of a figure in a few characters, the largest as the highest bar."""
    values = [value for _, value in points if math.isfinite(value)]
    if len(values) < 2:
        return ""
    width = min(width, len(values))
    values = [values[round(at * (len(values) - 1) / (width - 1))] for at in range(width)]
    low, high = min(values), max(values)
    return "".join(
        _BARS[round((value - low) / ((high - low) or 1) * (len(_BARS) - 1))] for value in values
    )


def _order(row: Row, is_maximized: bool) -> tuple[bool, float, str]:
    if row.last is None or not row.is_ranked:
        return True, 0.0, row.run.name
    return False, -row.last if is_maximized else row.last, row.run.name


def _differing(chosen: Sequence[tuple[Run, Any]], settings: Sequence[dict[str, Any]]) -> list[str]:
    """The keys in which the runs differ. What ``auto`` would have been for a run that failed
    before is not known.
    """
    resolved = {key for run, _ in chosen for key in run.info.get("resolved", {})}
    keys = []
    for key in dict.fromkeys(key for one in settings for key in one):
        values = {str(one.get(key)) for one in settings} - ({"auto"} if key in resolved else set())
        if len(values) > 1:
            keys.append(key)
    return keys


def _config_of(run: Run) -> dict[str, Any]:
    try:
        config = yaml.safe_load(run.config_text())
    except (OSError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


def _settings(run: Run, config: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what is computed; those that say ``auto`` as what they came to."""
    typed = {text.lstrip("+").partition("=")[0] for text in run.info.get("overrides", ())}
    typed -= set(_NAMES)
    flat = {
        key: value
        for key, value in flatten(config).items()
        if key in typed or not key.startswith(_NEVER_COMPARED)
    }
    return flat | {key: value for key, value in run.info.get("resolved", {}).items() if key in flat}


def points_of(history: Sequence[dict[str, Any]], figure: str) -> Points:
    return [
        (record["step"], float(record[figure]))
        for record in history
        if figure in record and "step" in record
    ]


def _figures(histories: Iterable[Sequence[dict[str, Any]]]) -> dict[str, None]:
    """What was logged, by name, in its order."""
    names = (key for history in histories for record in history for key in record)
    return dict.fromkeys(name for name in names if name not in ("step", "epoch"))


def _has(histories: Sequence[Sequence[dict[str, Any]]], figure: str) -> bool:
    return any(figure in record for history in histories for record in history)
