"""Whether a step fits into the memory there is, and what to change where it does not."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator
from typing import Any

from lorakit.config.schema import RunConfig
from lorakit.errors import ConfigError
from lorakit.lora.plan import LoRAPlan, plan_lora
from lorakit.planner.memory import REFUSE_SHARE, WARN_SHARE, Memory
from lorakit.planner.step_plan import StepPlan, describe

log = logging.getLogger("lorakit")


def check_memory(
    plan: StepPlan, strategy: str, num_processes: int, memory_bytes: int
) -> Memory | None:
    """Return what the run holds in each process, or None where it is surely little. Warn from 90 %
    of ``memory_bytes``.

    Raises:
        ConfigError: it is more than 110 %, and ``plan.enforce`` is on.
    """
    if plan.is_small_for(memory_bytes):
        return None
    try:
        memory = plan.memory(strategy, num_processes)
    except ConfigError as error:
        log.warning("%s", error)
        return None
    share = memory.total / memory_bytes
    where = "of each GPU" if plan.accelerator == "cuda" else "that are there for it"
    needs = (
        f"this run needs {memory.total / 1e9:.1f} GB in each process ({describe(memory)}), "
        f"{share:.0%} of the {memory_bytes / 1e9:.1f} GB {where}"
    )
    if share <= WARN_SHARE:
        return memory
    changes = suggest(plan, num_processes, memory_bytes)
    if share > REFUSE_SHARE and plan.config.plan.enforce:
        raise ConfigError(f"{needs}\n{changes}\nplan.enforce=false tries it all the same")
    log.warning("%s\n%s", needs, changes)
    return memory


def suggest(plan: StepPlan, num_processes: int, num_bytes: int) -> str:
    """What to type so that the run fits ``num_bytes``: cheapest changes first, until it does."""
    found = None
    for made, changed in _changed_plans(plan, num_processes):
        if name := changed.first_that_fits(num_processes, num_bytes, offloads=False):
            typed = [f"strategy={name}", *made] if num_processes > 1 else made
            found = typed, changed.memory(name, num_processes).total
            break
    if found is None and (name := plan.first_that_fits(num_processes, num_bytes)):
        found = [f"strategy={name}"], plan.memory(name, num_processes).total
    lines = [f"it fits with: {' '.join(found[0])}   ({found[1] / 1e9:.2f} GB)"] if found else []
    if plan.accelerator == "cuda":
        for count in (count for count in counts_to_plan(plan.config) if count > num_processes):
            if name := plan.first_that_fits(count, num_bytes, offloads=False):
                needs = f"({plan.memory(name, count).total / 1e9:.2f} GB)"
                lines.append(f"it fits as it is on {count} GPUs with strategy={name}   {needs}")
                break
    if not lines:
        return "no setting makes it fit; take more or larger devices, or a smaller model"
    return "\n".join(lines)


def counts_to_plan(config: RunConfig) -> list[int]:
    """The possible numbers of processes in ``plan.gpus``. Raises ConfigError for none."""
    sp_size = config.sequence_parallel
    if not (counts := [count for count in config.plan.gpus if count % sp_size == 0]):
        raise ConfigError(
            f"plan.gpus={config.plan.gpus}: strategy.sequence_parallel={sp_size} needs"
            f" multiples of {sp_size}"
        )
    return counts


def _changed_plans(plan: StepPlan, num_processes: int) -> Iterator[tuple[list[str], StepPlan]]:
    made: list[str] = []
    if num_processes > 1:
        yield made, plan  # under another strategy
    changes = _changes(plan.config, plan.planned, plan.accelerator)
    # it is what takes most
    comes_first = plan.evaluation_bytes > plan.trace.activations + plan.trace.head
    for one in plan.passes:
        change = (
            ("callbacks.samples.num_prompts", 1)
            if one.num_kept
            else ("data.val_batch_size", "null")
        )
        changes.insert(0 if comes_first else len(changes), change)
    for key, value in changes:
        made = [text for text in made if not text.startswith(f"{key}=")] + [f"{key}={value}"]
        config = plan.config.with_overrides(made)
        spec = dataclasses.replace(plan.planned.spec, expert_layout=config.lora.expert_layout)
        planned = plan.planned if spec == plan.planned.spec else plan_lora(plan.skeleton, spec)
        yield (
            made,
            StepPlan(
                config,
                plan.skeleton,
                planned,
                accelerator=plan.accelerator,
                precision=plan.shape.precision,
                rows=plan.rows,
                val_rows=plan.val_rows,
                optimizer=plan.optimizer,
            ),
        )


def _changes(config: RunConfig, planned: LoRAPlan, accelerator: str) -> list[tuple[str, Any]]:
    data, changes = config.data, list[tuple[str, Any]]()
    if not config.trainer.activation_checkpointing:
        changes.append(("trainer.activation_checkpointing", "true"))
    rows = data.batches.rows_per_batch
    while rows and rows > 1:
        rows //= 2
        changes.append(("data.batch_size", rows))
    max_tokens = data.rendering.max_tokens
    shortest = data.row_tokens() or max_tokens
    positions = data.batches.tokens_per_batch or 0
    while positions >= 2 * shortest:  # less than a row is refused
        positions //= 2
        changes.append(("data.tokens_per_batch", positions))
    if accelerator == "cuda" and config.model.dtype == "float32":
        changes.append(("model.dtype", "bfloat16"))
    has_experts = any(target.outer for target in planned.targets)
    if has_experts and planned.spec.expert_layout == "per_expert":
        changes.append(("lora.expert_layout", "shared_outer"))
    if data.batches.pack_tokens:  # not less than max_tokens, which it is when it is not set
        changes.append(("data.pack_tokens", "null"))
    tokens = max_tokens
    while tokens >= 1024:
        tokens //= 2
        changes.append(("data.max_tokens", tokens))
        if data.batches.tokens_per_batch:  # else there would be more of the shorter rows
            changes.append(("data.tokens_per_batch", tokens))
    return changes
