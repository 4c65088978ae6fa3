"""``lorakit evaluate [RUN] --data PATH``: loss, perplexity and exact match, and tasks of
lm-eval, printed and as JSON.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorakit.cli.guard import run_command
from lorakit.cli.run_arguments import add_run_arguments, open_trained, output_path, parse
from lorakit.errors import ConfigError
from lorakit.pipeline.trained import Trained

if TYPE_CHECKING:
    from lorakit.data.datamodule import LoRADataModule
    from lorakit.sampling.score import Answer


def main(arguments: list[str]) -> None:
    """Evaluate as ``arguments`` say."""
    parser = argparse.ArgumentParser(
        prog="lorakit evaluate", description="Loss, perplexity and exact match of a run."
    )
    add_run_arguments(parser)
    parser.add_argument(
        "--data", help="rows to evaluate on; default: the rows that the run held out"
    )
    parser.add_argument("--limit", type=int, help="rows at most")
    parser.add_argument("--max-tokens", type=int, default=256, help="of each sample (default: 256)")
    parser.add_argument("--no-samples", action="store_true", help="loss only")
    parser.add_argument("--base", action="store_true", help="the base alone, without the adapter")
    parser.add_argument(
        "--no-base", action="store_true", help="the adapter alone, without the base beside it"
    )
    parser.add_argument(
        "--columns",
        nargs="+",
        type=_as_column,
        metavar="OURS=THEIRS",
        help="what --data calls our columns: prompt=question",
    )
    parser.add_argument(
        "--answers", type=output_path, help="write each answer to this file, the base's beside it"
    )
    parser.add_argument(
        "--tasks",
        type=_as_list,
        help=(
            "of lm-evaluation-harness, instead of rows or, with --data, beside them:"
            " arc_easy,hellaswag"
        ),
    )
    parser.add_argument(
        "--tasks-path", type=Path, metavar="FOLDER", help="with tasks of your own for it, as YAML"
    )
    parser.add_argument("--chat", action="store_true", help="ask tasks through the chat template")
    parser.add_argument("--batch-size", type=int, help="rows of a task at a time (default: 8)")
    parser.add_argument("--json", type=output_path, help="write the figures to this file")
    options = parse(parser, arguments)
    if not options.tasks and (options.tasks_path or options.chat or options.batch_size):
        parser.error("--tasks-path, --chat and --batch-size have no effect without tasks=…")
    if options.tasks:
        from lorakit.evaluation.harness import check_harness

        check_harness(options.tasks, options.tasks_path)
    if options.json and options.json.is_dir():
        parser.error(f"argument --json: {options.json} is a folder; name a file in it")
    trained = open_trained(options)
    check_rows(trained, options)
    figures = evaluate(trained, options)
    if sys.stdout.isatty():
        from lorakit.reports.tables import figures_table

        print(figures_table(figures))
    else:
        print(json.dumps(figures, indent=2, ensure_ascii=False))
    if options.json:
        from lorakit.runs.files import write_json

        options.json.parent.mkdir(parents=True, exist_ok=True)
        write_json(options.json, figures)


def check_rows(trained: Trained, options: argparse.Namespace) -> None:
    """Raise ConfigError where there are no rows to evaluate on, before anything heavy is loaded."""
    data = trained.config["data"]
    if (
        options.data is None
        and not options.tasks
        and not (data["val_path"] or data["val_fraction"])
    ):
        raise ConfigError("this run held out no rows; name some with --data PATH")


def _say(text: str) -> None:
    print(f"{text} …", file=sys.stderr, flush=True)


def _as_list(text: str) -> list[str]:
    return [name.strip() for name in text.split(",") if name.strip()]


def _as_column(text: str) -> tuple[str, str]:
    ours, separator, theirs = text.partition("=")
    if not (ours and separator and theirs):
        raise argparse.ArgumentTypeError(f"{text}: write OURS=THEIRS, as prompt=question")
    return ours, theirs


def evaluate(trained: Trained, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of ``trained`` on the rows of ``options``, beside its base's."""
    from lorakit.config.optimization import build_loss
    from lorakit.config.settings import Component
    from lorakit.evaluation.held_out import score_pairs, score_rows
    from lorakit.lora.state import adapters_off
    from lorakit.pipeline.build import load_images

    if options.tasks and options.data is None:
        return evaluate_tasks(trained, options)
    datamodule = open_rows(trained, options)
    model, tokenizer = trained.load(with_adapter=not options.base)
    images = load_images(trained.model) if datamodule.has_images else None
    datamodule.set_tokenizer(tokenizer, images)
    figures: dict[str, Any] = {
        "run": trained.run.name,
        "adapter": None if options.base else str(trained.adapter),
        "data": options.data or datamodule.spec.rows.val_path or datamodule.spec.rows.title,
        "rows": len(datamodule.val_indices),
    }
    if datamodule.are_pairs:
        if options.base:
            raise ConfigError(
                "--base: of pairs the base is the reference, so its figures are those of a coin"
            )
        figures |= score_pairs(
            model, datamodule, build_loss(Component.from_dict(trained.config["loss"]))
        )
        return add_tasks(figures, model, tokenizer, options) if options.tasks else figures
    score = functools.partial(
        score_rows,
        model,
        tokenizer,
        datamodule,
        max_tokens=None if options.no_samples else options.max_tokens,
        say=_say,
    )
    found, answers = score(whose="the base" if options.base else "the adapter")
    figures |= found
    others: list[Any] = []
    if not (options.base or options.no_base):
        with adapters_off(model):
            figures["base"], others = score(whose="the base")
    if options.answers:
        write_answers(options.answers, answers, others)
    return add_tasks(figures, model, tokenizer, options) if options.tasks else figures


