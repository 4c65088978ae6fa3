"""``lorakit show data.path=…``: examples with each token coloured by its weight, and the figures
of the data set.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import TYPE_CHECKING

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command
from lorakit.errors import ConfigError

if TYPE_CHECKING:
    from omegaconf import DictConfig


HELP = """\
usage: lorakit show [-n N] [--html FILE] [key=value …]

  lorakit show data.path=rows.jsonl model.path=…  first examples as `lorakit train` would train them
  lorakit show -n 10 data.path=…                  ten of them (of each source, if there are several)
  lorakit show --html rows.html data.path=…       as a page: every token, and images beside them

Green tokens are trained (weight 1), grey ones are read only (weight 0), yellow have another
positive weight, red a negative one. Where the output has no colour, trained text is in ⟦ ⟧,
with the weight in front where that is not 1."""


def main(arguments: list[str]) -> None:
    """Show what ``arguments`` name."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    count, page, arguments = _take_options(arguments)
    run_hydra(lambda config: show(config, count, page), arguments, config_name="train")


def show(config: DictConfig, count: int, page: Path | None) -> None:
    """Hydra's task: print ``count`` examples, or write them to ``page``, and the report."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from lorakit.config.resolve import to_plain
    from lorakit.config.schema import RunConfig
    from lorakit.data.display import colour, first_examples
    from lorakit.pipeline import build
    from lorakit.pipeline.printing import print_data_report

    console = Console(soft_wrap=True)
    if is_unnamed := OmegaConf.is_missing(config.model, "path"):
        OmegaConf.update(config, "model.path", "tiny")
    run_config = RunConfig.from_dict(to_plain(config))
    datamodule, model = build.build_datamodule(run_config), run_config.model
    datamodule.check_rows()
    if is_unnamed:
        model = dataclasses.replace(model, path="tiny-vl" if datamodule.has_images else "tiny")
        console.print(
            f"model.path is not set: shown with the tokenizer of a bundled model, {model.path}"
        )
    tokenizer = build.make_tokens(datamodule, model)
    if page:
        from lorakit.reports.examples_page import as_page
        from lorakit.runs.files import find_write_problem, write_whole

        if problem := find_write_problem(page):
            raise ConfigError(f"--html {page}: {problem}")
        text = as_page(datamodule, tokenizer, list(first_examples(datamodule, count)))
        page.parent.mkdir(parents=True, exist_ok=True)
        write_whole(page, functools.partial(Path.write_text, data=text, encoding="utf-8"))
        console.print(f"examples: {page}")
    else:
        for where, example in first_examples(datamodule, count):
            if isinstance(example, str):
                console.print(f"skipped: {example}", markup=False)
                continue
            console.rule(f"{where}  {len(example.tokens)} tokens", align="left", style="dim")
            console.print(colour(tokenizer, example, has_colour=console.color_system is not None))
            for number, image in enumerate(example.images, 1):
                console.print(
                    f"image {number}: {image.chunk.name}, {image.chunk.length} tokens",
                    style="dim",
                    markup=False,
                )
    console.rule(style="dim")
    print_data_report(datamodule, console, histogram=True)


def _take_options(arguments: list[str]) -> tuple[int, Path | None, list[str]]:
    count, rest = _take(arguments, "-n", "3", "a number of examples")
    if not count.isdecimal():
        raise ConfigError(f"-n {count}: give a number of examples")
    page, rest = _take(rest, "--html", "", "the file to write")
    return int(count), Path(page) if page else None, rest


def _take(arguments: list[str], option: str, default: str, wanted: str) -> tuple[str, list[str]]:
    """Return what follows ``option``, and the other arguments."""
    if option not in arguments:
        return default, arguments
    place = arguments.index(option)
    if place + 1 == len(arguments):
        raise ConfigError(f"{option}: give {wanted}")
    return arguments[place + 1], arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    run_command(main)
