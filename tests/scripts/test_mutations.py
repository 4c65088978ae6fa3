"""The table of mutations fits the code, and the tests notice each of them."""

from __future__ import annotations

import collections
import os
import subprocess
import sys
from pathlib import Path

import mutations
import pytest
from mutations import MUTATIONS

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "scripts" / "mutations.py"


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.file)
def test_the_old_text_stands_there_once_and_the_tests_are_there(
    mutation: mutations.Mutation,
) -> None:
    text = (ROOT / "lorakit" / mutation.file).read_text(encoding="utf-8")
    assert text.count(mutation.old) == 1 and mutation.old != mutation.new
    assert mutation.tests
    for test in mutation.tests:
        path, _, name = test.partition("::")
        assert f"\ndef {name.partition('[')[0]}(" in (ROOT / path).read_text(encoding="utf-8")


def test_every_folder_with_code_is_broken_twice() -> None:
    package = ROOT / "lorakit"
    folders = {
        str(path.parent.relative_to(package))
        for path in package.rglob("*.py")
        if path.name != "__init__.py"
    }
    counts = collections.Counter(str(Path(mutation.file).parent) for mutation in MUTATIONS)
    assert {"service/http", "weights", "."} <= folders
    assert {folder for folder in folders if counts[folder] < 2} == set()
    assert len(set(MUTATIONS)) == len(MUTATIONS) >= 36


def test_what_does_not_fit_is_told_before_anything_runs() -> None:
    right, *_ = MUTATIONS
    gone = mutations.Mutation("errors.py", "no such text", "", right.tests)
    untested = mutations.Mutation(right.file, right.old, right.new, ("tests/test_conf.py::test_x",))
    assert mutations.find_table_problems([right]) == []
    problems = mutations.find_table_problems([gone, untested])
    assert "stands there 0 times" in problems[0] and "there is no tests/test_conf" in problems[1]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """Run Python as a user would, without what pytest has set."""
    environment = {name: os.environ[name] for name in ("PATH", "HOME") if name in os.environ}
    return subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env={**environment, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.slow
def test_all_are_caught() -> None:
    done = run(str(PROGRAM))
    last = done.stdout.rstrip().splitlines()[-1:]
    assert done.returncode == 0, done.stdout + done.stderr
    assert last[0].startswith(f"{len(MUTATIONS)} of {len(MUTATIONS)} mutations were caught")


CONTROLS = """
import sys
sys.path.insert(0, "scripts")
import mutations
from mutations import Mutation
test = "test_all_problems_come_in_one_report_with_20_shown_and_the_total"
tests = (f"tests/data/read/test_lines.py::{test}",)
mutations.MUTATIONS = (
    Mutation("errors.py", "MAX_SHOWN = 20", "MAX_SHOWN = 10", tests),
    Mutation("errors.py", "MAX_SHOWN = 20", "MAX_SHOWN = 10 + 10", tests),
    Mutation("errors.py", "MAX_SHOWN = 20", "MAX_SHOWED = 20", tests),
    Mutation("data/read/lines.py", "from __future__", "from __past__", tests),
)
mutations.main()
"""


@pytest.mark.slow
def test_the_control_what_changes_nothing_or_cannot_run_is_not_caught() -> None:
    done = run("-c", CONTROLS)
    assert done.returncode == 1, done.stdout + done.stderr
    found = [line.split(" ")[0] for line in done.stdout.splitlines() if ".py: " in line]
    assert sorted(found) == ["NOT", "PROBLEM", "PROBLEM", "caught"], done.stdout
    assert "1 of 4 mutations were caught" in done.stdout
