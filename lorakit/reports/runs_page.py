"""Runs as one page: a table to sort, curves, samples side by side, settings that differ. Nothing
is loaded from elsewhere.
"""

from __future__ import annotations

import html
from typing import Any

from lorakit.extras import find_problem
from lorakit.reports.comparison import Comparison, as_number, shown
from lorakit.reports.plots import colors_of, describe, draw_curves, draw_figures, draw_settings
from lorakit.runs.folder import History

MAX_PROMPTS = 8

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
color: #1c2330; background: #fff }
h1 { font-size: 1.5rem; margin: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem } p { margin: .3rem
0 } .soft { color: #667085 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums;
white-space: nowrap }
th { cursor: pointer; text-align: left; border-bottom: 2px solid #d0d5dd; padding: .3rem .8rem .3rem
0 }
td { border-bottom: 1px solid #eaecf0; padding: .25rem .8rem .25rem 0 } td.number { text-align:
right }
tr.hot td { background: #fff4d6 } svg { width: 100%; height: auto } .dot { display: inline-block;
width: .7em; height: .7em;
border-radius: 50%; margin-right: .5em } .dim g[id^="run"] { opacity: .08 } .dim g[id^="run"].hot {
opacity: 1 }
.error { color: #b42318 }
td.text { white-space: pre-wrap; overflow-wrap: anywhere; vertical-align: top; min-width: 12rem;
max-width: 34rem }
pre { background: #f2f4f7; padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap;
overflow-wrap: anywhere; margin: .4rem 0 }
details { margin: 1rem 0 } summary { cursor: pointer }
"""
_SCRIPT = """
const keyOf = node => node.dataset.run || node.id.split('-')[0];
const marked = [...document.querySelectorAll('tr[data-run], g[id^="run"]')];
for (const node of marked) {
  node.addEventListener('mouseenter', () => { document.body.classList.add('dim');
    marked.forEach(other => other.classList.toggle('hot', keyOf(other) === keyOf(node))); });
  node.addEventListener('mouseleave', () => { document.body.classList.remove('dim');
    marked.forEach(other => other.classList.remove('hot')); });
}
document.querySelectorAll('th').forEach((head, column) => head.addEventListener('click', () => {
  const body = head.closest('table').tBodies[0], up = head.dataset.up !== '1';
  head.dataset.up = up ? '1' : '0';
  const value = row => row.cells[column].dataset.value ?? row.cells[column].textContent;
  const by = (a, b) => { const [x, y] = [value(a), value(b)];
    if (x === '' || y === '') return (x === '') - (y === '');
    return (up ? 1 : -1) * (isNaN(x) || isNaN(y) ? x.localeCompare(y) : x - y); };
  [...body.rows].sort(by).forEach(row => body.append(row));
}));
"""


def as_page(comparison: Comparison, *, is_sweep: bool = True) -> str:
    """The page, as HTML that needs no other file. Runs that are no sweep have all their figures,
    settings and samples on it. Where matplotlib is missing, it says so in the place of plots.
    """
    kind = "sweep" if is_sweep else "run" if len(comparison.rows) == 1 else "runs"
    title, metric = html.escape(f"{kind} {comparison.name}"), html.escape(comparison.metric)
    best, states = comparison.rows[0], [row.run.state for row in comparison.rows]
    counts = ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))
    said = ""
    if best.last is not None and is_sweep:
        said = f"<p>best: <b>{html.escape(best.run.name)}</b>, {metric} <b>{best.last:.4f}</b>"
        said += (
            f" with {html.escape(describe(comparison, best))}</p>" if comparison.keys else "</p>"
        )
    no_plots = find_problem("matplotlib")
    more = "" if is_sweep else _samples(comparison) + _settings(comparison)
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style>"
        f'<h1>{title}</h1><p class="soft">{len(states)} run{"s" * (len(states) > 1)}: {counts};'
        f" {metric}, "
        f"{'more' if comparison.is_maximized else 'less'} is better</p>{said}"
        f"{_table(comparison, colors=[] if no_plots else colors_of(comparison))}"
        f"{f'<p>{html.escape(no_plots)}</p>' if no_plots else _plots(comparison, is_sweep)}{more}"
        f"<script>{_SCRIPT}</script></html>\n"
    )


def _plots(comparison: Comparison, is_sweep: bool) -> str:
    by_setting = draw_settings(comparison) if is_sweep else ""
    figures = "" if is_sweep else draw_figures(comparison)
    title = f"{html.escape(comparison.metric)} by setting"
    return (
        f"<h2>Learning curves</h2>{draw_curves(comparison)}"
        f"{f'<h2>{title}</h2>{by_setting}' if by_setting else ''}"
        f"{f'<h2>Other figures</h2>{figures}' if figures else ''}"
    )


def _table(comparison: Comparison, colors: list[str]) -> str:
    """The runs, each with the colour of its curves where there are ``colors``."""
    heads = [
        "run",
        "state",
        *comparison.keys,
        comparison.metric,
        "first",
        "best",
        "at step",
        "steps",
        "tokens/s",
    ]
    lines = []
    for number, row in enumerate(comparison.rows):
        best, speed = comparison.best_point(row), row.tokens_per_second
        values = [
            row.last,
            row.points[0][1] if row.points else None,
            best and best[1],
            best and best[0],
            row.run.last_step[0],
        ]
        dot = f'<span class="dot" style="background:{colors[number]}"></span>' if colors else ""
        cells = [
            f"<td>{dot}{html.escape(row.run.name)}</td>",
            f"<td>{html.escape(row.run.state)}</td>",
            *(_cell(row.settings.get(key)) for key in comparison.keys),
            *(_cell(value) for value in [*values, speed and round(speed)]),
        ]
        lines.append(f'<tr data-run="run{number}">{"".join(cells)}</tr>')
    head = "".join(f"<th>{html.escape(text)}</th>" for text in heads)
    failures = [f"{row.run.name} failed: {row.error}" for row in comparison.rows if row.error]
    below = "".join(f'<p class="error">{html.escape(text)}</p>' for text in failures)
    return (
        f'<div class="wide"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{''.join(lines)}</tbody></table></div>{below}"
    )


def _samples(comparison: Comparison) -> str:
    """What the runs wrote over time, side by side, prompt by prompt."""
    found = [History(row.run.folder, "samples.jsonl").read() for row in comparison.rows]
    prompts = list(
        dict.fromkeys(str(record.get("prompt")) for records in found for record in records)
    )[:MAX_PROMPTS]
    if not prompts:
        return ""
    head = "".join(f"<th>{html.escape(row.run.name)}</th>" for row in comparison.rows)
    parts = []
    for prompt in prompts:
        said = [
            {r["step"]: str(r.get("sample")) for r in records if str(r.get("prompt")) == prompt}
            for records in found
        ]
        lines = []
        for step in sorted({step for one in said for step in one}):
            cells = "".join(
                f'<td class="text">{html.escape(one.get(step, ""))}</td>' for one in said
            )
            lines.append(f"<tr><td>{step:,}</td>{cells}</tr>")
        table = (
            f"<table><thead><tr><th>step</th>{head}</tr></thead>"
            f"<tbody>{''.join(lines)}</tbody></table>"
        )
        parts.append(f'<pre>{html.escape(prompt)}</pre><div class="wide">{table}</div>')
    return f"<h2>Samples over time</h2>{''.join(parts)}"


def _settings(comparison: Comparison) -> str:
    """The settings in which runs differ, a line for each; and how each run came about."""
    head = "".join(f"<th>{html.escape(row.run.name)}</th>" for row in comparison.rows)
    lines = []
    for key in comparison.keys:
        cells = "".join(
            f"<td>{html.escape(shown(row.settings.get(key)))}</td>" for row in comparison.rows
        )
        lines.append(f"<tr><td>{html.escape(key)}</td>{cells}</tr>")
    table = (
        f"<table><thead><tr><th>setting</th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table>"
    )
    differing = f'<h2>Settings that differ</h2><div class="wide">{table}</div>' if lines else ""
    facts = "".join(
        f"<details><summary>{html.escape(row.run.name)}: how it came about</summary>"
        f"<pre>{html.escape(str(row.run.info.get('command', '')))}</pre>"
        f"<pre>{html.escape(row.run.config_text())}</pre></details>"
        for row in comparison.rows
    )
    return differing + facts


def _cell(value: Any) -> str:
    number = as_number(value)
    kind = "" if number is None else f' class="number" data-value="{number!r}"'
    return f"<td{kind}>{html.escape(shown(value))}</td>"
