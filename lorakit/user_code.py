"""Code of the user's own, by its dotted name."""

from __future__ import annotations

import importlib
import os
import sys
from typing import Any


def import_by_name(dotted: str) -> Any:
    """Return what ``package.module.name`` names, in a package beside the runs too.

    Raises:
        ImportError, AttributeError, ValueError: it is not there, or no such name.
    """
    module, _, name = dotted.rpartition(".")
    if "" not in sys.path and (here := os.getcwd()) not in sys.path:
        sys.path.append(here)  # as `python -m` would, but last of all
    return getattr(importlib.import_module(module), name)
