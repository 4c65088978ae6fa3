"""Writes docs/settings.md from conf/: `python scripts/make_settings_page.py`. A test compares."""

from __future__ import annotations

from pathlib import Path

from lorakit.config.documentation import as_page, read_choices

PAGE = Path(__file__).resolve().parents[1] / "docs" / "settings.md"


def page() -> str:
    """The page's text."""
    return as_page(read_choices())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
