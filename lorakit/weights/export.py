"""A trained adapter in the layouts that other programs read: PEFT's own, and vLLM's."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from lorakit.errors import AdapterError, report
from lorakit.lora.layouts import (
    Factors,
    expand_shared_outer,
    from_file_tensors,
    to_each_expert,
    to_file_tensors,
)
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER
from lorakit.model.families import OF_IMAGES, ExpertStack, find_targets
from lorakit.weights.adapter import CONFIG_FILE, TENSOR_FILE, TINKER_LEAVES, AdapterFiles

PREFIX = "base_model.model."
# Families whose experts vLLM takes stacked, as PEFT writes them (their classes say
# `is_3d_moe_weight`); of others it needs each expert.
_STACKED_IN_VLLM = ("gpt_oss", "qwen3_vl_moe", "qwen3_5_moe")
# Families whose experts it takes one by one: what it calls the module that holds them, and their
# matrices.
_AS_THE_MODEL = ("mlp", {"gate_proj": "gate_proj", "up_proj": "up_proj", "down_proj": "down_proj"})
_NAMES_IN_VLLM = {
    **dict.fromkeys(
        ("qwen2_moe", "qwen3_moe", "olmoe", "deepseek_v2", "deepseek_v3"), _AS_THE_MODEL
    ),
    "mixtral": ("block_sparse_moe", {name: theirs for theirs, name in TINKER_LEAVES.items()}),
}


def write_peft(
    adapter: AdapterFiles, model: Any, folder: Path, *, dtype: torch.dtype | None = None
) -> int:
    """Write ``adapter`` to the existing ``folder`` with one pair of factors per expert and return
    the bytes of the tensors.

    The function of the adapter does not change: see ``expand_shared_outer``. ``model`` is the base,
    which may be on the meta device; ``dtype`` None keeps the adapter's own.
    """
    tensors, config = adapter.tensors(), dict(adapter.config)
    if matrices := adapter.expert_matrices():
        stacks = _expand(tensors, matrices, model)
        leaves = {name.rpartition(".")[2] for name in matrices} - {
            name.split(".lora_")[0].rpartition(".")[2] for name in tensors
        }
        config |= _name_stacks(config, stacks, leaves)
    return _write(tensors, config, folder, dtype)


def write_vllm(
    adapter: AdapterFiles, model: Any, folder: Path, *, dtype: torch.dtype | None = None
) -> int:
    """Write ``adapter`` to the existing ``folder`` as vLLM reads it and return the bytes of the
    tensors.

    Most families' experts get a pair of factors for each matrix of each expert, named as the hub's
    files name them (``experts.0.gate_proj.lora_A.weight``); those that vLLM holds stacked, PEFT's
    layout. The function does not change.

    Raises:
        AdapterError: the adapter has what vLLM would not apply, or only some of the experts'
            matrices.
    """
    refuse_what_vllm_drops(adapter, model)
    if is_stacked_in_vllm(model):
        return write_peft(adapter, model, folder, dtype=dtype)
    tensors, config = adapter.tensors(), dict(adapter.config)
    layout = SHARED_OUTER if adapter.expert_matrices() else PER_EXPERT
    parent, names = _NAMES_IN_VLLM.get(model.config.model_type, _AS_THE_MODEL)
    leaves: set[str] = set()
    for module, stack in expert_stacks(model):
        if not (factors := _take_factors(tensors, module, stack, layout)):
            continue
        each = to_each_expert(
            factors, stack.num_experts, is_concatenated=stack.module.is_concatenated
        )
        if lost := set(names) - {matrix for _, matrix, _ in each}:
            raise AdapterError(
                f"{module}: vLLM needs an adapter on each matrix of the experts, and"
                f" {', '.join(sorted(lost))} has none; take format=merged"
            )
        if model.config.model_type not in _NAMES_IN_VLLM:
            raise AdapterError(
                f"what vLLM calls the experts of {model.config.model_type} is not known; take"
                " format=merged"
            )
        leaves |= set(names.values())
        begin = f"{PREFIX}{module.removesuffix('.mlp.experts')}.{parent}.experts"
        for (expert, matrix, which), tensor in each.items():
            tensors[f"{begin}.{expert}.{names[matrix]}.{which}.weight"] = tensor
    if leaves:
        named = {
            name for name in config["target_modules"] or () if not name.endswith("experts")
        } - set(TINKER_LEAVES)
        config |= {"target_modules": sorted(named | leaves), "target_parameters": None}
    return _write(tensors, config, folder, dtype)


def is_stacked_in_vllm(model: Any) -> bool:
    """Whether vLLM holds the experts of ``model`` stacked."""
    return str(model.config.model_type).startswith(_STACKED_IN_VLLM)


def largest_rank(config: dict[str, Any]) -> int:
    """The largest rank in an adapter's ``config``, which vLLM must be given."""
    return max(
        int(config["r"]), *(int(rank) for rank in (config.get("rank_pattern") or {}).values()), 1
    )


