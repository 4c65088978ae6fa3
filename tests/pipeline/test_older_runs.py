"""A run folder that version 0.1.0 left behind, interrupted after 5 of its 12 steps, is used by
today's version. Beside it lies the history that 0.1.0 itself wrote to the end.
"""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from lorakit.pipeline import resume
from lorakit.runs.folder import History, flatten, open_run

Call = Callable[..., tuple[int, str, str]]
FOLDER = Path(__file__).parent / "version_0_1_0"


@pytest.fixture
def old(workplace: Path) -> Path:
    """The folder of the run, called ``old``."""
    return Path(shutil.copytree(FOLDER / "run", workplace / "runs" / "old"))


def settings_of(run: Path) -> list[str]:
    """What was typed behind ``lorakit train``."""
    return shlex.split(json.loads((run / "run.json").read_text())["command"])[2:]


def losses_of(folder: Path) -> dict[str, float]:
    return {
        f"{name} {record['step']}": record[name]
        for record in History(folder).read()
        for name in ("train/loss", "val/loss")
        if name in record
    }


def test_it_goes_on_as_it_would_have_and_is_merged_and_sampled(old: Path, lorakit: Call) -> None:
    code, out, err = lorakit("train", *settings_of(old), "resume=true")
    assert code == 0, err
    assert "resuming from step 5" in out and open_run(old).is_finished
    found, expected = losses_of(old), losses_of(FOLDER)
    assert found.keys() == expected.keys()
    assert found == pytest.approx(expected, rel=1e-2)  # another processor rounds otherwise
    code, sampled, err = lorakit("sample", "old", "--max-tokens", "4", "--", "English: hello")
    assert code == 0 and sampled.strip(), err
    code, out, err = lorakit("merge", "old", "--out", "merged")
    assert code == 0 and "24 tensors merged" in out, err
    code, out, err = lorakit("runs")
    assert code == 0 and "old" in out and "12/12" in out, err


def test_as_it_was_left_it_is_sampled_and_evaluated(old: Path, lorakit: Call) -> None:
    code, _, err = lorakit("sample", "old", "--max-tokens", "4", "--", "English: hello")
    assert code == 0 and "interrupted after 5 of 12 steps: taking step-000005" in err
    code, out, err = lorakit("evaluate", "old", "--limit", "2", "--no-samples")
    assert code == 0 and json.loads(out)["rows"] == 2, err


def test_another_setting_is_refused_all_the_same(old: Path, lorakit: Call) -> None:
    code, _, err = lorakit("train", *settings_of(old), "resume=true", "lora.dropout=0.1")
    assert code == 2 and "lora.dropout: 0.0 then, 0.1 now" in err


def test_a_key_that_came_later_continues_under_the_value_that_means_the_old_behaviour(
    old: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    now: dict[str, Any] = yaml.safe_load((old / "config.yaml").read_text())
    then = yaml.safe_load((old / "config.yaml").read_text())
    del then["trainer"]["max_bad_steps"]  # as if it had been added since
    (old / "config.yaml").write_text(yaml.safe_dump(then))
    value, run = now["trainer"]["max_bad_steps"], open_run(old)
    assert resume.find_changes(run, now) == [f"trainer.max_bad_steps: 'not set' then, {value} now"]
    monkeypatch.setitem(resume.ADDED_KEYS, "trainer.max_bad_steps", value)
    assert resume.find_changes(run, now) == []
    now["trainer"]["max_bad_steps"] = value + 1
    assert resume.find_changes(run, now) == [
        f"trainer.max_bad_steps: {value} then, {value + 1} now"
    ]


def test_keys_that_came_later_are_in_the_table_and_exist(old: Path, lorakit: Call) -> None:
    code, _, err = lorakit("train", *settings_of(old), "run=new")
    assert code == 0, err
    then = flatten(yaml.safe_load((old / "config.yaml").read_text()))
    now = flatten(yaml.safe_load((old.parent / "new/config.yaml").read_text()))
    later = {key for key in now.keys() - then.keys() if not key.startswith(resume.FREE_KEYS)}
    assert later == resume.ADDED_KEYS.keys()
