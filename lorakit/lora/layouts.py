"""The factors of stacked experts in files: PEFT's flat matrices, the shared-outer form that SGLang
serves, and back.

Nothing else in lorakit knows how these files lay experts and ranks out.

- PEFT: one pair per stack. ``lora_A`` is (E * R, in) with rows (expert, rank), ``lora_B`` (out, R *
  E) with columns (rank, expert): the expert is the slower index there and the faster one here. Two
  stacks of a module are nested: the last one's tensors are under ``experts.lora_A``, the one's
  before it under ``experts.base_layer.lora_A``.
- shared-outer: one pair per matrix, ``experts.gate_proj.lora_A``, three-dimensional; what touches
  the hidden dimension has one entry for all experts (github.com/sgl-project/sglang/pull/21466;
  tinker's own archives name the same matrices w1, w3 and w2).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER
from lorakit.model.families import gate_and_up

# (lora_A or lora_B, matrix) -> (E or 1, r, in) or (E or 1, out, r)
Factors = dict[tuple[str, str], torch.Tensor]
# (path below the module, lora_A or lora_B) -> as it is in a file
FileTensors = dict[tuple[str, str], torch.Tensor]


def to_file_tensors(factors: Factors, parameters: Sequence[str], layout: str) -> FileTensors:
    """Return the factors of one module as files hold them. ``parameters``: the adapted stacks,
    in the module's order.
    """
    if layout == SHARED_OUTER:
        return {(f"{matrix}.", which): tensor for (which, matrix), tensor in factors.items()}
    tensors = {}
    for (which, matrix), tensor in factors.items():
        path = peft_path(matrix, parameters)
        tensors[path, which] = flatten_a(tensor) if which == "lora_A" else flatten_b(tensor)
    return tensors


def from_file_tensors(
    tensors: FileTensors, parameters: Sequence[str], layout: str, num_experts: int
) -> Factors:
    """The inverse. Raises ValueError for a tensor that does not belong to the layout."""
    factors = {}
    by_path = {peft_path(parameter, parameters): parameter for parameter in parameters}
    for (path, which), tensor in tensors.items():
        if layout == SHARED_OUTER and path.endswith(".") and tensor.ndim == 3:
            factors[which, path[:-1]] = tensor
        elif layout == PER_EXPERT and path in by_path and tensor.ndim == 2:
            split = split_a if which == "lora_A" else split_b
            factors[which, by_path[path]] = split(tensor, num_experts)
        else:
            raise ValueError(
                f"{path}{which} of shape {tuple(tensor.shape)} is not of the {layout} layout"
            )
    return factors


def to_each_expert(
    factors: Mapping[tuple[str, str], torch.Tensor],
    num_experts: int,
    *,
    is_concatenated: bool = True,
) -> dict[tuple[int, str, str], torch.Tensor]:
    """Return (expert, matrix, lora_A or lora_B) -> (r, in) or (out, r): a pair for each matrix of
    each expert, as the hub names them.

    Gate and up of one stack share their A; each has its rows of B.
    """
    each: dict[tuple[int, str, str], torch.Tensor] = {}
    for (which, name), tensor in factors.items():
        whole = tensor.expand(num_experts, -1, -1)
        if name != "gate_up_proj":
            parts = {name: whole}
        elif which == "lora_A":
            parts = {"gate_proj": whole, "up_proj": whole}
        else:
            gate, up = gate_and_up(whole.shape[1], is_concatenated)
            parts = {"gate_proj": whole[:, gate], "up_proj": whole[:, up]}
        each |= {
            (expert, matrix, which): part[expert]
            for matrix, part in parts.items()
            for expert in range(num_experts)
        }
    return each


def peft_path(parameter: str, parameters: Sequence[str]) -> str:
    """Where PEFT keeps the tensors of a stack below the module's name."""
    return "base_layer." * (len(parameters) - 1 - list(parameters).index(parameter))


def flatten_a(a_ERI: torch.Tensor) -> torch.Tensor:
    """(E, R, in) -> (E * R, in)."""
    return a_ERI.reshape(-1, a_ERI.shape[2])


def flatten_b(b_EOR: torch.Tensor) -> torch.Tensor:
    """(E, out, R) -> (out, R * E)."""
    return b_EOR.permute(1, 2, 0).reshape(b_EOR.shape[1], -1)


def split_a(a: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(E * R, in) -> (E, R, in). Raises ValueError where E does not divide the rows."""
    if len(a) % num_experts:
        raise ValueError(f"lora_A has {len(a)} rows, which is no multiple of {num_experts} experts")
    return a.reshape(num_experts, -1, a.shape[1])


def split_b(b: torch.Tensor, num_experts: int) -> torch.Tensor:
    """(out, R * E) -> (E, out, R). Raises ValueError where experts would have different
    numbers of columns.
    """
    if b.shape[1] % num_experts:
        raise ValueError(
            f"lora_B has {b.shape[1]} columns, which is no multiple of {num_experts} experts"
        )
    return b.reshape(b.shape[0], -1, num_experts).permute(2, 0, 1)


def expand_shared_outer(
    factors: Mapping[tuple[str, str], torch.Tensor], *, is_concatenated: bool = True
) -> Factors:
    """Return shared-outer factors of one module as one pair of per-expert factors for each stack;
    the same function exactly.

    Gate and up become one pair of rank 2r: A = [A_gate; A_up] for every expert, B = [B_gate 0; 0
    B_up]. The scale of each pair must stay alpha / r, so its alpha doubles with its rank (with
    rsLoRA it grows by the root of 2).
    """
    expanded: Factors = {}
    num_experts = max(tensor.shape[0] for tensor in factors.values())
    if ("lora_A", "down_proj") in factors:
        a, b = factors["lora_A", "down_proj"], factors["lora_B", "down_proj"]
        expanded["lora_A", "down_proj"] = a
        expanded["lora_B", "down_proj"] = b.expand(num_experts, -1, -1)
    if ("lora_A", "gate_proj") in factors:
        a = torch.cat([factors["lora_A", "gate_proj"], factors["lora_A", "up_proj"]], dim=1)
        gate_EIR, up_EIR = factors["lora_B", "gate_proj"], factors["lora_B", "up_proj"]
        num_out, rank = gate_EIR.shape[1], gate_EIR.shape[2]
        b = gate_EIR.new_zeros((num_experts, 2 * num_out, 2 * rank))
        gate_rows, up_rows = gate_and_up(2 * num_out, is_concatenated)
        b[:, gate_rows, :rank], b[:, up_rows, rank:] = gate_EIR, up_EIR
        expanded["lora_A", "gate_up_proj"] = a.expand(num_experts, -1, -1)
        expanded["lora_B", "gate_up_proj"] = b
    elif ("lora_A", "up_proj") in factors:
        expanded["lora_A", "up_proj"] = factors["lora_A", "up_proj"].expand(num_experts, -1, -1)
        expanded["lora_B", "up_proj"] = factors["lora_B", "up_proj"]
    return expanded
