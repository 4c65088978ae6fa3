"""A sweep's report, from run folders alone."""

from __future__ import annotations

import csv
import html.parser
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.errors import CheckpointError
from lorakit.reports.comparison import compare, sparkline
from lorakit.reports.runs_page import as_page

CURVES = {"s-0": [3.0, 2.0, 1.5], "s-1": [3.0, 1.0, 1.25], "s-2": [3.0, float("nan")], "s-3": []}
NUMBERS = [0, 1, 2, 3]


def _make_run(
    root: Path, name: str, config: dict[str, Any], losses: list[float], **info: Any
) -> None:
    folder = root / name
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "run.json").write_text(
        json.dumps(
            {"format_version": 1, "name": name, "status": "finished", "created": name, **info}
        )
    )
    with (folder / "history.jsonl").open("w") as file:
        for step, loss in enumerate(losses, start=1):
            file.write(
                json.dumps({"step": step, "train/loss": 2 * loss, "speed/tokens_per_second": 100.0})
                + "\n"
            )
            file.write(
                json.dumps({"step": step, "val/loss": loss, "val/exact_match": 1 / loss}) + "\n"
            )


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for number, (name, losses) in zip(NUMBERS, CURVES.items(), strict=True):
        config = {
            "group": "s",
            "run": name,
            "optim": {"lr": "auto" if losses else -1.0, "_target_": "a<b>&c"},
            "lora": {"rank": 8 * 2**number},
            "trainer": {"precision": "auto", "max_steps": 3},
            "callbacks": {"x": {"folder": name}},
            "sweep": {"trial": number},
        }
        resolved = {"optim.lr": 1e-3 / (number + 1), "trainer.precision": "32-true"}
        facts = (
            {"resolved": resolved}
            if losses
            else {"status": "failed", "error": "optim.lr=-1 <must> be\nmore"}
        )
        _make_run(tmp_path, name, config, losses, **facts)
    _make_run(tmp_path, "alone", {"group": None}, [1.0])
    _make_run(tmp_path, "t-0", {"group": "t"}, [0.1])
    return tmp_path


def test_the_best_comes_first_and_what_has_no_figure_last(runs: Path) -> None:
    found = compare(runs, "s")
    assert [row.run.name for row in found.rows] == ["s-1", "s-0", "s-2", "s-3"]
    assert (
        found.metric == "val/loss"
        and found.best_point(found.rows[0]) == (2, 1.0)
        and found.rows[0].last == 1.25
    )
    assert found.rows[-1].error == "optim.lr=-1 <must> be"


def test_only_settings_that_differ_are_shown_and_auto_is_what_it_came_to(runs: Path) -> None:
    found = compare(runs, "s")
    assert found.keys == ["lora.rank", "optim.lr"]
    assert found.rows[0].settings == {"optim.lr": 5e-4, "lora.rank": 16}


def test_more_can_be_better_and_any_figure_can_be_compared(runs: Path) -> None:
    found = compare(runs, "s", metric="val/exact_match", is_maximized=True)
    assert [row.run.name for row in found.rows][:2] == ["s-1", "s-0"]
    assert (
        compare(runs, "s", metric="val/exact_match", is_maximized=False).rows[0].run.name == "s-0"
    )
    with pytest.raises(
        CheckpointError,
        match=(
            r"has a figure val/los; there are: speed/tokens_per_second, train/loss, val/exact_match"
        ),
    ):
        compare(runs, "s", metric="val/los")


def test_the_last_sweep_is_the_default_and_a_wrong_name_lists_those_there_are(
    runs: Path, tmp_path: Path
) -> None:
    assert compare(runs, None).name == "t"
    with pytest.raises(CheckpointError, match=r"no sweep called 'x' .* there are: t, s"):
        compare(runs, "x")
    with pytest.raises(CheckpointError, match="no run of a sweep"):
        compare(tmp_path / "nowhere", None)


def test_the_csv_holds_every_run(runs: Path) -> None:
    rows = list(csv.DictReader(compare(runs, "s").as_csv().splitlines()))
    assert [row["run"] for row in rows] == ["s-1", "s-0", "s-2", "s-3"]
    first = rows[0]
    assert (first["lora.rank"], first["optim.lr"], first["steps"]) == ("16", "0.0005", "3")
    assert [first[f"val/loss{end}"] for end in ("", " first", " best", " best at step")] == [
        "1.25",
        "3.0",
        "1.0",
        "2",
    ]
    assert first["train/loss"] == "2.5" and first["tokens_per_second"] == "100.0"
    assert (
        rows[3]["state"] == "failed"
        and rows[3]["val/loss"] == ""
        and rows[3]["error"].startswith("optim.lr=-1")
    )


class _Page(html.parser.HTMLParser):
    """What a page loads, and how its tags nest."""

    def __init__(self) -> None:
        super().__init__()
        self.loads: list[str] = []
        self.texts: list[str] = []
        self.ids: list[str] = []
        self.rows = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.rows += tag == "tr" and "data-run" in found
        if (found.get("id") or "").startswith("run"):
            self.ids.append(found["id"] or "")
        self.loads += [
            value
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and value and not value.startswith("#")
        ]

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_loads_nothing_and_has_a_curve_and_a_point_for_each_run(runs: Path) -> None:
    text = as_page(compare(runs, "s"))
    page = _Page()
    page.feed(text)
    assert page.loads == [] and "@import" not in text and "url(http" not in text
    assert page.rows == 4
    shown = "".join(page.texts)
    assert "optim.lr=-1 <must> be" in shown and "<must>" not in text
    # val/loss and train/loss of the three that have any; two panels of the two with a figure at the
    # end
    assert sorted(page.ids) == sorted(
        [f"run{n}-curve{place}" for n in (0, 1, 2) for place in (0, 1)]
        + [f"run{n}-panel{place}" for n in (0, 1) for place in (0, 1)]
    )


def test_a_course_in_a_few_characters_goes_from_the_largest_to_the_smallest() -> None:
    assert sparkline([(0, 3.0), (1, 2.0), (2, 1.0)]) == "█▅▁"
    assert sparkline([(0, 1.0)]) == "" and sparkline([(0, 2.0), (1, 2.0)]) == "▁▁"
    assert len(sparkline([(step, float(step)) for step in range(1000)])) == 12


def test_a_folder_that_is_torn_does_not_hide_the_others(runs: Path) -> None:
    (runs / "s-0" / "config.yaml").write_text("a: [")
    (runs / "s-1" / "history.jsonl").write_text('{"step": 1, "val/loss": 2.0}\n{"step": 2, "val/lo')
    best = compare(runs, "s").rows[0]
    assert (best.run.name, best.last) == ("s-1", 2.0)


def test_what_was_typed_is_compared_even_where_it_does_not_change_the_result(
    tmp_path: Path,
) -> None:
    for number in (0, 1):
        config = {"group": "s", "callbacks": {"x": {"patience": number, "folder": f"s-{number}"}}}
        _make_run(
            tmp_path,
            f"s-{number}",
            config,
            [1.0 + number],
            overrides=[f"+callbacks.x.patience={number}", "run=s"],
        )
    assert compare(tmp_path, "s").keys == ["callbacks.x.patience"]
