"""An adapter as one vector: where each factor is in it, what it scales, and what files call it.

One vector makes of an optimiser step a few operations, of a snapshot one copy, and of a share of
the optimiser's state a slice.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from lorakit.errors import AdapterError, ConfigError, report
from lorakit.lora.inject import to_peft_config
from lorakit.lora.layouts import Factors, from_file_tensors, to_file_tensors
from lorakit.lora.plan import LoRAPlan, plan_lora
from lorakit.lora.spec import SHARED_OUTER, LoRASpec
from lorakit.model.families import ExpertStack

if TYPE_CHECKING:
    from lorakit.lora.experts import ExpertLoraConfig

_PREFIX = "base_model.model."


class Key(NamedTuple):
    """One adapted matrix. ``matrix`` is empty for a linear module."""

    module: str
    matrix: str = ""
    is_shared: bool = False  # by all experts, on the side of the hidden width


@dataclass(frozen=True)
class Slot:
    """Where the factors of a matrix lie: A from ``start``, B right after it."""

    start: int
    shape_a: tuple[int, ...]  # (R, in) or (E or 1, R, in)
    shape_b: tuple[int, ...]  # (out, R) or (E or 1, out, R)
    scale: float

    @property
    def rank(self) -> int:
        return self.shape_b[-1]

    @property
    def end(self) -> int:
        return self.start + math.prod(self.shape_a) + math.prod(self.shape_b)


@dataclass(frozen=True)
class _Experts:
    """What files need to know of a module of experts."""

    parameters: tuple[str, ...]  # adapted stacks, in the module's order
    num_experts: int


class FlatParameters:
    """Where everything of an adapter is, under one plan. Many adapters share a layout."""

    def __init__(self, model: Any, planned: LoRAPlan, *, base_name: str | None = None) -> None:
        folded = [target for target in planned.targets if target.parameter and not target.outer]
        if folded or planned.spec.dora:
            raise ConfigError(
                f"the service cannot train {folded[0].name if folded else 'DoRA'}; leave it out"
                " (train_mlp=False, or lora.dora=false)"
            )
        self.spec, self.plan = planned.spec, planned
        self.peft_config: ExpertLoraConfig = to_peft_config(planned, base_name=base_name)
        self.slots: dict[Key, Slot] = {}
        self._experts: dict[str, _Experts] = {}
        self._end = 0
        by_module: dict[str, list[str]] = {}
        rank = planned.spec.rank
        for target in planned.targets:
            if target.parameter is None:
                own = (rank, target.in_features), (target.out_features, rank)
                self._append(Key(target.module), *own)
            else:
                by_module.setdefault(target.module, []).append(target.parameter)
        is_shared = planned.spec.expert_layout == SHARED_OUTER
        for module, parameters in by_module.items():
            stack = ExpertStack(model.get_submodule(module))
            parameters = [name for name in (stack.first, stack.second) if name in parameters]
            self._experts[module] = _Experts(tuple(parameters), stack.num_experts)
            ranks = dict.fromkeys(parameters, rank)
            shapes = stack.factor_shapes(ranks, shares_outer=is_shared)
            for matrix, (_, shape_a, shape_b) in shapes.items():
                self._append(Key(module, matrix, is_shared), shape_a, shape_b)

    @property
    def num_params(self) -> int:
        return self._end

    def _append(self, key: Key, shape_a: tuple[int, ...], shape_b: tuple[int, ...]) -> None:
        slot = Slot(self._end, shape_a, shape_b, self.spec.scale)
        self.slots[key], self._end = slot, slot.end

    def views(self, vector: torch.Tensor) -> dict[Key, tuple[torch.Tensor, torch.Tensor]]:
        """Return each matrix's A and B as views of ``vector``."""
        found = {}
        for key, slot in self.slots.items():
            middle = slot.start + math.prod(slot.shape_a)
            found[key] = (
                vector[slot.start : middle].view(slot.shape_a),
                vector[middle : slot.end].view(slot.shape_b),
            )
        return found

    def draw(self, seed: int) -> torch.Tensor:
        """Return a new adapter's vector, on the CPU: A uniform within 1 / sqrt(in), as PEFT has
        it, B zero.
        """
        vector, generator = torch.zeros(self.num_params), torch.Generator().manual_seed(seed)
        for a, _ in self.views(vector).values():
            bound = 1 / math.sqrt(a.shape[-1])
            a.uniform_(-bound, bound, generator=generator)
        return vector

    def file_tensors(self, vector: torch.Tensor) -> dict[str, torch.Tensor]:
        """Return the adapter's tensors with the names and shapes of PEFT's files."""
        tensors: dict[str, torch.Tensor] = {}
        by_module: dict[str, Factors] = {module: {} for module in self._experts}
        for key, (a, b) in self.views(vector.detach()).items():
            if key.matrix:
                by_module[key.module] |= {("lora_A", key.matrix): a, ("lora_B", key.matrix): b}
            else:
                tensors |= {
                    f"{_PREFIX}{key.module}.lora_A.weight": a,
                    f"{_PREFIX}{key.module}.lora_B.weight": b,
                }
        for module, factors in by_module.items():
            found = to_file_tensors(
                factors, self._experts[module].parameters, self.spec.expert_layout
            )
            tensors |= {
                f"{_PREFIX}{module}.{path}{which}.weight": tensor
                for (path, which), tensor in found.items()
            }
        return tensors

    def from_file_tensors(
        self, tensors: Mapping[str, torch.Tensor], *, source: str
    ) -> torch.Tensor:
        """Return the vector of an adapter read from files. Raises AdapterError with everything
        that does not fit.
        """
        vector = torch.zeros(self.num_params)
        views, rest = self.views(vector), dict(tensors)
        found: dict[tuple[Key, int], torch.Tensor] = {}
        for key in self.slots:
            for place, which in enumerate(("lora_A", "lora_B")):
                name = f"{_PREFIX}{key.module}.{which}.weight"
                if not key.matrix and name in rest:
                    found[key, place] = rest.pop(name)
        problems, is_shared = [], self.spec.expert_layout == SHARED_OUTER
        for module, experts in self._experts.items():
            prefix, paths = f"{_PREFIX}{module}.", {}
            for name in [one for one in rest if one.startswith(prefix)]:
                path, _, which = name[len(prefix) : -len(".weight")].rpartition("lora_")
                paths[path, f"lora_{which}"] = rest.pop(name)
            try:
                factors = from_file_tensors(
                    paths, experts.parameters, self.spec.expert_layout, experts.num_experts
                )
            except ValueError as error:
                problems.append(f"{module}: {error}")
                continue
            for (which, matrix), tensor in factors.items():
                found[Key(module, matrix, is_shared), int(which == "lora_B")] = tensor
        problems += [f"not in the plan: {name}" for name in rest]
        for key, pair in views.items():
            for place, view in enumerate(pair):
                given = found.get((key, place))
                name = f"{key.module}{'.' if key.matrix else ''}{key.matrix} {'AB'[place]}"
                if given is None:
                    problems.append(f"missing: {name}")
                elif given.shape != view.shape:
                    problems.append(
                        f"{name} has shape {tuple(given.shape)}, and the plan {tuple(view.shape)}"
                    )
                else:
                    view.copy_(given)
        if problems:
            raise AdapterError(report(f"{source} does not fit:", problems))
        return vector


def plan_layout(model: Any, spec: LoRASpec, *, base_name: str | None = None) -> FlatParameters:
    """Return the layout of ``spec`` on ``model``. Raises ConfigError where it matches nothing or
    cannot be served.
    """
    return FlatParameters(model, plan_lora(model, spec), base_name=base_name)
