"""`lorakit report RUN …`: runs that are no sweep, beside one another."""

from __future__ import annotations

import csv
import html
import re
from collections.abc import Callable
from pathlib import Path

from small import SMALL

from lorakit.runs.folder import History

Call = Callable[..., tuple[int, str, str]]


def test_runs_are_compared_by_name_with_all_their_figures_samples_and_settings(
    workplace: Path, lorakit: Call
) -> None:
    (workplace / "unrelated.txt").write_text("some text <b>&amp;\nmore text\n")
    for name, options in (
        ("first", ()),
        ("second", ("optim.lr=1e-2", "eval.retain_path=unrelated.txt")),
    ):
        code, _, err = lorakit(
            "train", f"run={name}", "trainer.max_steps=2", "logger=none", *SMALL, *options
        )
        assert code == 0, err
    code, out, err = lorakit("report", "second", "first", "--out", "page")
    assert code == 0, err
    assert out.startswith("second, first: val/loss\n") and "optim.lr" in out
    with (workplace / "page/report.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == ["second", "first"]  # as they were named
    page = (workplace / "page/report.html").read_text(encoding="utf-8")
    assert "http://" not in re.sub(
        r'xmlns(:\w+)?="[^"]*"|<rdf:RDF.*?</rdf:RDF>|<!DOCTYPE[^>]*>', "", page, flags=re.DOTALL
    )
    for figure in (
        "val/loss",
        "train/loss",
        "train/grad_norm",
        "train/lr",
        "speed/tokens_per_second",
        "memory/gigabytes",
        "retain/loss",
    ):
        assert f">{figure}<" in page, figure
    assert "Samples over time" in page and "Settings that differ" in page
    written = [
        History(workplace / "runs" / name, "samples.jsonl").read() for name in ("second", "first")
    ]
    assert len(written[0]) == len(written[1]) > 0
    # in one line, in the order in which the runs were named
    for ours, theirs in zip(*written, strict=True):
        cells = "".join(
            f'<td class="text">{html.escape(record["sample"])}</td>' for record in (ours, theirs)
        )
        assert (
            f"<tr><td>{ours['step']}</td>{cells}</tr>" in page
            and f"<pre>{html.escape(ours['prompt'])}</pre>" in page
        )
    assert "<td>optim.lr</td><td>0.01</td><td>0.005</td>" in page and "run=first" in page


def test_one_run_is_the_last_one_and_a_name_that_is_none_is_told(
    workplace: Path, lorakit: Call
) -> None:
    code, _, err = lorakit("train", "run=only", "trainer.max_steps=1", "logger=none", *SMALL)
    assert code == 0, err
    code, out, err = lorakit("report")
    assert (
        code == 0
        and out.startswith("only: val/loss")
        and (workplace / "runs/.report/report.html").is_file()
    ), err
    assert "run only" in (workplace / "runs/.report/report.html").read_text(encoding="utf-8")
    code, _, err = lorakit("report", "onyl")
    assert code == 2 and "onyl" in err and "Traceback" not in err
    code, _, err = lorakit("report", "only", "sweep=x")
    assert code == 2 and "sweep=x: what is compared" in err
    code, _, err = lorakit("report", "only", "--metric", "val/lss")
    assert (
        code == 2
        and "no figure" in err.replace("has a figure val/lss", "no figure")
        and "train/loss" in err
    )
