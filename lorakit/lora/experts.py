"""LoRA on stacked experts as a PEFT tuner layer: 3-D factors, one layer for all stacks of a module.

PEFT's own layer for stacked parameters folds ``W + s B A`` for all experts at every forward; this
one never makes that sum. It is registered with PEFT as a custom module, so that PEFT's enable,
disable, switch, delete and save work on it.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import peft
import torch
from peft.tuners.lora.layer import LoraLayer
from peft.utils.other import get_pattern_key
from torch import nn

from lorakit.lora.expert_function import FactorPair, run_experts
from lorakit.lora.layouts import (
    expand_shared_outer,
    flatten_a,
    flatten_b,
    from_file_tensors,
    to_file_tensors,
)
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER
from lorakit.model.families import ExpertStack
from lorakit.model.partition import has_values


@dataclass
class ExpertLoraConfig(peft.LoraConfig):
    """PEFT's config of an adapter with factored experts. On disk it is a plain LoraConfig that
    names the stacked parameters.

    Args:
        expert_parameters: names of stacked parameters (``…mlp.experts.gate_up_proj``), whose
            modules are in ``target_modules``.
        expert_layout: ``per_expert`` (PEFT's) or ``shared_outer``.
    """

    expert_parameters: list[str] = field(default_factory=list)
    expert_layout: str = PER_EXPERT

    def to_dict(self) -> dict[str, Any]:
        """The config as it is written: what a plain LoraConfig says of the same adapter."""
        plain = super().to_dict()
        parameters, layout = plain.pop("expert_parameters"), plain.pop("expert_layout")
        if parameters:
            # matters in training only, and PEFT refuses to load stacked parameters with it
            plain["lora_dropout"] = 0.0
        modules = {name.rpartition(".")[0] for name in parameters}
        others = [
            name
            for name in plain["target_modules"] or ()
            if not any(f".{m}".endswith(f".{name}") for m in modules)
        ]
        plain["target_modules"] = sorted(others) or None
        if layout == PER_EXPERT:
            parameters = sorted({*(plain["target_parameters"] or ()), *parameters})
            plain["target_parameters"] = parameters or None
        else:
            leaves = {name.rpartition(".")[2] for name in parameters}
            if "gate_up_proj" in leaves:
                leaves = leaves - {"gate_up_proj"} | {"gate_proj", "up_proj"}
            plain["target_modules"] = sorted({*(plain["target_modules"] or ()), *leaves})
        return plain

    def register(self, model: nn.Module) -> None:
        """Tell PEFT which layer class serves the modules of ``model`` that hold stacks."""
        kinds = {type(module) for module in model.modules() if ExpertStack.supports(module)}
        self._register_custom_module(dict.fromkeys(kinds, ExpertLora))


_FILE_ONLY_NAMES = ("base_layer.lora_A", "base_layer.lora_B", "gate_proj", "up_proj", "down_proj")


class ExpertLora(nn.Module, LoraLayer):
    """Wraps a module of stacked experts. For each adapter ``lora_A`` and ``lora_B`` hold factors by
    the name of their matrix:

    - ``per_expert``: gate_up_proj (or up_proj) and down_proj, A (E, r, in) and B (E, out, r);
    - ``shared_outer``: gate_proj, up_proj and down_proj; A of the former two is (1, r, H), B of the
      last is (1, H, r).
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        *,
        config: ExpertLoraConfig,
        r: int,
        lora_alpha: float,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        super().__init__()
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.lora_A: Any  # adapter -> matrix -> factor
        self.lora_B: Any
        self.products = "auto"  # or loop, grouped: how rows are multiplied
        # adapter -> matrix -> alpha / r, relative to ``scaling``
        self.scales: dict[str, dict[str, float]] = {}
        self.layouts: dict[str, str] = {}
        self._active_adapter = adapter_name
        # PEFT saves what is below a layer's children. These, empty, stand for the names that
        # files have and the layer has not.
        self._modules |= {name: nn.Module() for name in _FILE_ONLY_NAMES}
        self.register_state_dict_post_hook(_to_file_names)
        self.register_load_state_dict_pre_hook(_from_file_names)
        self.update_layer(
            adapter_name, r, lora_alpha=lora_alpha, config=config, target_name=target_name
        )

    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None  # there are several matrices

    @property
    def stack(self) -> ExpertStack:
        """The facts of the wrapped module."""
        return ExpertStack(self.get_base_layer())

    # ---- PEFT's interface

    def update_layer(
        self,
        adapter_name: str,
        r: int,
        lora_alpha: float,
        config: peft.LoraConfig,
        *,
        target_name: str = "",
        **kwargs: Any,
    ) -> None:
        """Add an adapter. Raises ValueError for what PEFT offers on linear layers only."""
        _refuse_variants(config)
        stack, layout = self.stack, getattr(config, "expert_layout", PER_EXPERT)
        wanted = _parameters_of(config, target_name, stack)
        ranks = {
            name: _by_pattern(config.rank_pattern or {}, f"{target_name}.{name}", r)
            for name in wanted
        }
        alphas = {
            name: _by_pattern(config.alpha_pattern or {}, f"{target_name}.{name}", lora_alpha)
            for name in wanted
        }
        shapes = stack.factor_shapes(ranks, shares_outer=layout == SHARED_OUTER)
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.use_rslora[adapter_name], self.layouts[adapter_name] = config.use_rslora, layout
        self.scaling[adapter_name] = _scale(lora_alpha, r, config.use_rslora)
        self.scales[adapter_name] = {
            matrix: _scale(alphas[parameter], ranks[parameter], config.use_rslora)
            / (self.scaling[adapter_name] or 1.0)
            for matrix, (parameter, _, _) in shapes.items()
        }
        self.lora_dropout[adapter_name] = (
            nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
        )
        weight = stack.weight(stack.second)
        dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        empty = functools.partial(torch.empty, device=weight.device, dtype=dtype)
        for factors, place in ((self.lora_A, 1), (self.lora_B, 2)):
            factors[adapter_name] = nn.ParameterDict(
                {matrix: nn.Parameter(empty(found[place])) for matrix, found in shapes.items()}
            )
        self.reset_lora_parameters(adapter_name, config.init_lora_weights)
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def reset_lora_parameters(self, adapter_name: str, init_lora_weights: Any) -> None:
        """Start as PEFT does: A Kaiming-uniform (or Gaussian with deviation 1/r), B zero; both
        random for ``False``.
        """
        is_gaussian = str(init_lora_weights).lower() == "gaussian"
        for a in self.lora_A[adapter_name].values():
            _draw_(a, _gaussian(1 / a.shape[1]) if is_gaussian else _uniform(a.shape[2]))
        for b in self.lora_B[adapter_name].values():
            _draw_(b, _uniform(b.shape[2]) if init_lora_weights is False else nn.init.zeros_)

    def delete_adapter(self, adapter_name: str) -> None:
        super().delete_adapter(adapter_name)
        self.scales.pop(adapter_name, None)
        self.layouts.pop(adapter_name, None)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Add the adapters to the stacks in place, computed in float32 and rounded once."""
        for name in adapter_names or self.active_adapters:
            if name not in self.lora_A or name in self.merged_adapters:
                continue
            for parameter in self.adapted_parameters(name):
                weight = self.stack.weight(parameter)
                merged = weight.data.float() + self.delta_weight(name, parameter)
                if safe_merge and not torch.isfinite(merged).all():
                    raise ValueError(f"adapter {name} is not finite in {parameter}")
                weight.data.copy_(merged)
            self.merged_adapters.append(name)

    def unmerge(self) -> None:
        """Take merged adapters out again."""
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            for parameter in self.adapted_parameters(name):
                weight = self.stack.weight(parameter)
                weight.data.copy_(weight.data.float() - self.delta_weight(name, parameter))

    # ---- the adapter as matrices

    def adapted_parameters(self, adapter_name: str) -> list[str]:
        """The stacked parameters that an adapter changes, in the module's order."""
        stack = self.stack
        changed = {stack.parameter_of(matrix) for matrix in self.lora_A[adapter_name]}
        return [name for name in (stack.first, stack.second) if name in changed]

    def scale_of(self, adapter_name: str, matrix: str) -> float:
        """Return s of a matrix: ``scaling``, which PEFT's helpers change, times what patterns of
        rank and alpha make of it.
        """
        return self.scaling[adapter_name] * self.scales[adapter_name][matrix]

    @torch.no_grad()
    def delta_weight(self, adapter_name: str, parameter: str) -> torch.Tensor:
        """Return s B A of a stack in float32, in the stack's own orientation. It is as large as
        the stack: for merging only.
        """
        stack = self.stack
        weight = stack.weight(parameter)
        delta_EOI = torch.zeros(stack.as_EOI(weight).shape, device=weight.device)
        for matrix in self.lora_A[adapter_name]:
            if stack.parameter_of(matrix) == parameter:
                a = self.lora_A[adapter_name][matrix].float()
                b = self.lora_B[adapter_name][matrix].float()
                product = b.expand(len(weight), -1, -1) @ a.expand(len(weight), -1, -1)
                delta_EOI[:, stack.columns(matrix)] += self.scale_of(adapter_name, matrix) * product
        return stack.as_EOI(delta_EOI)

    @torch.no_grad()
    def peft_factors(
        self, adapter_name: str, parameter: str
    ) -> tuple[torch.Tensor, torch.Tensor, float]:
        """Return (A, B, scale) of a stack in float32, in PEFT's layout, expanded."""
        factors = {
            (which, m): f.float()
            for which in ("lora_A", "lora_B")
            for m, f in getattr(self, which)[adapter_name].items()
        }
        if self.layouts[adapter_name] == SHARED_OUTER:
            factors = expand_shared_outer(
                factors, is_concatenated=self.stack.module.is_concatenated
            )
        matrix = next(
            m for m in self.lora_A[adapter_name] if self.stack.parameter_of(m) == parameter
        )
        scale = self.scale_of(adapter_name, matrix)
        a, b = factors["lora_A", parameter], factors["lora_B", parameter]
        return flatten_a(a), flatten_b(b), scale

    # ---- forward

    @torch.compiler.disable  # its blocks depend on what the router chose
    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """Return the output (T, H) for tokens (T, H), their experts and weights (T, top_k)."""
        if self.disable_adapters and self.merged:
            self.unmerge()
        names = [name for name in self.active_adapters if name in self.lora_A]
        inputs = (hidden_states, top_k_index, top_k_weights)
        if self.disable_adapters or self.merged or not names:
            # here alone transformers' `experts_implementation` matters
            return self.base_layer(*inputs)
        return run_experts(self, self.stack, *inputs, *self._pairs(names), products=self.products)

    def _pairs(
        self, names: list[str]
    ) -> tuple[tuple[FactorPair, ...], tuple[FactorPair, ...], list[torch.Tensor]]:
        stack = self.stack
        first: list[FactorPair] = []
        second: list[FactorPair] = []
        factors: list[torch.Tensor] = []
        for name in names:
            dropout = self.lora_dropout[name]
            probability = dropout.p if isinstance(dropout, nn.Dropout) and self.training else 0.0
            for matrix in self.lora_A[name]:
                seed = _draw_seed() if probability else 0
                pair = FactorPair(
                    len(factors) // 2,
                    stack.columns(matrix),
                    self.scale_of(name, matrix),
                    self.layouts[name] == SHARED_OUTER,
                    probability,
                    seed,
                )
                (second if stack.parameter_of(matrix) == stack.second else first).append(pair)
                factors += [self.lora_A[name][matrix], self.lora_B[name][matrix]]
        return tuple(first), tuple(second), factors


def _to_file_names(
    layer: ExpertLora, state: dict[str, Any], prefix: str, local_metadata: Any
) -> None:
    """In a state dict the factors bear the names, and have the shapes, that they have in files."""
    for adapter, layout in layer.layouts.items():
        found = {
            (which, matrix): state.pop(f"{prefix}{which}.{adapter}.{matrix}")
            for which in ("lora_A", "lora_B")
            for matrix in layer.lora_A[adapter]
        }
        for (path, which), tensor in to_file_tensors(
            found, layer.adapted_parameters(adapter), layout
        ).items():
            state[f"{prefix}{path}{which}.{adapter}.weight"] = tensor


def _from_file_names(
    layer: ExpertLora,
    state: dict[str, Any],
    prefix: str,
    local_metadata: Any,
    strict: bool,
    missing: Any,
    unexpected: Any,
    errors: list[str],
) -> None:
    for adapter, layout in layer.layouts.items():
        ending = f".{adapter}.weight"
        found = {
            tuple(key[len(prefix) : -len(ending)].rpartition("lora_")[::2]): key
            for key in state
            if key.startswith(prefix) and key.endswith(ending)
        }
        tensors = {(path, f"lora_{which}"): state[key] for (path, which), key in found.items()}
        try:
            factors = from_file_tensors(
                tensors, layer.adapted_parameters(adapter), layout, layer.stack.num_experts
            )
        except ValueError as error:
            errors.append(f"{prefix}: {error}")
            continue
        for key in found.values():
            del state[key]
        state |= {
            f"{prefix}{which}.{adapter}.{matrix}": tensor
            for (which, matrix), tensor in factors.items()
        }


def _parameters_of(config: Any, module_name: str, stack: ExpertStack) -> list[str]:
    """The stacks of module ``module_name`` that ``config`` names; both where it names none."""
    names = getattr(config, "expert_parameters", None)
    if not names:
        return [stack.first, stack.second]
    return [
        p
        for p in (stack.first, stack.second)
        if any(f"{module_name}.{p}" == n or f"{module_name}.{p}".endswith(f".{n}") for n in names)
    ]


def _by_pattern(patterns: dict[str, Any], key: str, default: Any) -> Any:
    return patterns.get(get_pattern_key(list(patterns), key), default)


def _uniform(num_in: int) -> Callable[[torch.Tensor], Any]:
    bound = 1 / math.sqrt(num_in)
    return lambda tensor: nn.init.uniform_(tensor, -bound, bound)


def _gaussian(deviation: float) -> Callable[[torch.Tensor], Any]:
    return lambda tensor: nn.init.normal_(tensor, std=deviation)


@torch.no_grad()
def _draw_(tensor: torch.Tensor, draw: Callable[[torch.Tensor], Any]) -> None:
    """Fill ``tensor`` with numbers of the CPU's generator, drawn in float32: the same on every
    device, rounded where the base is.
    """
    if tensor.device.type == "meta":
        return
    drawn = torch.empty(tensor.shape, dtype=torch.float32, device="cpu")
    draw(drawn)
    tensor.copy_(drawn)


def _draw_seed() -> int:
    """A seed of torch's own random numbers; where nothing has values, any."""
    drawn = torch.randint(2**62, ())
    return int(drawn) if has_values(drawn) else 0


def _scale(alpha: float, rank: int, use_rslora: bool) -> float:
    return alpha / (math.sqrt(rank) if use_rslora else rank)


def _refuse_variants(config: Any) -> None:
    refused = [
        name for name in ("use_dora", "lora_bias", "fan_in_fan_out") if getattr(config, name, False)
    ]
    if config.init_lora_weights not in (True, False, "gaussian"):
        refused.append(f"init_lora_weights={config.init_lora_weights}")
    if refused:
        raise ValueError(f"stacked experts have no {', '.join(refused)}")
