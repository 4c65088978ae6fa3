"""The tables of ``lorakit plan``: adapters by rank, memory by strategy and devices, time, cost."""

from __future__ import annotations

import dataclasses

from rich.table import Table

from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LAYOUTS
from lorakit.planner.cost import Prices
from lorakit.planner.fitting import counts_to_plan, suggest
from lorakit.planner.memory import REFUSE_SHARE, STRATEGIES, WARN_SHARE
from lorakit.planner.step_plan import StepPlan

RANKS = (4, 8, 16, 32, 64)


class Devices:
    """The numbers of processes that are planned for, and the memory of each.

    Args:
        memory_bytes: of one GPU; on a CPU of the whole machine, whose memory processes share.
    """

    def __init__(self, step: StepPlan, memory_bytes: int) -> None:
        is_cuda = step.accelerator == "cuda"
        self.counts = counts_to_plan(step.config)
        self.memory_bytes = memory_bytes
        self.memory_per_process_bytes = {
            count: memory_bytes if is_cuda else memory_bytes // count for count in self.counts
        }
        self.singular, self.plural = ("GPU", "GPUs") if is_cuda else ("process", "processes")
        self.have = "it has" if is_cuda else "they share"


def rank_table(step: StepPlan) -> Table:
    """Trainable parameters and the size of the file, for each rank and layout of experts."""
    spec = step.planned.spec
    has_stacks = any(target.outer for target in step.planned.targets)
    layouts = LAYOUTS if has_stacks else (spec.expert_layout,)
    heads = [f"lora.expert_layout={layout}" if has_stacks else "parameters" for layout in layouts]
    table = _table("Adapter by rank: trainable parameters, file in bf16", "rank", *heads)
    for rank in sorted({*RANKS, spec.rank}):
        cells = []
        for layout in layouts:
            changed = dataclasses.replace(spec, rank=rank, expert_layout=layout)
            planned = plan_lora(step.skeleton, changed)
            cells.append(f"{planned.num_params:,}  {planned.megabytes(2):,.1f} MB")
        table.add_row(str(rank), *cells)
    return table


def memory_table(step: StepPlan, devices: Devices) -> Table:
    """Total memory of a process, by strategy and number of processes."""
    table = _table(
        f"GB in each {devices.singular}, of {_gb(devices.memory_bytes)} that {devices.have},"
        f" by the number of {devices.plural}",
        "strategy",
        *map(str, devices.counts),
    )
    for strategy in STRATEGIES:
        cells = []
        for count in devices.counts:
            if (strategy == "single") != (count == 1) and strategy != "zero3_offload":
                cells.append("")
                continue
            total = step.memory(strategy, count).total
            share = total / devices.memory_per_process_bytes[count]
            colour, note = (
                ("green", "")
                if share <= WARN_SHARE
                else ("yellow", " tight")
                if share <= REFUSE_SHARE
                else ("red", " too much")
            )
            cells.append(f"[{colour}]{_gb(total)}{note}[/{colour}]")
        table.add_row(strategy, *cells)
    return table


def breakdown_table(step: StepPlan, devices: Devices) -> Table:
    """What the memory of the strategy that would be chosen consists of."""
    names = [field.name for field in dataclasses.fields(step.memory("single", 1))]
    table = _table("What it consists of, in GB", devices.plural, "strategy", *names)
    for count in devices.counts:
        found = step.first_that_fits(count, devices.memory_per_process_bytes[count])
        memory = step.memory(found or ("single" if count == 1 else "zero3"), count)
        parts = [f"{getattr(memory, name) / 1e9:.2f}" for name in names]
        table.add_row(str(count), found or "none fits", *parts)
    return table


def advice(step: StepPlan, devices: Devices) -> list[str]:
    """Lines that say which strategy training would choose, and what makes the first number of
    processes fit that does not.
    """
    lines, chosen = [], dict[str, list[str]]()
    for count in devices.counts:
        memory_bytes = devices.memory_per_process_bytes[count]
        if found := step.first_that_fits(count, memory_bytes, offloads=count > 1):
            chosen.setdefault(found, []).append(str(count))
    if chosen:
        said = [
            f"{name} on {', '.join(counts)}"
            f" {devices.singular if counts == ['1'] else devices.plural}"
            for name, counts in chosen.items()
        ]
        lines.append(f"strategy=auto takes {'; '.join(said)}")
    for count, memory_bytes in devices.memory_per_process_bytes.items():
        if step.first_that_fits(count, memory_bytes, offloads=False) is None:
            unit = devices.singular if count == 1 else devices.plural
            return [*lines, f"{count} {unit}: {suggest(step, count, memory_bytes)}"]
    return lines


def cost_table(step: StepPlan, num_tokens: int) -> Table:
    """Time and cost of ``num_tokens`` on each number of GPUs."""
    settings = step.config.plan
    prices = Prices(
        tflops=settings.tflops,
        utilisation=settings.utilisation,
        price_per_hour=settings.price_per_hour,
    )
    table = _table(
        f"{num_tokens:,} tokens, if a GPU reaches {prices.utilisation:.0%} of {prices.tflops:g}"
        f" TFLOP/s and costs {prices.price_per_hour:g} an hour (plan.utilisation, plan.tflops,"
        " plan.price_per_hour)",
        "GPUs",
        "time",
        "cost",
    )
    for count in counts_to_plan(step.config):
        hours = prices.hours(step.trace, num_tokens, count)
        time = f"{hours:,.2f} hours" if hours >= 0.5 else f"{hours * 60:.1f} minutes"
        table.add_row(str(count), time, f"{prices.price(hours, count):,.2f}")
    return table


def _table(title: str, *heads: str) -> Table:
    table = Table(title=title, title_justify="left")
    for head in heads:
        table.add_column(head, justify="left" if head == "strategy" else "right")
    return table


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 1e10 else 2}f}"
