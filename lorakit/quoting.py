"""Text as it is typed: for a shell, and as a value in Hydra's grammar."""

from __future__ import annotations

import re
import shlex


def quote_for_shell(text: str) -> str:
    """``text`` as one word of a shell; with a line's end in it as ``$'…'``."""
    if "\n" not in text:
        return shlex.quote(text)
    escaped = text.replace("\\", "\\\\").replace("'", "\\'").replace("\n", "\\n")
    return f"$'{escaped}'"


def quote_for_hydra(value: str, mark: str = "'") -> str:
    """Quote ``value`` with ``mark`` so that Hydra's grammar gives it back as it is.

    In Hydra's quotes a backslash escapes only a quote (or the backslashes before one); ``${`` would
    begin an interpolation.
    """
    value = re.sub(rf"(\\*){mark}", lambda match: match[1] * 2 + "\\" + mark, value)
    value = re.sub(r"(\\+)$", lambda match: match[1] * 2, value)
    return mark + value.replace("${", "\\${") + mark
