"""Files of a model as the hub has them, where ``save_pretrained`` writes them another way.

Qwen3-VL-MoE's stacks of experts are (E, in, out) on the hub and (E, out, in) in the model.
transformers' loader takes both where it can tell them apart by shape, which it cannot under ZeRO-3,
nor can other programs; so what is written is what the hub has.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file

from lorakit.runs.files import write_json

# model type -> endings of names
_TURNED = {"qwen3_vl_moe": (".mlp.experts.gate_up_proj", ".mlp.experts.down_proj")}
_PROCESSOR_FILES = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
    "chat_template.json",
)


def save_as_hub(model: Any, folder: Path) -> None:
    """Write ``model`` to ``folder``, its tensors oriented as the hub's. One file at a time is
    read and written again.
    """
    model.save_pretrained(folder)
    if not (endings := _TURNED.get(model.config.model_type)):
        return
    for file in sorted(folder.glob("*.safetensors")):
        tensors = load_file(file)
        if any(name.endswith(endings) for name in tensors):
            turned = {
                name: tensor.mT.contiguous() if name.endswith(endings) else tensor
                for name, tensor in tensors.items()
            }
            save_file(turned, file, metadata={"format": "pt"})


def copy_processor(
    base_path: str,
    folder: Path,
    *,
    pixel_bounds: tuple[int | None, int | None] = (None, None),
    **options: Any,
) -> None:
    """Copy to ``folder`` what the base has for images.

    Args:
        pixel_bounds: least and most pixels of an image, as the adapter was trained; None leaves
            what the base has.
    """
    from transformers.utils import cached_file

    for name in _PROCESSOR_FILES:
        found = cached_file(
            base_path,
            name,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
            **options,
        )
        if found:
            (folder / name).write_bytes(Path(found).read_bytes())
    if any(pixel_bounds):
        for name in ("preprocessor_config.json", "processor_config.json"):
            if (folder / name).is_file():
                _set_bounds(folder / name, *pixel_bounds)


def _set_bounds(file: Path, min_pixels: int | None, max_pixels: int | None) -> None:
    """Write the bounds under the names that the file has for them."""
    settings = json.loads(file.read_text(encoding="utf-8"))
    of_images = settings.get("image_processor", settings)
    if not {"size", "min_pixels", "max_pixels"} & set(of_images):
        return
    named = {
        "shortest_edge": min_pixels,
        "longest_edge": max_pixels,
        "min_pixels": min_pixels,
        "max_pixels": max_pixels,
    }
    for place in (of_images, of_images.get("size") or {}):
        place.update({name: bound for name, bound in named.items() if bound and name in place})
    write_json(file, settings)
