"""``lorakit plan``: memory, operations, time and cost of a run, from its config alone: no
weights are read, no GPU is needed.
"""

from __future__ import annotations

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
    from lorakit.lora.plan import plan_lora
    from lorakit.pipeline.autoconfig import RunFacts, choose
    from lorakit.pipeline.build import build_step_plan
    from lorakit.pipeline.processes import Place
    from lorakit.planner import tables
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
    memory_bytes = _memory_bytes(run_config, accelerator)
    # chosen for one device, kept for several
    facts = RunFacts(skeleton, *reports, Place(World(), accelerator, precision, memory_bytes), 1)
    run_config, _ = choose(run_config, facts, lambda text: console.print(text, highlight=False))
    planned = plan_lora(skeleton, run_config.lora_with_tokens)
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
    console.print(tables.rank_table(step))
    devices = tables.Devices(step, memory_bytes)
    console.print(tables.memory_table(step, devices))
    console.print(tables.breakdown_table(step, devices))
    for line in tables.advice(step, devices):
        console.print(line, highlight=False)
    _print_costs(step, num_tokens, console)


def _print_costs(step: StepPlan, num_tokens: int | None, console: Console) -> None:
    from lorakit.planner.tables import cost_table

    per_token = step.trace.num_flops / step.trace.num_tokens
    unit, size = ("GFLOP", 1e9) if per_token > 1e9 else ("MFLOP", 1e6)
    console.print(
        f"{per_token / size:,.2f} {unit} per token, forward and backward", highlight=False
    )
    if step.accelerator != "cuda":
        return
    if num_tokens:
        console.print(cost_table(step, num_tokens))
    else:
        console.print("time and cost: set plan.tokens, or data.path", highlight=False)


def _skeleton(model: ModelSpec) -> Any:
    """The model without weights: of its folder, the hub's cache, or a bundled config."""
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


def _memory_bytes(config: RunConfig, accelerator: str) -> int:
    import torch

    from lorakit.planner.step_plan import agree_on_memory
    from lorakit.strategy.world import World

    is_elsewhere = accelerator == "cuda" and not torch.cuda.is_available()
    return agree_on_memory(
        config.plan.memory_gb or (80 if is_elsewhere else None), accelerator, World()
    )


if __name__ == "__main__":
    run_command(main)
