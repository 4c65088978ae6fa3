"""A saved state of the service: a PEFT adapter folder in float32, with the optimiser's tensors
beside it where training can continue.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from lorakit.errors import CheckpointError
from lorakit.lora.flat_parameters import FlatParameters
from lorakit.runs.files import whole_folder, write_json
from lorakit.weights.adapter import AdapterFiles, write_adapter

OPTIMIZER_FILE, STATE_FILE = "optimizer.safetensors", "lorakit_state.json"


@dataclass(frozen=True)
class SavedState:
    """What is in a folder."""

    adapter: AdapterFiles
    facts: dict[str, Any]

    @property
    def has_optimizer(self) -> bool:
        return (self.adapter.folder / OPTIMIZER_FILE).is_file()


def save_trained_state(
    folder: Path,
    layout: FlatParameters,
    vector: torch.Tensor,
    optimizer_state: Mapping[str, torch.Tensor] | None,
    facts: dict[str, Any],
) -> int:
    """Write the folder, whole or not at all, and return its bytes. Raises OSError.

    Args:
        optimizer_state: vectors laid out as the adapter, and single numbers; None leaves the
            optimiser out.
    """
    with whole_folder(folder) as aside:
        write_adapter(layout.file_tensors(vector), layout.peft_config, aside)
        if optimizer_state is not None:
            tensors: dict[str, torch.Tensor] = {}
            for name, tensor in optimizer_state.items():
                if tensor.shape == vector.shape:
                    found = layout.file_tensors(tensor)
                    tensors |= {
                        f"{name}/{part}": value.to("cpu").contiguous().clone()
                        for part, value in found.items()
                    }
                else:
                    tensors[name] = tensor.to("cpu").clone()
            try:
                save_file(tensors, aside / OPTIMIZER_FILE)
            except SafetensorError as error:  # how safetensors reports a full disk
                raise OSError(f"{aside / OPTIMIZER_FILE}: {error}") from error
        write_json(aside / STATE_FILE, facts)
        return sum(path.stat().st_size for path in aside.iterdir())


def open_trained_state(folder: Path) -> SavedState:
    """Read ``folder``, which may be any PEFT adapter. Raises AdapterError, CheckpointError."""
    adapter, path = AdapterFiles.open(folder), folder / STATE_FILE
    try:
        facts = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from error
    return SavedState(adapter, facts)


def read_optimizer(state: SavedState, layout: FlatParameters) -> dict[str, torch.Tensor]:
    """Return the optimiser's state as saved. Raises CheckpointError if missing or torn."""
    path = state.adapter.folder / OPTIMIZER_FILE
    if not state.has_optimizer:
        raise CheckpointError(
            f"{state.adapter.folder} has no optimiser state: load it without, or from what"
            " save_state wrote"
        )
    try:
        tensors = load_file(path)
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path}: torn or not a safetensors file: {error}") from error
    found, vectors = {}, {}  # type: ignore[var-annotated]
    for name, tensor in tensors.items():
        kind, _, part = name.partition("/")
        if part:
            vectors.setdefault(kind, {})[part] = tensor
        else:
            found[kind] = tensor
    return found | {
        kind: layout.from_file_tensors(parts, source=f"{path}: {kind}")
        for kind, parts in vectors.items()
    }
