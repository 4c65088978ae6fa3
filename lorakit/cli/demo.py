"""``lorakit demo [pig_latin|digits]``: a bundled tiny model learns something new; what it
answers before and after, held out.
"""

from __future__ import annotations

import argparse
import functools
import shlex
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command
from lorakit.extras import find_problem

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from lorakit.sampling.score import Answer
    from lorakit.types import Datum

NUM_SHOWN = 6


@dataclass(frozen=True)
class Demo:
    """An experiment, and what is asked when it is trained."""

    experiment: str
    asks: str  # held-out rows, in words
    max_tokens: int
    stop: str | None
    try_it: str  # after ``lorakit sample NAME``


DEMOS = {
    "pig_latin": Demo(
        "pig_latin",
        "phrases of words that neither pretraining nor LoRA saw",
        48,
        "\n\n",
        "-- $'English: hello world\\nPig Latin:'",
    ),
    "digits": Demo(
        "vlm_digits",
        "scans of handwritten digits that it was not shown",
        4,
        None,
        "--image FILE -- 'which digit?'",
    ),
}


def main(arguments: list[str]) -> None:
    """Run a demo; ``--seed`` changes adapter, order and nothing else."""
    parser = argparse.ArgumentParser(prog="lorakit demo", description=__doc__)
    parser.add_argument("which", nargs="?", choices=tuple(DEMOS), default="pig_latin")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--runs", default="runs", help="folder of the runs")
    options = parser.parse_args(arguments)
    chosen = DEMOS[options.which]
    overrides = [
        f"experiment={chosen.experiment}",
        f"seed={options.seed}",
        f"paths.runs={options.runs}",
    ]
    command = shlex.join(["lorakit", "train", *overrides])  # continues the same run
    run_hydra(
        functools.partial(demo, chosen=chosen, command=command), overrides, config_name="train"
    )


def demo(config: DictConfig, chosen: Demo, command: str) -> None:
    """Hydra's task: train, then compare base and adapter on all held-out rows."""
    from lorakit.cli.train import announce, leave_if_interrupted
    from lorakit.config.resolve import to_plain

    plain = to_plain(config)
    announce(plain)
    from rich.console import Console

    from lorakit.config.schema import RunConfig
    from lorakit.pipeline.fit import train
    from lorakit.runs.files import write_json

    console = Console(soft_wrap=True)
    started = time.perf_counter()
    outcome = train(
        RunConfig.from_dict(plain), experiment=chosen.experiment, command=command, console=console
    )
    leave_if_interrupted(outcome.interrupt)
    model, datamodule = outcome.module.model, outcome.datamodule
    datums = [
        d for i in range(len(datamodule.val_source)) for d in datamodule.val_examples.datums(i)
    ]
    console.print(f"asking {len(datums)} {chosen.asks} …")
    ask = functools.partial(
        _answer, chosen, model, outcome.module.tokenizer, datums, datamodule.images
    )
    with model.disable_adapter():
        before = ask()
    after = ask()
    if chosen.experiment == "pig_latin":
        _print_answers(console, before, after)
    elif problem := find_problem("matplotlib", "answers.png"):
        console.print(problem, markup=False)
    else:
        from lorakit.reports.answers import draw_answers

        draw_answers(outcome.run.folder / "answers.png", datums, after)
        console.print(f"scans, answers and mistakes: {outcome.run.folder / 'answers.png'}")
    figures = {
        "exact_match_before": _share(before),
        "exact_match_after": _share(after),
        "held_out": len(datums),
    }
    write_json(outcome.run.folder / "demo.json", figures)
    console.print(
        f"held out, exactly right: {_share(before):.1%} before, [bold]{_share(after):.1%}[/bold]"
        f" after {outcome.run.info['step']} steps ({outcome.seconds:.0f} s of training,"
        f" {time.perf_counter() - started:.0f} s in all)"
    )
    picture = outcome.run.folder / "loss.png"
    curve = f", loss curve {picture}" if picture.is_file() else ""
    console.print(
        f"trainable share {outcome.plan.trainable_share:.1%}, {outcome.tokens_per_second:,.0f}"
        f" tokens/s, adapter {outcome.adapter_bytes / 1e6:.2f} MB{curve}"
    )
    console.print(f"try it: lorakit sample {outcome.run.name} {chosen.try_it}", markup=False)


def _answer(
    chosen: Demo, model: Any, tokenizer: Any, datums: list[Datum], images: Any
) -> list[Answer]:
    from lorakit.sampling.score import answer_all
    from lorakit.types import SamplingParams

    params = SamplingParams(max_tokens=chosen.max_tokens, temperature=0.0, stop=chosen.stop)
    return answer_all(model, tokenizer, datums, params, images=images)


def _print_answers(console: Any, before: list[Answer], after: list[Answer]) -> None:
    from rich.table import Table

    table = Table("English", "before", "after", "", box=None)
    shown = [*after[: NUM_SHOWN - 1], *[answer for answer in after if not answer.is_exact][:1]]
    for answer in shown:
        phrase = answer.prompt.removeprefix("English: ").removesuffix("\nPig Latin:")
        text_before = before[after.index(answer)].sample.text.strip().replace("\n", "↵")
        mark = "right" if answer.is_exact else f"wrong: {answer.expected.strip()}"
        table.add_row(phrase, text_before, answer.sample.text.strip().replace("\n", "↵"), mark)
    console.print(table)


def _share(answers: list[Answer]) -> float:
    return sum(answer.is_exact for answer in answers) / len(answers)


if __name__ == "__main__":
    run_command(main)