def refuse_what_vllm_drops(adapter: AdapterFiles, model: Any) -> None:
    """Raise AdapterError where vLLM would leave out, or refuse, a part of ``adapter`` (its LoRA
    documentation, and `PEFTHelper`).
    """
    config, problems = adapter.config, []
    families: dict[str, str] = {}
    for target in find_targets(model):
        if target.family in ("router", "unembedding", *OF_IMAGES):
            families |= {target.name: target.family, target.module: target.family}
    modules = {name.removeprefix(PREFIX).split(".lora_")[0] for name in adapter.tensors()}
    if not hasattr(model.config, "vision_config"):
        modules = {module.removesuffix(".base_layer") for module in modules}
    for family in sorted({families[module] for module in modules if module in families}):
        problems.append(f"an adapter on the {family}, which vLLM does not apply")
    if config.get("use_dora"):
        problems.append("DoRA, which vLLM does not compute")
    for key in ("modules_to_save", "trainable_token_indices", "lora_bias"):
        if config.get(key):
            problems.append(f"{key}, which vLLM does not read")
    if config.get("bias", "none") != "none":
        problems.append("trained biases, which vLLM does not read")
    if problems:
        raise AdapterError(
            report(f"{adapter.folder} has", problems, remedy="format=merged leaves nothing out.")
        )


def expert_stacks(model: Any) -> Iterator[tuple[str, ExpertStack]]:
    """The modules of ``model`` with stacked experts, by name."""
    for module in dict.fromkeys(target.module for target in find_targets(model) if target.outer):
        yield module, ExpertStack(model.get_submodule(module))


def _take_factors(
    tensors: dict[str, torch.Tensor], module: str, stack: ExpertStack, layout: str
) -> Factors:
    """Remove from ``tensors`` what belongs to the experts ``module`` and return it as factors."""
    begin = f"{PREFIX}{module}."
    of_files = {}
    for name in [name for name in tensors if name.startswith(begin)]:
        path, _, which = name.removeprefix(begin).removesuffix(".weight").rpartition("lora_")
        of_files[path, f"lora_{which}"] = tensors.pop(name)
    if not of_files:
        return {}
    has_both = any(path.startswith("base_layer.") for path, _ in of_files)
    parameters = [stack.first, stack.second] if has_both else [_only_stack(of_files, stack)]
    return from_file_tensors(of_files, parameters, layout, stack.num_experts)


def _only_stack(tensors: dict[tuple[str, str], torch.Tensor], stack: ExpertStack) -> str:
    """Which of the two stacks the flat factors in ``tensors`` belong to, by A's input width."""
    widths = {which: tensor.shape[-1] for (_, which), tensor in tensors.items()}
    return stack.first if widths.get("lora_A") == stack.in_features(stack.first) else stack.second


def _write(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    folder: Path,
    dtype: torch.dtype | None,
) -> int:
    flat = {
        name: tensor.to(dtype or tensor.dtype).contiguous().clone()
        for name, tensor in sorted(tensors.items())
    }
    save_file(flat, folder / TENSOR_FILE, metadata={"format": "pt"})
    (folder / CONFIG_FILE).write_text(
        json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8"
    )
    return (folder / TENSOR_FILE).stat().st_size


def _expand(tensors: dict[str, torch.Tensor], matrices: list[str], model: Any) -> list[str]:
    """Replace the shared-outer ``matrices`` in ``tensors`` by PEFT's flat pairs; return the
    names of the stacks.
    """
    stacks = []
    for module in sorted({name.rpartition(".")[0] for name in matrices}):
        stack = ExpertStack(model.get_submodule(module))
        factors = _take_factors(tensors, module, stack, SHARED_OUTER)
        expanded = expand_shared_outer(factors, is_concatenated=stack.module.is_concatenated)
        parameters = [name for name in (stack.first, stack.second) if ("lora_A", name) in expanded]
        for (path, which), tensor in to_file_tensors(expanded, parameters, PER_EXPERT).items():
            tensors[f"{PREFIX}{module}.{path}{which}.weight"] = tensor
        stacks += [f"{module}.{name}" for name in parameters]
    return stacks


def _name_stacks(config: dict[str, Any], stacks: list[str], leaves: set[str]) -> dict[str, Any]:
    """What the config says of ``stacks`` instead of their matrices, called ``leaves``."""
    doubled = [name for name in stacks if name.endswith("gate_up_proj")]
    growth = 2**0.5 if config.get("use_rslora") else 2  # keeps alpha / r, or alpha / sqrt(r)
    return {
        "target_modules": sorted(
            set(config.get("target_modules") or ()) - leaves - set(TINKER_LEAVES)
        ),
        "target_parameters": sorted(stacks),
        "rank_pattern": dict.fromkeys(doubled, 2 * config["r"]),
        "alpha_pattern": dict.fromkeys(doubled, growth * config["lora_alpha"]),
    }
