"""``lorakit plan``: memory, operations, time and cost of a run, from its config alone: no
weights are read, no GPU is needed.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.console import Console

    from lorakit.config.schema import RunConfig
    from lorakit.data.examples import DatasetReport
    from lorakit.model.spec import ModelSpec
    from lorakit.planner.fake_images import SampleShapes
    from lorakit.planner.step_plan import StepPlan
HELP = """\
usage: lorakit plan [key=value …]

  lorakit plan experiment=qwen3_30b_a3b                      for 1 to 16 GPUs of 80 GB
  lorakit plan model.path=… data.path=… plan.memory_gb=24    for your model, rows and GPUs
  lorakit plan experiment=qwen3_30b_a3b plan.tokens=10e6     with time and cost of 10 million tokens

Takes every key of `lorakit train`, and those below `plan` in conf/train.yaml.
trainer.accelerator=cpu plans for this machine's CPU."""
RANKS = (4, 8, 16, 32, 64)
NO_DATA = "(rows that are not named yet)"


def main(arguments: list[str]) -> None:
    """Plan what ``arguments`` say."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    run_hydra(plan_run, arguments, config_name="train")


def plan_run(config: DictConfig) -> None:
    """Hydra's task: print the plan."""
    import torch
    from omegaconf import OmegaConf
    from rich.console import Console

    from lorakit.config.resolve import to_plain
    from lorakit.config.schema import RunConfig
    from lorakit.lora.inject import plan
    from lorakit.pipeline.autoconfig import RunFacts, choose
    from lorakit.pipeline.build import build_step_plan
    from lorakit.pipeline.processes import Place
    from lorakit.strategy.world import World
    from lorakit.training.precision import resolve_precision

    if OmegaConf.is_missing(config.data, "path") and config.data.sources is None:
        OmegaConf.update(config, "data.path", NO_DATA)
    run_config = RunConfig.from_dict(to_plain(config))
    console = Console(soft_wrap=True)
    console.width = max(console.width, 130)  # no heading is cut; a narrow terminal wraps the lines
    accelerator = "cpu" if run_config.trainer.accelerator == "cpu" else "cuda"
    precision = run_config.trainer.precision
    if precision == "auto":
        here = accelerator != "cuda" or torch.cuda.is_available()
        precision = resolve_precision(precision, accelerator) if here else "bf16-mixed"
    skeleton = _skeleton(run_config.model)
    rows, val_rows, num_tokens, reports = _look_at_data(run_config, skeleton, console)
    there = _bytes_there(run_config, accelerator)
    # chosen for one device, kept for several
    facts = RunFacts(skeleton, *reports, Place(World(), accelerator, precision, there), 1)
    run_config, _ = choose(run_config, facts, lambda text: console.print(text, highlight=False))
    planned = plan(skeleton, run_config.lora_with_tokens)
    step = build_step_plan(
        run_config,
        skeleton,
        planned,
        accelerator=accelerator,
        precision=precision,
        rows=rows,
        val_rows=val_rows,
    )
    shape = step.shape
    images = (
        f", {len(shape.image_tokens):,} images of up to {max(shape.image_tokens):,} among them"
        if shape.image_tokens
        else ""
    )
    console.print(
        f"{run_config.model.path}: {planned.num_base_params:,} parameters in {shape.dtype},"
        f" {shape.precision}; each process takes {shape.num_rows} x {shape.num_positions:,} tokens"
        f" at a time{images},"
        f" {'activations are computed twice' if shape.checkpointing else 'activations are kept'}",
        highlight=False,
    )
    console.print(planned.summary(), highlight=False)
    _print_ranks(step, console)
    _print_memory(step, console)
    _print_costs(step, num_tokens, console)


def _skeleton(model: ModelSpec) -> Any:
    """The model without weights: of its folder or the hub's cache, or of a config that lorakit
    brings.
    """
    from lorakit.errors import ConfigError
    from lorakit.model.load import skeleton_of
    from lorakit.planner.presets import preset_config

    try:
        return model.load_skeleton()
    except ConfigError:
        if (config := preset_config(model.path)) is None:
            raise
    return skeleton_of(config)


def _look_at_data(
    config: RunConfig, skeleton: Any, console: Console
) -> tuple[
    SampleShapes, SampleShapes, int | None, tuple[DatasetReport | None, DatasetReport | None]
]:
    """Return how large rows are, those for training and those for evaluation, the tokens of all
    epochs where anybody knows, and the reports that say so.
    """
    from lorakit.pipeline import build
    from lorakit.pipeline.printing import print_data_report
    from lorakit.planner.step_plan import row_sizes, row_sizes_without_data

    tokens, epochs = round(config.plan.tokens or 0) or None, config.data.batches.epochs
    if config.data.rows.path == NO_DATA:
        sizes = row_sizes_without_data(config, skeleton)
        return sizes, sizes, tokens, (None, None)
    datamodule, _ = build.load_data(config)
    print_data_report(datamodule, console)
    report = datamodule.report
    assert report is not None
    seen = report.num_tokens * report.num_rows / max(1, report.num_rows_profiled)
    tokens = tokens or (round(seen * epochs) if epochs else None)
    return (
        row_sizes(report),
        row_sizes(datamodule.val_report),
        tokens,
        (report, datamodule.val_report),
    )


