"""Which strategy joins a run's processes, and what does not go together with it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import yaml

from lorakit.config.paths import conf_dir
from lorakit.config.schema import RunConfig
from lorakit.config.settings import Component
from lorakit.errors import ConfigError
from lorakit.model.families import row_sharing_problem
from lorakit.pipeline.processes import Place
from lorakit.planner.step_plan import StepPlan
from lorakit.strategy.sequence import check_group_size

# of a process's memory that a whole base may take where no plan can be made: activations need the
# rest
BASE_SHARE = 0.7


def choose_strategy(step: StepPlan, place: Place, say: Callable[[str], Any]) -> Component:
    """Return the strategy's settings; for ``auto`` one is chosen, and printed with its reason.

    Raises:
        ConfigError: strategy, adapter and optimiser do not go together.
    """
    strategy, planned, sp_size = step.config.strategy, step.planned, step.config.sequence_parallel
    check_group_size(sp_size, place.world.size)
    if sp_size > 1:
        _check_row_sharing(step.config, step.skeleton, sp_size)
    if strategy.target == "auto":
        name, reason = _choose(step, place)
        strategy = Component.from_dict(
            yaml.safe_load((conf_dir() / "strategy" / f"{name}.yaml").read_text(encoding="utf-8"))
        )
        if name != "single":
            strategy = strategy.with_arguments(sequence_parallel=sp_size)
        if place.world.size > 1:
            say(f"strategy=auto: {name} ({reason})")
    if strategy.get("stage") == 3 and planned.target_parameters:
        raise ConfigError(
            f"ZeRO-3 does not work with an adapter on {planned.target_parameters[0]}, which PEFT's"
            " own layer folds into the base at every step; set strategy=zero2, or leave it out of"
            " lora.targets"
        )
    return strategy


def _check_row_sharing(config: RunConfig, skeleton: Any, sp_size: int) -> None:
    attention = config.model.attention
    attention = skeleton.config._attn_implementation if attention == "auto" else attention
    problem = f"it needs model.attention=sdpa, not {attention}" if attention != "sdpa" else None
    if problem := problem or row_sharing_problem(
        skeleton.config, sp_size, config.data.rendering.max_tokens
    ):
        raise ConfigError(
            f"strategy.sequence_parallel={sp_size} does not work for this model: {problem}; set it"
            " to 1"
        )


def refuse_unless_elementwise(
    make: Callable[..., torch.optim.Optimizer], strategy: Component
) -> None:
    """ZeRO gives an optimiser flat parts of tensors: one that looks at whole matrices would compute
    something else, silently.

    Raises:
        ConfigError: two steps on a matrix differ from the same steps on its halves, flattened.
    """
    if strategy.get("stage") is None:
        return
    generator = torch.Generator().manual_seed(0)
    values, gradients = (torch.randn(2, 6, 4, generator=generator) for _ in range(2))
    whole = torch.nn.Parameter(values[0].clone())
    halves = [torch.nn.Parameter(half.clone()) for half in values[0].reshape(2, 12)]
    on_whole, on_halves = make([whole]), make(halves)
    for gradient in gradients:
        whole.grad = gradient.clone()
        for half, part in zip(halves, gradient.reshape(2, 12), strict=True):
            half.grad = part.clone()
        on_whole.step()
        on_halves.step()
    if not torch.allclose(whole.flatten(), torch.cat([*halves]), atol=1e-6):
        raise ConfigError(
            f"{type(on_whole).__name__} looks at whole matrices, and ZeRO has flat parts of them:"
            " it would compute something else. Set strategy=ddp, or optim=adamw"
        )


def _choose(step: StepPlan, place: Place) -> tuple[str, str]:
    world, accelerator = place.world, place.accelerator
    memory_bytes = place.memory_per_process_bytes
    if world.size == 1:
        return "single", "one process"
    if place.precision == "16-mixed":
        return "ddp", "16-mixed"
    if step.is_small_for(memory_bytes):
        if accelerator != "cuda":
            return "ddp", "it is small, and processes without GPUs share the machine's memory"
        return (
            "zero1",
            "it is small: the base stays whole in each process, and only the adapter travels",
        )
    try:
        found = step.first_that_fits(world.size, memory_bytes)
    except ConfigError as error:
        name = (
            "zero3"
            if step.base_bytes > BASE_SHARE * memory_bytes
            else "zero1"
            if accelerator == "cuda"
            else "ddp"
        )
        return name, f"by the size of the base alone: {error}"
    if found is None:
        return (
            "zero3",
            f"nothing fits into the {memory_bytes / 1e9:.1f} GB of a process; this needs least",
        )
    needed = step.memory(found, world.size).total
    sizes = f"{needed / 1e9:.1f} GB of {memory_bytes / 1e9:.1f} in each process"
    if not found.startswith("zero3"):
        return found, f"{sizes}: the base stays whole in each, and only the adapter travels"
    whole = step.memory("zero2", world.size).total
    return found, f"{sizes}; with the whole base in each it would be {whole / 1e9:.1f}"
