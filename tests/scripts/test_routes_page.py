"""The page of the server's routes is what the code says."""

from __future__ import annotations

import importlib.util
from pathlib import Path

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "make_routes_page.py"


def test_the_page_of_routes_is_made_from_the_code() -> None:
    spec = importlib.util.spec_from_file_location("make_routes_page", SCRIPT)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert module.PAGE.read_text(encoding="utf-8") == module.page(), (
        "run python scripts/make_routes_page.py"
    )