def evaluate_tasks(trained: Trained, options: argparse.Namespace) -> dict[str, Any]:
    """Return the figures of the harness's tasks alone."""
    of_rows = {
        "--answers": options.answers,
        "--columns": options.columns,
        "--no-samples": options.no_samples,
    }
    if idle := [flag for flag, value in of_rows.items() if value]:
        raise ConfigError(
            f"{', '.join(idle)}: of rows, and tasks=… alone has none: name some with --data PATH"
        )
    model, tokenizer = trained.load(with_adapter=not options.base)
    figures = {"run": trained.run.name, "adapter": None if options.base else str(trained.adapter)}
    return add_tasks(figures, model, tokenizer, options)


def add_tasks(
    figures: dict[str, Any], model: Any, tokenizer: Any, options: argparse.Namespace
) -> dict[str, Any]:
    """``figures`` with those of the harness's tasks, and the base's beside them."""
    from lorakit.evaluation.harness import run_harness
    from lorakit.lora.state import adapters_off

    settings = {"limit": options.limit, "batch_size": options.batch_size or 8, "chat": options.chat}
    ask = functools.partial(
        run_harness, model, tokenizer, options.tasks, options.tasks_path, **settings
    )
    figures = figures | {"tasks": ask()}
    if not (options.base or options.no_base):
        with adapters_off(model):
            figures["base"] = figures.get("base", {}) | {"tasks": ask()}
    return figures


def open_rows(trained: Trained, options: argparse.Namespace) -> LoRADataModule:
    """The rows that ``options`` name, or those that the run held out."""
    changes: dict[str, Any] = {}
    if options.data is not None:
        # Other rows may have columns of their own, and need not be mixed.
        changes |= {"path": options.data, "val_path": options.data, "val_fraction": 0.0}
        changes |= dict.fromkeys(("val_rows", "format", "columns", "sources"))
    if options.limit is not None:
        changes["val_rows"] = options.limit
    if options.columns:
        changes["columns"] = dict(options.columns)
    return trained.open_rows(**changes)


def write_answers(path: Path, answers: list[Answer], others: list[Answer]) -> None:
    """Write a line of JSON for each answer, with the base's beside it."""
    lines = []
    for number, answer in enumerate(answers):
        line = {"prompt": answer.prompt, "expected": answer.expected, "answer": answer.sample.text}
        lines.append(line | ({"base": others[number].sample.text} if others else {}))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8"
    )


if __name__ == "__main__":
    run_command(main)
