"""Overrides as they are typed, and as Hydra's grammar has them: paths are taken verbatim."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorakit.quoting import quote_for_hydra

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


def quote_path(override: str) -> str:
    """Return ``override`` with the value of a path key quoted for Hydra's grammar: it means
    itself, whatever it holds.
    """
    if override in ("logger=null", "callbacks=null"):
        return override.replace("null", "none")  # Hydra knows no empty group, but these have one
    match = OVERRIDE.match(override)
    if match and match["key"] == "data.stop":
        # as a shell user writes a line's end
        value = match["value"].replace("\\n", "\n").replace("\\t", "\t")
        is_list = value.startswith("[") or value == "null"
        return f"{match['prefix'] or ''}data.stop={value if is_list else quote_for_hydra(value)}"
    if not match or not _PATH_KEYS.fullmatch(match["key"]) or match["value"] in ("", "null"):
        return override
    return f"{match['prefix'] or ''}{match['key']}={quote_for_hydra(match['value'])}"


def as_typed(override: Override) -> str:
    """The override as a user types it: what ``quote_path`` has quoted, without its quotes."""
    key, value = override.get_key_element(), override.value()
    is_verbatim = _PATH_KEYS.fullmatch(key.lstrip("+")) or key == "data.stop"
    return f"{key}={value}" if is_verbatim and isinstance(value, str) else str(override.input_line)


_PATH_KEYS = re.compile(
    r"(?:.*\.)?(?:path|\w+_path)|lora\.init_from|data\.chat_template|paths\.\w+|run|group"
)


OVERRIDE = re.compile(r"^(?P<prefix>\+\+|\+)?(?P<key>[\w.@/]+)=(?P<value>.*)$", re.DOTALL)


def value_of_flag(arguments: Sequence[str], *names: str) -> str | None:
    """The value of a flag: the next argument, or what follows its =."""
    for place, argument in enumerate(arguments):
        flag, _, value = argument.partition("=")
        if flag in names:
            return value or next(iter(arguments[place + 1 :]), None)
    return None
