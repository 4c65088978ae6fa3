"""Facts about model families: what their modules are called, and what has been shown about them.

The table holds what cannot be read off a model. Everything else is found by looking: an ``nn.Linear`` below a module whose name
says attention belongs to the attention family, and so on.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

FAMILIES = ("attention", "mlp", "experts", "unembedding")
_ATTENTION_NAMES = ("attn", "attention")
_SKIPPED_NAMES = ("visual", "vision_tower", "vision_model", "audio_tower", "multi_modal_projector")


@dataclass(frozen=True)
class Target:
    """One matrix, or stack of matrices, that LoRA can adapt.

    ``parameter`` is None for a linear module; else the name of the module's own parameter, (E, out, in) or (out, in).
    """

    family: str
    module: str
    parameter: str | None
    num_experts: int
    in_features: int
    out_features: int

    @property
    def name(self) -> str:
        return f"{self.module}.{self.parameter}" if self.parameter else self.module

    def num_adapter_params(self, rank: int) -> int:
        """Parameters of A (rank x in) and B (out x rank), for each expert."""
        return self.num_experts * rank * (self.in_features + self.out_features)


def find_targets(model: nn.Module) -> list[Target]:
    """Return everything in ``model`` that LoRA can adapt, family by module, in the model's order.

    Routers are listed under the family ``router``, which no setting switches on: only their name does.
    """
    get_head: Any = getattr(model, "get_output_embeddings", None)
    head = get_head() if get_head else None
    targets = []
    for name, module in model.named_modules():
        if any(part in _SKIPPED_NAMES for part in name.split(".")):
            continue
        if _is_linear(module):
            family = "unembedding" if module is head else _family_of(name, model)
            in_features, out_features = _features(module)
            targets.append(Target(family, name, None, 1, in_features, out_features))
            continue
        for parameter_name, parameter in module.named_parameters(recurse=False):
            if parameter.ndim == 3 and _holds_experts(name, module):
                num_experts, first, second = parameter.shape
                is_transposed = bool(getattr(module, "is_transposed", False))
                in_features, out_features = (first, second) if is_transposed else (second, first)
                targets.append(Target("experts", name, parameter_name, num_experts, in_features, out_features))
            elif parameter.ndim == 2 and parameter_name == "weight" and _looks_like_router(name, module):
                out_features, in_features = parameter.shape
                targets.append(Target("router", name, parameter_name, 1, in_features, out_features))
    return targets


def packing_is_doubtful(config: Any) -> str | None:
    """Return why documents packed into one row of this model may leak into one another, or None.

    Layers with recurrent or linear attention carry a state over the boundary; full and sliding attention do not.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    kinds = set(getattr(text, "layer_types", None) or ())
    strange = kinds - {"full_attention", "sliding_attention", "chunked_attention"}
    if strange:
        return f"{text.model_type} has layers of type {', '.join(sorted(strange))}"
    if any(word in str(text.model_type).lower() for word in ("bloom", "mpt", "opt", "gpt_oss")):
        return f"{text.model_type} does not isolate documents by their positions"  # measured: leaks of 0.93 to 1.0
    recurrent = ("mamba", "rwkv", "recurrent", "ssm", "xlstm", "jamba", "zamba", "bamba")
    if any(word in str(text.model_type).lower() for word in recurrent):
        return f"{text.model_type} is recurrent"
    return None


def router_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """The routers of ``model``'s mixtures of experts, in order."""
    return [(name, module) for name, module in model.named_modules() if _looks_like_router(name, module)]


def _is_linear(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D"


def _features(module: nn.Module) -> tuple[int, int]:
    weight = module.weight
    assert isinstance(weight, nn.Parameter)
    first, second = weight.shape
    return (second, first) if isinstance(module, nn.Linear) else (first, second)


def _holds_experts(name: str, module: nn.Module) -> bool:
    """Whether a module's own 3-D parameters are stacks of experts, and not a convolution's kernel, say."""
    return "experts" in name.rsplit(".", 1)[-1] or "expert" in type(module).__name__.lower()


def _family_of(name: str, model: nn.Module) -> str:
    *parents, leaf = name.split(".")
    if any(word in part for part in parents for word in _ATTENTION_NAMES):
        return "attention"
    if leaf in ("gate", "router") or "router" in parents:
        return "router"
    if leaf == "shared_expert_gate":
        return "router"
    if "experts" in parents:
        return "experts"
    return "mlp"


def _looks_like_router(name: str, module: nn.Module) -> bool:
    leaf = name.rsplit(".", 1)[-1]
    return leaf in ("gate", "router") and hasattr(module, "weight") and "." in name
