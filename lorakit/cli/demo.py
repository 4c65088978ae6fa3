"""``lorakit demo``: the bundled tiny model learns pig latin; what it answers before and after, on words it never saw."""

from __future__ import annotations

import argparse
import time
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lorakit.sampling.score import Answer

NUM_SHOWN = 6


def main(arguments: list[str]) -> None:
    """Run the demo; ``--seed`` changes adapter, order and nothing else."""
    parser = argparse.ArgumentParser(prog="lorakit demo", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    options = parser.parse_args(arguments)
    overrides = ["experiment=pig_latin", f"seed={options.seed}", f"paths.runs={options.runs}"]
    run_hydra(demo, overrides, config_name="train")


def demo(config: DictConfig) -> None:
    """Hydra's task: train, then compare base and adapter on all held-out phrases."""
    from rich.console import Console

    from lorakit.cli.train import leave_if_interrupted, to_plain
    from lorakit.cli.training_run import train_run
    from lorakit.weights.files import write_json

    console = Console(soft_wrap=True)
    started = time.perf_counter()
    outcome = train_run(to_plain(config), experiment="pig_latin", command="lorakit demo", console=console)
    leave_if_interrupted(outcome.interrupt)
    model, tokenizer = outcome.module.model, outcome.module.tokenizer
    datamodule = outcome.datamodule
    datums = [d for i in range(len(datamodule.val_source)) for d in datamodule.val_examples.datums(i)]
    console.print(f"asking {len(datums)} phrases of words that neither pretraining nor LoRA saw …")
    with model.disable_adapter():
        before = _answer(model, tokenizer, datums)
    after = _answer(model, tokenizer, datums)
    _print_answers(console, before, after)
    figures = {"exact_match_before": _share(before), "exact_match_after": _share(after), "held_out_phrases": len(datums)}
    write_json(outcome.run.folder / "demo.json", figures)
    console.print(
        f"held-out phrases exactly right: {_share(before):.1%} before, [bold]{_share(after):.1%}[/bold] after "
        f"{outcome.run.info['step']} steps ({outcome.seconds:.0f} s of training, {time.perf_counter() - started:.0f} s in all)"
    )
    console.print(
        f"trainable share {outcome.plan.trainable_share:.1%}, {outcome.tokens_per_second:,.0f} tokens/s, "
        f"adapter {outcome.adapter_bytes / 1e6:.2f} MB, loss curve {outcome.run.folder / 'loss.png'}"
    )
    console.print(f"try it: lorakit sample {outcome.run.name} -- $'English: hello world\\nPig Latin:'", markup=False)


def _answer(model: Any, tokenizer: Any, datums: list[Any]) -> list[Answer]:
    from lorakit.sampling.score import answer_all
    from lorakit.types import SamplingParams

    return answer_all(model, tokenizer, datums, SamplingParams(max_tokens=48, temperature=0.0, stop="\n\n"))


def _print_answers(console: Any, before: list[Answer], after: list[Answer]) -> None:
    from rich.table import Table

    table = Table("English", "before", "after", "", box=None)
    chosen = [*after[: NUM_SHOWN - 1], *[answer for answer in after if not answer.is_exact][:1]]
    for answer in chosen:
        phrase = answer.prompt.removeprefix("English: ").removesuffix("\nPig Latin:")
        text_before = before[after.index(answer)].sample.text.strip().replace("\n", "↵")
        mark = "right" if answer.is_exact else f"wrong: {answer.expected.strip()}"
        table.add_row(phrase, text_before, answer.sample.text.strip().replace("\n", "↵"), mark)
    console.print(table)


def _share(answers: list[Answer]) -> float:
    return sum(answer.is_exact for answer in answers) / len(answers)


if __name__ == "__main__":
    run_command(main)