def _print_ranks(step: StepPlan, console: Console) -> None:
    from rich.table import Table

    from lorakit.lora.inject import plan
    from lorakit.lora.spec import LAYOUTS

    has_stacks = any(target.outer for target in step.planned.targets)
    layouts = LAYOUTS if has_stacks else (step.planned.spec.expert_layout,)
    table = Table(title="Adapter by rank: trainable parameters, file in bf16", title_justify="left")
    table.add_column("rank", justify="right")
    for layout in layouts:
        table.add_column(
            f"lora.expert_layout={layout}" if has_stacks else "parameters", justify="right"
        )
    for rank in sorted({*RANKS, step.planned.spec.rank}):
        found = [
            plan(
                step.skeleton,
                dataclasses.replace(step.planned.spec, rank=rank, expert_layout=layout),
            )
            for layout in layouts
        ]
        table.add_row(
            str(rank), *(f"{one.num_params:,}  {one.megabytes(2):,.1f} MB" for one in found)
        )
    console.print(table)


def _print_memory(step: StepPlan, console: Console) -> None:
    """Total by strategy and number of processes; the parts of the strategy that would be taken;
    what to change.
    """
    from rich.table import Table

    from lorakit.planner.fitting import counts_to_plan, suggest
    from lorakit.planner.memory import REFUSE_SHARE, STRATEGIES, WARN_SHARE

    counts, total_there = counts_to_plan(step.config), _bytes_there(step.config, step.accelerator)
    is_cuda = step.accelerator == "cuda"
    # processes share the host's
    there = {count: total_there if is_cuda else total_there // count for count in counts}
    device, devices = ("GPU", "GPUs") if is_cuda else ("process", "processes")
    table = Table(
        title=(
            f"GB in each {device}, of {_gb(total_there)} that"
            f" {'it has' if is_cuda else 'they share'}, by the number of {devices}"
        ),
        title_justify="left",
    )
    table.add_column("strategy")
    for count in counts:
        table.add_column(str(count), justify="right")
    for strategy in STRATEGIES:
        cells = []
        for count in counts:
            if (strategy == "single") != (count == 1) and strategy != "zero3_offload":
                cells.append("")
                continue
            total = step.memory(strategy, count).total
            colour = (
                "green"
                if total <= WARN_SHARE * there[count]
                else "yellow"
                if total <= REFUSE_SHARE * there[count]
                else "red"
            )
            note = (
                ""
                if total <= WARN_SHARE * there[count]
                else " tight"
                if total <= REFUSE_SHARE * there[count]
                else " too much"
            )
            cells.append(f"[{colour}]{_gb(total)}{note}[/{colour}]")
        table.add_row(strategy, *cells)
    console.print(table)
    parts = Table(title="What it consists of, in GB", title_justify="left")
    names = [field.name for field in dataclasses.fields(step.memory("single", 1))]
    for name in (devices, "strategy", *names):
        parts.add_column(name, justify="left" if name == "strategy" else "right")
    for count in counts:
        found = step.first_that_fits(count, there[count])
        memory = step.memory(found or ("single" if count == 1 else "zero3"), count)
        row = [f"{getattr(memory, name) / 1e9:.2f}" for name in names]
        parts.add_row(str(count), found or "none fits", *row)
    console.print(parts)
    # as training does
    taken = [
        (step.first_that_fits(count, there[count], offloads=count > 1), count) for count in counts
    ]
    groups = {
        name: [str(count) for found, count in taken if found == name]
        for name in dict.fromkeys(name for name, _ in taken)
    }
    said = [
        f"{name} on {', '.join(numbers)} {devices if numbers != ['1'] else device}"
        for name, numbers in groups.items()
        if name
    ]
    if said:
        console.print(f"strategy=auto takes {'; '.join(said)}", highlight=False)
    misfits = [
        count
        for count in counts
        if step.first_that_fits(count, there[count], offloads=False) is None
    ]
    if misfits:
        console.print(
            f"{misfits[0]} {device if misfits[0] == 1 else devices}:"
            f" {suggest(step, misfits[0], there[misfits[0]])}",
            highlight=False,
        )


def _gb(num_bytes: int) -> str:
    return f"{num_bytes / 1e9:.{1 if num_bytes >= 1e10 else 2}f}"


def _bytes_there(config: RunConfig, accelerator: str) -> int:
    import torch

    from lorakit.planner.step_plan import agree_on_memory
    from lorakit.strategy.world import World

    is_elsewhere = accelerator == "cuda" and not torch.cuda.is_available()
    return agree_on_memory(
        config.plan.memory_gb or (80 if is_elsewhere else None), accelerator, World()
    )


def _print_costs(step: StepPlan, num_tokens: int | None, console: Console) -> None:
    from rich.table import Table

    from lorakit.planner.cost import Prices
    from lorakit.planner.fitting import counts_to_plan

    settings = step.config.plan
    prices = Prices(
        tflops=settings.tflops,
        utilisation=settings.utilisation,
        price_per_hour=settings.price_per_hour,
    )
    per_token = step.trace.num_flops / step.trace.num_tokens
    unit, size = ("GFLOP", 1e9) if per_token > 1e9 else ("MFLOP", 1e6)
    console.print(
        f"{per_token / size:,.2f} {unit} per token, forward and backward", highlight=False
    )
    if step.accelerator != "cuda":
        return
    if not num_tokens:
        console.print("time and cost: set plan.tokens, or data.path", highlight=False)
        return
    table = Table(
        title=(
            f"{num_tokens:,} tokens, if a GPU reaches {prices.utilisation:.0%} of {prices.tflops:g}"
            f" TFLOP/s and costs {prices.price_per_hour:g} an hour (plan.utilisation, plan.tflops,"
            " plan.price_per_hour)"
        ),
        title_justify="left",
    )
    for name in ("GPUs", "time", "cost"):
        table.add_column(name, justify="right")
    for count in counts_to_plan(step.config):
        hours = prices.hours(step.trace, num_tokens, count)
        time = f"{hours:,.2f} hours" if hours >= 0.5 else f"{hours * 60:.1f} minutes"
        table.add_row(str(count), time, f"{prices.price(hours, count):,.2f}")
    console.print(table)


if __name__ == "__main__":
    run_command(main)
