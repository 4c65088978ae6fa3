"""Configs of the models that lorakit names, for plans where the hub is out of reach. Published
with the models, under Apache 2.0.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent / "presets"
_NAMES = {"Qwen/Qwen3-30B-A3B": "qwen3_30b_a3b", "Qwen/Qwen3-VL-30B-A3B": "qwen3_vl_30b_a3b"}


def preset_config(path: str) -> Any | None:
    """Return the transformers config of the named model (``Qwen/Qwen3-30B-A3B``, or with a
    suffix like ``-Instruct-2507``), or None.
    """
    from transformers import AutoConfig

    for stem, file in _NAMES.items():
        if path == stem or path.startswith(f"{stem}-"):
            settings = json.loads((_FOLDER / f"{file}.json").read_text(encoding="utf-8"))
            return AutoConfig.for_model(settings.pop("model_type"), **settings)
    return None
