"""The pages that lorakit writes, opened by a real browser: their programs run, nothing is loaded
from elsewhere.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest
from small import SMALL

from lorakit.data.datamodule import LoRADataModule
from lorakit.model.load import load_tokenizer

Call = Callable[..., tuple[int, str, str]]
BROWSER = next(
    (
        found
        for name in ("chromium", "chromium-browser", "google-chrome", "chrome")
        if (found := shutil.which(name))
    ),
    None,
)
# A browser is no Python package: `make test` cannot install it, and must pass for somebody who has
# none.
pytestmark = pytest.mark.skipif(
    BROWSER is None, reason="needs a browser: install Chromium or Chrome"
)


def opened(page: Path, profile: Path, *, script: str = "") -> str:
    """The page as the browser has it, after its own program and ``script``. Fails where the
    browser complains.
    """
    text = page.read_text(encoding="utf-8")
    copy = page.with_name(f"opened-{page.name}")
    copy.write_text(text.replace("</html>", f"<script>{script}</script></html>"), encoding="utf-8")
    command = [
        str(BROWSER),
        "--headless",
        "--no-sandbox",
        "--disable-gpu",
        f"--user-data-dir={profile}",
        "--virtual-time-budget=2000",
        "--host-resolver-rules=MAP * ~NOTFOUND",
        "--enable-logging=stderr",
        "--dump-dom",
        copy.as_uri(),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    complaints = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not complaints, complaints
    assert done.stdout.startswith("<!DOCTYPE html>"), done.stderr[-2000:]
    return done.stdout


def test_the_page_of_a_data_set_has_its_figures_and_marks_what_ends_an_answer(
    workplace: Path, lorakit: Call
) -> None:
    rows = [
        {
            "messages": [
                {"role": "user", "content": "a <b> & c?"},
                {"role": "assistant", "content": "yes " * (i + 1)},
            ]
        }
        for i in range(9)
    ]
    (workplace / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (workplace / "b.jsonl").write_text('{"prompt": "x", "completion": "y"}\n' * 4)
    (workplace / "c.jsonl").write_text(
        '{"tokens": [65, 66, 67, 68, 69], "weights": [0, 1, 0.5, -1, 1]}\n'
    )
    sources = "data.sources=[a.jsonl, {path: b.jsonl, weight: 0.5}, c.jsonl]"
    settings = ("model.path=tiny", sources, "data.on_long=truncate_right", "data.batch_size=2")
    code, _, err = lorakit(
        "show",
        "--html",
        "rows.html",
        "-n",
        "2",
        *settings,
        "data.max_tokens=50",
    )
    assert code == 0, err
    marks = "document.body.dataset.bars = document.querySelectorAll('.bars div').length;"
    marks += (
        "document.body.dataset.tall = Math.max(...[...document.querySelectorAll('.bars"
        " div')].map(bar => bar.offsetHeight));"
    )
    marks += (
        "document.body.dataset.colours = ['w0', 'w1', 'other', 'negative'].map(name =>"
        " getComputedStyle(document.querySelector("
    )
    marks += "'section .tokens span.' + name)).backgroundColor).join(';');"
    page = opened(workplace / "rows.html", workplace / "profile", script=marks)
    colours = re.search(r'data-colours="([^"]*)"', page)[1].split(";")
    assert len({*colours}) == 4 and "rgba(0, 0, 0, 0)" not in colours
    assert (
        int(re.search(r'data-bars="(\d+)"', page)[1]) > 3
        and int(re.search(r'data-tall="(\d+)"', page)[1]) > 60
    )
    assert "a &lt;b&gt; &amp; c?" in re.sub(r"</?span[^>]*>", "", page)
    # the legend, and one for each conversation and prompt
    assert page.count('class="w1 end"') == 1 + 4
    for said in (
        "14</b>rows",
        "padding in batches",
        "longest; data.max_tokens is 50",
    ):
        assert said in page, said
    for name, rows_there, weight in (("a", 9, 1), ("b", 4, 0.5), ("c", 1, 1)):
        cells = (
            f'<td>{name}</td><td class="number">{rows_there}</td><td class="number">{weight:g}</td>'
        )
        assert cells in page, cells
    assert lorakit("show", "--html", "whole.html", *settings, "data.max_tokens=500")[0] == 0
    whole = (workplace / "whole.html").read_text()
    assert "<b>0</b>truncated" in whole
    data = LoRADataModule(path="a.jsonl", max_tokens=500)  # the only rows that are longer than 50
    data.check_rows()
    data.set_tokenizer(load_tokenizer("tiny"))
    data.check_tokens()
    cut = data.report.lengths[data.report.lengths > 50] - 50
    assert f"<b>{len(cut)}</b>truncated, by {cut.sum()} tokens" in page and len(cut)
    assert (
        lorakit(
            "show", "--html", "packed.html", *settings, "data.max_tokens=500", "data.packing=true"
        )[0]
        == 0
    )
    assert "padding in packed rows, about" in (workplace / "packed.html").read_text()


def test_the_page_of_runs_sorts_and_points_at_a_run(workplace: Path, lorakit: Call) -> None:
    for name, lr in (("first", "1e-3"), ("second", "2e-3")):
        code, _, err = lorakit(
            "train", f"run={name}", f"optim.lr={lr}", "trainer.max_steps=2", "logger=none", *SMALL
        )
        assert code == 0, err
    assert lorakit("report", "first", "second", "--out", "page")[0] == 0
    script = (
        "const heads = [...document.querySelectorAll('th')]; const lr = heads.find(one =>"
        " one.textContent === 'optim.lr');"
    )
    script += (
        "lr.click(); lr.click(); document.querySelector('tr[data-run=run1]').dispatchEvent(new"
        " Event('mouseenter'));"
    )
    page = opened(workplace / "page/report.html", workplace / "profile", script=script)
    table = page[page.index("<tbody>") : page.index("</tbody>")]
    # sorted by the learning rate, the larger one first
    assert table.index("second") < table.index("first")
    assert 'class="dim"' in page and len(re.findall(r'<g id="run1-[^"]+" class="hot"', page)) >= 4
    assert "Samples over time" in page and page.count("<svg") >= 2
