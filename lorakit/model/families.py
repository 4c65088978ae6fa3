"""Facts about model families: what their modules are called, and what has been shown about them.

The table holds what cannot be read off a model. Everything else is found by looking: an
``nn.Linear`` below a module whose name says attention belongs to the attention family, and so on.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import nn

from lorakit.model.partition import full_shape

Shape = tuple[int, ...]
FAMILIES = ("attention", "mlp", "experts", "unembedding", "vision", "merger")
# the tower, and what brings its output to the width of the language model
OF_IMAGES = ("vision", "merger")
_ATTENTION_NAMES = ("attn", "attention")
_TOWER_NAMES = ("visual", "vision_tower", "vision_model")
_MERGER_NAMES = ("merger", "deepstack_merger_list", "multi_modal_projector")
_SKIPPED_NAMES = ("audio_tower",)


@dataclass(frozen=True)
class Target:
    """One matrix, or stack of matrices, that LoRA can adapt.

    ``parameter`` is None for a linear module; else the name of the module's own parameter, (E, out,
    in) or (out, in).
    """

    family: str
    module: str
    parameter: str | None
    num_experts: int
    in_features: int
    out_features: int
    # Of a stack with the experts interface: which side is the model's hidden width, and how many
    # matrices share it.
    outer: Literal["in", "out"] | None = None
    num_matrices: int = 1

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    @property
    def leaf(self) -> str:
        """The last part of its name."""
        return self.name.rpartition(".")[2]

    def num_adapter_params(self, rank: int) -> int:
        """Parameters of A (rank x in) and B (out x rank), for each expert."""
        return self.num_experts * rank * (self.in_features + self.out_features)

    def num_shared_params(self, rank: int) -> int:
        """The same where the factor on the outer side is one for all experts, and each matrix of
        the stack has its own pair.
        """
        if self.outer is None:
            return self.num_adapter_params(rank)
        outer, inner = self.in_features, self.out_features
        if self.outer == "out":
            outer, inner = inner, outer
        return rank * (self.num_matrices * outer + self.num_experts * inner)

    def num_expanded_params(self, rank: int) -> int:
        """Parameters of a shared-outer adapter written as one pair per expert: ranks add up."""
        return self.num_matrices * self.num_adapter_params(rank)


def find_targets(model: nn.Module) -> list[Target]:
    """Return everything in ``model`` that LoRA can adapt, family by module, in the model's order.

    Routers are listed under the family ``router``, which no setting switches on: only their name
    does.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    targets = []
    for name, module in model.named_modules():
        if any(part in _SKIPPED_NAMES for part in name.split(".")):
            continue
        if _is_linear(module):
            family = "unembedding" if module is head else _family_of(name)
            in_features, out_features = _features(module)
            targets.append(Target(family, name, None, 1, in_features, out_features))
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if len(full_shape(parameter)) == 3 and _holds_experts(name, module):
                num_experts, first, second = full_shape(parameter)
                is_transposed = bool(getattr(module, "is_transposed", False))
                in_features, out_features = (first, second) if is_transposed else (second, first)
                outer, num_matrices = _outer_side(module, parameter_name)
                size = (num_experts, in_features, out_features)
                targets.append(Target("experts", name, parameter_name, *size, outer, num_matrices))
            elif (
                len(full_shape(parameter)) == 2
                and parameter_name == "weight"
                and _looks_like_router(name, module)
            ):
                out_features, in_features = full_shape(parameter)
                targets.append(Target("router", name, parameter_name, 1, in_features, out_features))
    return targets


def _outer_side(module: nn.Module, parameter: str) -> tuple[Literal["in", "out"] | None, int]:
    if not ExpertStack.supports(module):
        return None, 1
    stack = ExpertStack(module)
    if parameter == stack.second:
        return "out", 1
    return ("in", 2 if stack.module.has_gate else 1) if parameter == stack.first else (None, 1)


