"""Where the config files are."""

from __future__ import annotations

from pathlib import Path


def conf_dir() -> Path:
    """Return conf/ inside the package (a wheel), or beside it (an editable install)."""
    package = Path(__file__).resolve().parent.parent
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"
