"""Recipes are flat programs on the public interface; each runs."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

RECIPES = sorted((Path(__file__).resolve().parents[1] / "recipes").glob("*.py"))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_recipe_is_short(path: Path) -> None:
    assert len(path.read_text(encoding="utf-8").splitlines()) < 200


def test_the_recipe_of_supervised_fine_tuning_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorakit.weights.adapter import AdapterFiles

    monkeypatch.chdir(tmp_path)
    spec = importlib.util.spec_from_file_location("sft", RECIPES[0].with_name("sft.py"))
    assert spec and spec.loader
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    recipe.main(steps="1")
    assert AdapterFiles.open(tmp_path / "adapter").config["r"] == 32