class ExpertStack:
    """The facts of a module that holds stacked experts with transformers' experts interface.

    What differs between families (orientation, interleaving, gate, biases, activation) that
    interface declares on the class itself
    (`transformers.integrations.moe.use_experts_implementation`); this reads it, under the field's
    names.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module
        self.first = "gate_up_proj" if self.module.has_gate else "up_proj"
        self.second = "down_proj"

    @staticmethod
    def supports(module: nn.Module) -> bool:
        """Whether ``module`` has that interface, and nothing after the second product that
        would need its result.
        """
        declared = all(
            hasattr(module, name)
            for name in ("has_gate", "has_bias", "is_transposed", "is_concatenated")
        )
        if not declared or getattr(module, "has_post_expert_norm", False):
            return False
        stack = ExpertStack(module)
        return all(
            isinstance(getattr(module, name, None), nn.Parameter)
            for name in (stack.first, stack.second)
        )

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        """Of both stacks, as they are stored."""
        return {
            name: tuple(map(int, full_shape(self.weight(name))))
            for name in (self.first, self.second)
        }

    @property
    def num_experts(self) -> int:
        return self._shapes[self.second][0]

    def weight(self, parameter: str) -> nn.Parameter:
        """A stack as it is stored."""
        found = getattr(self.module, parameter)
        assert isinstance(found, nn.Parameter)
        return found

    def as_EOI(self, stacked: torch.Tensor) -> torch.Tensor:
        """Turn between a stack as it is stored and (E, out, in); either way round."""
        return stacked.mT if self.module.is_transposed else stacked

    def weights(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Both stacks as (E, in, out) views."""
        return self.as_EOI(self.weight(self.first)).mT, self.as_EOI(self.weight(self.second)).mT

    def biases(self) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """Both biases, (E, out), or None."""
        if not self.module.has_bias:
            return None, None
        first, second = (f"{name}_bias" for name in (self.first, self.second))
        return getattr(self.module, first), getattr(self.module, second)

    def activate(self, hidden: torch.Tensor) -> torch.Tensor:
        """What comes between the two products."""
        activate = self.module._apply_gate if self.module.has_gate else self.module.act_fn
        return activate(hidden)

    def parameter_of(self, matrix: str) -> str:
        """The stack that holds a matrix: gate_proj and up_proj share one where there is a gate."""
        return self.first if matrix in ("gate_proj", "up_proj") else matrix

    @staticmethod
    def matrices_of(parameter: str, num_matrices: int) -> tuple[str, ...]:
        """The matrices that a stack holds."""
        return ("gate_proj", "up_proj") if num_matrices == 2 else (parameter,)

    def columns(self, matrix: str) -> slice:
        """Where the outputs of a matrix are among those of its stack."""
        if not self.module.has_gate or matrix not in ("gate_proj", "up_proj"):
            return slice(None)
        gate, up = gate_and_up(self.out_features(self.first), self.module.is_concatenated)
        return gate if matrix == "gate_proj" else up

    def out_features(self, parameter: str) -> int:
        return self._shapes[parameter][2 if self.module.is_transposed else 1]

    def in_features(self, parameter: str) -> int:
        return self._shapes[parameter][1 if self.module.is_transposed else 2]

    def factor_shapes(
        self, ranks: dict[str, int], *, shares_outer: bool
    ) -> dict[str, tuple[str, Shape, Shape]]:
        """Return matrix -> (its stack, shape of A, shape of B) for the stacks in ``ranks``."""
        num_experts = self.num_experts
        shapes: dict[str, tuple[str, Shape, Shape]] = {}
        for parameter, rank in ranks.items():
            num_in, num_out = self.in_features(parameter), self.out_features(parameter)
            shares_a = shares_outer and parameter == self.first
            shares_b = shares_outer and parameter == self.second
            num_matrices = 2 if shares_a and self.module.has_gate else 1
            for matrix in self.matrices_of(parameter, num_matrices):
                shapes[matrix] = (
                    parameter,
                    (1 if shares_a else num_experts, rank, num_in),
                    (1 if shares_b else num_experts, num_out // num_matrices, rank),
                )
        return shapes


def gate_and_up(num_out: int, is_concatenated: bool) -> tuple[slice, slice]:
    """Where the outputs of gate and up are in a stack of both, ``num_out`` wide: one after the
    other, or gate0, up0, gate1, up1, …
    """
    if is_concatenated:
        return slice(0, num_out // 2), slice(num_out // 2, None)
    return slice(0, None, 2), slice(1, None, 2)


def packing_is_doubtful(config: Any) -> str | None:
    """Return why documents packed into one row of this model may leak into one another, or None.

    Layers with recurrent or linear attention carry a state over the boundary; full and sliding
    attention do not.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds, name = set(getattr(text, "layer_types", None) or ()), str(text.model_type).lower()
    strange = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if strange:
        return f"{text.model_type} has layers of type {', '.join(sorted(strange))}"
    if any(word in name for word in ("bloom", "mpt", "opt", "gpt_oss")):
        # measured: leaks of 0.93 to 1.0
        return f"{text.model_type} does not isolate documents by their positions"
    recurrent = ("mamba", "rwkv", "recurrent", "ssm", "xlstm", "jamba", "zamba", "bamba")
    if any(word in name for word in recurrent):
        return f"{text.model_type} is recurrent"
    return None


def row_sharing_problem(config: Any, sp_size: int, max_tokens: int | None = None) -> str | None:
    """Return why ``sp_size`` processes cannot share rows of this model, of at most ``max_tokens``,
    or None.

    What depends on the number of positions in a process, and not on which they are, would be wrong.
    """
    text = config.get_text_config()
    if text.num_attention_heads % sp_size:
        return f"its {text.num_attention_heads} attention heads cannot be divided so"
    if (reason := packing_is_doubtful(config)) is not None:
        return reason
    if moving := sorted({str(entry["rope_type"]) for entry in _moving_ropes(text)}):
        return f"its rotary positions ({', '.join(moving)}) change with the length of a row"
    if getattr(text, "attn_temperature_tuning", False):
        return "its attention is scaled by the place in a row"
    window = getattr(text, "use_sliding_window", True) and getattr(text, "sliding_window", None)
    window = window or getattr(text, "attention_chunk_size", None)
    if window and (max_tokens is None or window < max_tokens):
        return f"its attention has a window of {window} positions, and rows are longer"
    return None


def _moving_ropes(text: Any) -> list[dict[str, Any]]:
    """Settings of rotary positions that change, for all positions, with the length of the
    longest row of a pass.
    """
    rope = getattr(text, "rope_parameters", None) or getattr(text, "rope_scaling", None) or {}
    entries = [entry for entry in (rope, *rope.values()) if isinstance(entry, dict)]
    return [
        entry
        for entry in entries
        if str(entry.get("rope_type", entry.get("type"))) in ("dynamic", "longrope")
    ]


def steady_positions(text: Any) -> int | None:
    """Return how many positions rows may have without changing one another's rotary positions;
    None for any number.
    """
    limits = [
        entry.get("original_max_position_embeddings")
        or getattr(text, "original_max_position_embeddings", None)
        or text.max_position_embeddings
        for entry in _moving_ropes(text)
    ]
    return min(limits, default=None)


def router_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The routers of ``model``'s mixtures of experts, in order."""
    return [
        (name, module) for name, module in model.named_modules() if _looks_like_router(name, module)
    ]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    first, second = full_shape(weight)
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module's own 3-D parameters are stacks of experts."""
    return "experts" in name.rsplit(".", 1)[-1] or "expert" in type(module).__name__.lower()


def speaks_of_images(pattern: str) -> bool:
    """Whether a name or pattern of matrices is meant for those of a vision tower or its merger."""
    return any(name in pattern for name in (*_TOWER_NAMES, *_MERGER_NAMES))


def _family_of(name: str) -> str:
    *parents, leaf = name.split(".")
    if any(part in _MERGER_NAMES for part in parents):
        return "merger"
    if any(part in _TOWER_NAMES for part in parents):
        return "vision"
    if any(word in part for part in parents for word in _ATTENTION_NAMES):
        return "attention"
    if leaf in ("gate", "router", "shared_expert_gate") or "router" in parents:
        return "router"
    if "experts" in parents:
        return "experts"
    return "mlp"


def _looks_like_router(name: str, module: nn.Module) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf in ("gate", "router") and hasattr(module, "weight") and "." in name
