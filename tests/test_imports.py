"""Who may import whom: downward only, never one's own row, never in a circle. Imports under
TYPE_CHECKING and inside of functions count.
"""

from __future__ import annotations

import ast
import graphlib
import os
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lorakit"
ROWS = [  # from the bottom
    {"errors"},
    {"extras"},
    {"runs", "hub", "user_code", "model_input", "quoting"},
    {"types"},
    {"data", "model"},
    {"lora", "loss", "strategy"},
    {"weights", "sampling", "config"},
    {"training"},
    {"evaluation"},
    {"callbacks", "planner", "sweep", "reports", "service", "launch"},
    {"pipeline"},
    {"cli"},
]
ROW_OF = {name: number for number, names in enumerate(ROWS) for name in names}
FILES = {
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}


def _imports(path: Path) -> set[str]:
    """The files of lorakit that ``path`` imports, by their dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
            found |= {name if name in FILES else node.module for name in names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found & FILES.keys()


def _room(name: str) -> str:
    return name.split(".")[1] if "." in name else ""


@pytest.mark.parametrize("name", FILES)
def test_imports_point_downward(name: str) -> None:
    home = _room(name)
    if home in ("", "__main__"):
        return
    rooms = {_room(other) for other in _imports(FILES[name])} - {home, ""}
    wrong = {room for room in rooms if ROW_OF[room] >= ROW_OF[home]}
    assert not wrong, f"{home} may not import {wrong}"


def test_no_files_import_each_other_in_a_circle() -> None:
    files = {name: _imports(path) - {name, "lorakit"} for name, path in FILES.items()}
    graphlib.TopologicalSorter(files).prepare()  # raises CycleError, which names the files


# What Hydra, torchrun and SLURM start needs torch at once; a command answers --help first.
COMMANDS = sorted(
    name
    for name in FILES
    if name.startswith("lorakit.cli.") and name.rpartition(".")[2] not in ("agent", "sweeper")
)


@pytest.mark.parametrize(
    "statement",
    ["import lorakit, lorakit.types, lorakit.errors", f"import {', '.join(COMMANDS)}"],
    ids=["package", "commands"],
)
def test_the_package_imports_without_torch(statement: str) -> None:
    code = (
        f"import sys; {statement}; sys.exit(any(name in sys.modules for name in ('torch', 'hydra',"
        " 'transformers')))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_helpers_of_tests_and_scripts_have_names_of_their_own() -> None:
    """pytest puts each of their folders on the path: of two of one name a test would import the
    first.
    """
    root = PACKAGE.parent
    names = [
        path.name
        for folder in ("tests", "scripts")
        for path in (root / folder).rglob("*.py")
        if path.name != "conftest.py"
    ]
    assert sorted(names) == sorted({*names})


def test_hydras_plugin_costs_other_programs_of_the_environment_nothing() -> None:
    """Hydra imports it in all of them, so it may import nothing that Hydra has not."""
    code = """
import sys
from hydra.core.plugins import Plugins
from hydra.plugins.sweeper import Sweeper
plugins = Plugins.instance()
names = {f'{kind.__module__}.{kind.__name__}' for kind in plugins.discover(Sweeper)}
assert {'hydra_plugins.lorakit.OptunaSweeper', 'hydra_plugins.lorakit.WandbSweeper'} <= names
assert not {'lorakit', 'torch', 'optuna'} & {name.partition('.')[0] for name in sys.modules}
seconds = plugins.get_stats().modules_import_time['hydra_plugins.lorakit']
assert seconds <= 0.02, seconds
"""
    environment = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment
    )
    assert result.returncode == 0, result.stderr
