"""Whether what was exported is what was trained: read again by the program it is for, or, where
that cannot run, held to its layout.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import nn

from lorakit.errors import AdapterError, report
from lorakit.model.families import Shape, find_targets
from lorakit.weights.adapter import TENSOR_FILE, TINKER_LEAVES
from lorakit.weights.export import PREFIX, expert_stacks
from lorakit.weights.merge import TOLERANCE, attach, compute_logits, make_probe

_FACTOR = re.compile(r"(?P<module>.+)\.(?P<which>lora_A|lora_B)\.weight")
_EXPERT = re.compile(r"(?P<module>.+\.experts)\.\d+\.(?P<matrix>\w+)")


@torch.no_grad()
def reload_in_peft(
    base: Any, trained: Path, exported: Path, *, dtype: torch.dtype
) -> tuple[float, float]:
    """Return the largest difference between the logits of plain PEFT with the folder ``exported``
    and lorakit's with ``trained``, and the largest logit.

    Args:
        base: in float32; its own parameters are left as they were.
        dtype: to which the exported factors were rounded, as the trained ones then are.

    Raises:
        AdapterError: they differ by more than 1e-4 of the largest logit, or PEFT refuses the
            folder.
    """
    import peft

    probe = make_probe(base)
    ours = attach(base, trained)
    for name, parameter in ours.named_parameters():
        if "lora_" in name or "trainable_tokens" in name:
            parameter.data = parameter.data.to(dtype).float()
    expected = compute_logits(ours, probe)
    plain = ours.unload()
    try:
        found = compute_logits(peft.PeftModel.from_pretrained(plain, str(exported)).eval(), probe)
    except (ValueError, RuntimeError, KeyError) as error:
        raise AdapterError(f"plain PEFT cannot read what was written: {error}") from error
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    if not difference <= TOLERANCE * largest:
        raise AdapterError(
            f"what plain PEFT makes of the export differs by {difference:.2e} from what was"
            f" trained, more than {TOLERANCE:g} of the largest logit ({largest:.2f}); nothing was"
            " written"
        )
    return difference, largest


def check_layout(folder: Path, model: Any) -> int:
    """Return the number of matrices that the adapter in ``folder`` adapts, each held to the shape
    of its matrix in ``model``.

    Args:
        model: the base, which may be on the meta device.

    Raises:
        AdapterError: a factor of no matrix, without its partner, in another shape, or of some
            experts only.
    """
    with safe_open(folder / TENSOR_FILE, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in list(file.keys())}
    pairs: dict[str, dict[str, Shape]] = {}
    problems = []
    for name, shape in shapes.items():
        if match := _FACTOR.fullmatch(name.removeprefix(PREFIX)):
            pairs.setdefault(match["module"], {})[match["which"]] = shape
        elif not name.endswith(("lora_magnitude_vector", "trainable_tokens_delta")):
            problems.append(f"{name} is no factor of an adapter")
    matrices = _matrices(model)
    for module, pair in pairs.items():
        if module not in matrices:
            problems.append(f"{module} is no matrix of this model")
        elif len(pair) < 2:
            problems.append(f"{module} has {next(iter(pair))} alone")
        else:
            (num_out, num_in, copies), a, b = matrices[module], pair["lora_A"], pair["lora_B"]
            if a[1:] != (num_in,) or b[:1] != (num_out,) or b[1:] != a[:1] or a[0] % copies:
                problems.append(f"{module}: A is {a} and B {b}, of a matrix ({num_out}, {num_in})")
    problems += _find_missing_experts(pairs, model)
    if problems:
        raise AdapterError(report(f"{folder} is not as its readers expect it:", problems))
    return len(pairs)


def _matrices(model: Any) -> dict[str, tuple[int, int, int]]:
    """(out, in, how many share the factors' rank) of each matrix by its names in files."""
    found = {}
    for target in find_targets(model):
        module = model.get_submodule(target.module)
        if target.parameter is None and not isinstance(module, nn.Embedding):
            found[target.module] = (target.out_features, target.in_features, 1)
    for module, stack in expert_stacks(model):
        width, inner = stack.in_features(stack.first), stack.in_features(stack.second)
        found[f"{module}.base_layer"] = (stack.out_features(stack.first), width, stack.num_experts)
        found[module] = (stack.out_features(stack.second), inner, stack.num_experts)
        names = {
            "gate_proj": (inner, width),
            "up_proj": (inner, width),
            "down_proj": (width, inner),
        }
        other = f"{module.removesuffix('.mlp.experts')}.block_sparse_moe.experts"
        for expert in range(stack.num_experts):
            found |= {f"{module}.{expert}.{name}": (*size, 1) for name, size in names.items()}
            found |= {
                f"{other}.{expert}.{theirs}": (*names[ours], 1)
                for theirs, ours in TINKER_LEAVES.items()
            }
    return found


def _find_missing_experts(pairs: dict[str, dict[str, Shape]], model: Any) -> list[str]:
    """Where one expert of a module has an adapter on a matrix, all must."""
    seen: dict[tuple[str, str], int] = {}
    for name in pairs:
        if match := _EXPERT.fullmatch(name):
            key = match["module"], match["matrix"]
            seen[key] = seen.get(key, 0) + 1
    num_experts = max((stack.num_experts for _, stack in expert_stacks(model)), default=0)
    return [
        f"{module}: {count} of {num_experts} experts have an adapter on {matrix}"
        for (module, matrix), count in seen.items()
        if count != num_experts
    ]
