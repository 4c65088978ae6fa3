"""Who may import whom: downward only, as the architecture says."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "lorakit"
LAYERS = [
    {"errors"},
    {"extras"},
    {"hub", "own_code"},
    {"model_input"},
    {"types"},
    {"data", "model"},
    {"lora", "loss"},
    {"training", "weights", "strategy", "sampling"},
    {"callbacks", "planner", "sweep", "service"},
    {"launch"},
    {"cli"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}


def _imports(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("lorakit."):
            found.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {
                alias.name.split(".")[1]
                for alias in node.names
                if alias.name.startswith("lorakit.")
            }
    return found


@pytest.mark.parametrize(
    "path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE))
)
def test_imports_point_downward(path: Path) -> None:
    home = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    if home in ("__init__", "__main__"):
        return
    wrong = {name for name in _imports(path) - {home} if LEVEL[name] >= LEVEL[home]}
    assert not wrong, f"{home} may not import {wrong}"


@pytest.mark.parametrize(
    "statement", ["import lorakit, lorakit.types, lorakit.errors", "import lorakit.cli.main"]
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
