"""A shared-outer adapter written in PEFT's own layout, so that plain PEFT and what reads its files can use it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorakit.lora.layouts import expand_shared_outer, to_file_tensors
from lorakit.lora.spec import PER_EXPERT
from lorakit.model.families import ExpertStack
from lorakit.weights.adapter import CONFIG_FILE, TENSOR_FILE, TINKER_LEAVES, AdapterFiles

_PREFIX = "base_model.model."


def write_peft(adapter: AdapterFiles, model: Any, folder: Path, *, dtype: torch.dtype | None = None) -> int:
    """Write ``adapter`` to the existing ``folder`` with one pair of factors per expert and return the bytes of the tensors.

    The function of the adapter does not change: see ``expand_shared_outer``. ``model`` is the base, which may lie on the meta
    device; ``dtype`` None keeps the adapter's own.
    """
    tensors, config = adapter.tensors(), dict(adapter.config)
    if matrices := adapter.expert_matrices():
        stacks = _expand(tensors, matrices, model)
        leaves = {name.rpartition(".")[2] for name in matrices} - {
            name.split(".lora_")[0].rpartition(".")[2] for name in tensors
        }
        config |= _name_stacks(config, stacks, leaves)
    flat = {name: tensor.to(dtype or tensor.dtype).contiguous() for name, tensor in sorted(tensors.items())}
    save_file(flat, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    return (folder / TENSOR_FILE).stat().st_size


def _expand(tensors: dict[str, torch.Tensor], matrices: list[str], model: Any) -> list[str]:
    """Replace the shared-outer ``matrices`` in ``tensors`` by PEFT's flat pairs; return the names of the stacks."""
    stacks = []
    for module in sorted({name.rpartition(".")[0] for name in matrices}):
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
        stacks += [f"{module}.{name}" for name in parameters]
    return stacks


def _name_stacks(config: dict[str, Any], stacks: list[str], leaves: set[str]) -> dict[str, Any]:
    """What the config says of ``stacks`` instead of their matrices, called ``leaves``."""
    doubled = [name for name in stacks if name.endswith("gate_up_proj")]
    growth = 2**0.5 if config.get("use_rslora") else 2  # keeps alpha / r, or alpha / sqrt(r)
    return {
        "target_modules": sorted(set(config.get("target_modules") or ()) - leaves - set(TINKER_LEAVES)),
        "target_parameters": sorted(stacks),
        "rank_pattern": dict.fromkeys(doubled, 2 * config["r"]),
        "alpha_pattern": dict.fromkeys(doubled, growth * config["lora_alpha"]),
    }
