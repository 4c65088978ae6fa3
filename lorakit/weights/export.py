"""A shared-outer adapter written in PEFT's own layout, so that plain PEFT and what reads its files can use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorakit.errors import AdapterError
from lorakit.lora.layouts import expand_shared_outer, to_file_tensors
from lorakit.lora.spec import PER_EXPERT
from lorakit.model.families import ExpertStack
from lorakit.weights.adapter import CONFIG_FILE, TENSOR_FILE, AdapterFiles

_PREFIX = "base_model.model."


def expand_to_peft(adapter: AdapterFiles, model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write ``adapter`` to the existing ``folder`` with one pair of factors per expert and return the bytes of the tensors.

    The function of the adapter does not change: see ``expand_shared_outer``. ``model`` is the base, which may lie on the meta
    device. Raises AdapterError where the adapter is not shared-outer.
    """
    matrices = adapter.expert_matrices()
    if not matrices:
        raise AdapterError(f"{adapter.folder}: already in PEFT's layout; use the folder as it is")
    tensors = adapter.tensors()
    config = dict(adapter.config)
    modules = sorted({name.rpartition(".")[0] for name in matrices})
    stacks: set[str] = set()
    for module in modules:
        stack = ExpertStack(model.get_submodule(module))
        factors = {
            (which, name.rpartition(".")[2]): tensors.pop(f"{_PREFIX}{name}.{which}.weight")
            for name in matrices
            if name.rpartition(".")[0] == module
            for which in ("lora_A", "lora_B")
        }
        expanded = expand_shared_outer(factors, is_concatenated=stack.module.is_concatenated)
        parameters = [name for name in (stack.first, stack.second) if ("lora_A", name) in expanded]
        for (path, which), tensor in to_file_tensors(expanded, parameters, PER_EXPERT).items():
            tensors[f"{_PREFIX}{module}.{path}{which}.weight"] = tensor
        stacks |= {f"{module}.{name}" for name in parameters}
    still_named = {name.removeprefix(_PREFIX).split(".lora_")[0] for name in tensors if ".experts." not in name}
    leaves = {name.rpartition(".")[2] for name in matrices} - {name.rpartition(".")[2] for name in still_named}
    config["target_modules"] = sorted(set(config.get("target_modules") or ()) - leaves)
    config["target_parameters"] = sorted(stacks)
    doubled = sorted(name for name in stacks if name.endswith("gate_up_proj"))
    growth = 2**0.5 if config.get("use_rslora") else 2  # keeps alpha / r, or alpha / sqrt(r)
    config["rank_pattern"] = dict.fromkeys(doubled, 2 * config["r"])
    config["alpha_pattern"] = dict.fromkeys(doubled, growth * config["lora_alpha"])
    flat = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(flat, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return (folder / TENSOR_FILE).stat().st_size
