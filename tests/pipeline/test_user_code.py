"""A loss, a row format, a callback, an optimiser and a schedule of a user's own package, from a
folder outside the checkout.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from program import REPOSITORY, start

from lorakit.runs.checkpoint import STATE_FILE, list_checkpoints
from lorakit.runs.folder import History

Call = Callable[..., tuple[int, str, str]]
PACKAGE = Path(__file__).parent / "own_package"
SETTINGS = (
    *(
        "--config-dir",
        "conf",
        "experiment=mine",
        "logger=none",
        "trainer.max_steps=4",
        "trainer.threads=1",
    ),
    *("trainer.precision=32-true", "lora.rank=4", "callbacks.samples=null", "data.shuffle=false"),
)


@pytest.fixture
def mine(workplace: Path) -> Path:
    """A folder with a package, configs and rows, as a user would have them."""
    shutil.copytree(PACKAGE, workplace, dirs_exist_ok=True)
    rows = [
        {"frage": f"{i} plus {i}", "antwort": f" {2 * i}.", "gut": i % 5 != 0} for i in range(40)
    ]
    (workplace / "rows.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8"
    )
    return workplace


def steps_of(folder: Path, name: str, output: str) -> list[dict[str, float]]:
    assert "32 rows (prompt_completion)" in output  # eight of the forty are left out
    return [record for record in History(folder / "runs" / name).read() if "train/loss" in record]


def test_own_code_trains_in_one_process_and_in_two_alike(mine: Path, lorakit: Call) -> None:
    found = {}
    for name, loss in (("one", "focal"), ("plain", "cross_entropy")):
        code, out, err = lorakit(
            "train", *SETTINGS, f"run={name}", "trainer.accumulate_grad_batches=2", f"loss={loss}"
        )
        assert code == 0, err
        found[name] = steps_of(mine, name, out)
    process = start("train", *SETTINGS, "run=two", "trainer.devices=2", "strategy=ddp", cwd=mine)
    output, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors
    one, plain, two = found["one"], found["plain"], steps_of(mine, "two", output)
    assert len(one) == len(two) == 4
    for first, second in zip(one, two, strict=True):
        for figure in ("train/loss", "train/grad_norm", "train/share_of_sure_tokens", "train/lr"):
            assert second[figure] == pytest.approx(first[figure], rel=1e-3), figure
    # The loss: a focal one, below cross-entropy wherever a token is likely.
    assert (
        one[0]["train/loss"] < plain[0]["train/loss"]
        and "train/share_of_sure_tokens" not in plain[0]
    )
    # The callback: each process wrote how many micro-batches it saw.
    seen = {path.name: path.read_text() for path in (mine / "runs/two").glob("seen-*.txt")}
    assert seen == {"seen-0.txt": "4 of german", "seen-1.txt": "4 of german"}
    assert (mine / "runs/one/seen-0.txt").read_text() == "8 of german"
    # The optimiser, and the schedule, which halves.
    state = torch.load(
        list_checkpoints(mine / "runs/one/checkpoints")[-1].folder / STATE_FILE, weights_only=True
    )
    assert state["optimizer_states"][0]["param_groups"][0]["is_sign_only"] is True
    assert [record["train/lr"] for record in one] == pytest.approx([1e-3, 5e-4, 2.5e-4, 1.25e-4])


def test_the_page_shows_the_code_that_is_tested() -> None:
    page = (REPOSITORY / "docs/own-code.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```(?:python|yaml)\n(.*?)```", page, re.DOTALL)
    assert len(blocks) == 9
    for heading in ("A loss", "A row format", "A callback", "An optimiser, a schedule"):
        (section,) = re.findall(rf"^## {heading}\n(.*?)(?=^## )", page, re.DOTALL | re.MULTILINE)
        assert "```python" in section and (".yaml" in section or "data.format=" in section), heading
    files = {
        path: path.read_text(encoding="utf-8")
        for path in PACKAGE.rglob("*")
        if path.suffix in (".py", ".yaml")
    }
    for block in blocks:
        *comments, body = re.split(r"(?m)^# conf/.*\n", block)
        lines = [
            line.strip()
            for line in body.splitlines()
            if line.strip() and not line.startswith("def ")
        ]
        assert any(all(line in text for line in lines) for text in files.values()), body
        named = re.search(r"# (conf/[\w/]+\.yaml)", block)
        assert named is None or (PACKAGE / named[1]).is_file(), comments


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (("loss.gama=1",), "unknown key 'loss.gama'; did you mean loss.gamma?"),
        (("loss.gamma=high",), "loss.gamma=high: expected float"),
        (
            ("data.format=own_package.rows.germann",),
            "data.format=own_package.rows.germann cannot be imported",
        ),
        (
            ("data.format=own_package.rows.broken",),
            "rows.jsonl:1–40: own_package.rows.broken raises KeyError: 'question'",
        ),
        (
            ("data.format=own_package.rows.nothing",),
            "own_package.rows.nothing returns int, which is no row",
        ),
        (
            ("data.format=own_package.rows.strange",),
            "returns the columns x, which are of no known format",
        ),
        (
            ("optim._target_=own_package.optim.Sgn",),
            "optim._target_=own_package.optim.Sgn cannot be imported",
        ),
        (("callbacks.seen.wrod=x",), "did you mean callbacks.seen.word?"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_one_message(
    mine: Path, lorakit: Call, settings: tuple[str, ...], words: str
) -> None:
    code, _, err = lorakit("train", *SETTINGS, *settings)
    assert code == 2 and words in err and "Traceback" not in err, err


def test_such_a_run_is_evaluated_and_reported_from_another_folder(
    mine: Path, lorakit: Call, monkeypatch: pytest.MonkeyPatch
) -> None:
    style = "data.format={_target_: own_package.rows.Style, ending: '!'}"
    code, _, err = lorakit(
        "train", *SETTINGS, style, "data.val_fraction=0.2", "run=styled", "trainer.max_steps=1"
    )
    assert code == 0, err
    code, out, err = lorakit("evaluate", "styled", "--no-samples")
    assert code == 0 and json.loads(out)["rows"] == 8, err
    (mine / "elsewhere").mkdir()
    monkeypatch.chdir(mine / "elsewhere")
    code, out, err = lorakit("evaluate", str(mine / "runs/styled"), "--no-samples", "--no-base")
    assert code == 0 and json.loads(out)["rows"] == 8, err
    code, _, err = lorakit("evaluate", str(mine / "runs/styled"), "--columns", "prompt")
    assert code == 2 and "write OURS=THEIRS" in err


def test_a_format_may_be_an_object_with_settings(mine: Path, lorakit: Call) -> None:
    code, out, err = lorakit(
        "show", *SETTINGS, "data.format={_target_: own_package.rows.Style, ending: '!'}", "-n", "1"
    )
    assert code == 0 and "⟦ 0!<|im_end|>⟧" in out and "40 rows" in out, err
