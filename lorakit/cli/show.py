"""``lorakit show data.path=…``: examples with each token coloured by its weight, and the figures of the data set."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorakit.cli.compose import run_hydra
from lorakit.cli.guard import run_command

if TYPE_CHECKING:
    from omegaconf import DictConfig
    from rich.text import Text

HELP = """\
usage: lorakit show [-n N] [key=value …]

  lorakit show data.path=rows.jsonl model.path=…     first examples as `lorakit train` would train them
  lorakit show -n 10 data.path=…                     ten of them

Green tokens are trained (weight 1), grey ones are read only (weight 0), yellow have another positive weight, red a negative one.
Where the output has no colour, trained text stands in ⟦ ⟧, with the weight in front where that is not 1."""


# Unicode has a picture of each control character; a line's end is shown and kept.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {0x7F: "␡", ord("\n"): "↵\n", ord("\t"): "→\t"}


def main(arguments: list[str]) -> None:
    """Show what ``arguments`` name."""
    if {"-h", "--help"} & set(arguments):
        print(HELP)
        return
    count, arguments = _take_count(arguments)
    run_hydra(lambda config: show(config, count), arguments, config_name="train")


def show(config: DictConfig, count: int) -> None:
    """Hydra's task: print ``count`` examples and the report."""
    from omegaconf import OmegaConf
    from rich.console import Console

    from lorakit.cli import assemble
    from lorakit.cli.reports import print_data_report
    from lorakit.cli.schema import check_settings
    from lorakit.cli.train import to_plain
    from lorakit.errors import DataError

    console = Console(soft_wrap=True)
    if OmegaConf.is_missing(config.model, "path"):
        console.print("model.path is not set: shown with the tokenizer of the bundled model, tiny")
        OmegaConf.update(config, "model.path", "tiny")
    plain = to_plain(config)
    check_settings(plain)
    datamodule, tokenizer = assemble.load_data(plain)
    examples = datamodule.train_examples
    for index in datamodule.train_indices[:count]:
        try:
            rendered = examples.rendered(int(index))
        except DataError as error:  # under data.on_error=skip; else check_tokens has raised it
            console.print(f"skipped: {error}", markup=False)
            continue
        for example in rendered:
            console.rule(f"{examples.source.where(int(index))}  {len(example.tokens)} tokens", align="left", style="dim")
            text = colour(tokenizer, example.tokens, example.weights, has_colour=console.color_system is not None)
            console.print(text)
    console.rule(style="dim")
    print_data_report(datamodule, console, histogram=True)


def colour(tokenizer: Any, tokens: list[int], weights: list[float], *, has_colour: bool = True) -> Text:
    """Return the text of ``tokens``, each run of equal weight in its colour or in brackets; what cannot be seen is marked."""
    from rich.text import Text

    text = Text()
    start = 0
    for end in range(1, len(tokens) + 1):
        if end == len(tokens) or weights[end] != weights[start]:
            piece = tokenizer.decode(tokens[start:end], skip_special_tokens=False, clean_up_tokenization_spaces=False)
            piece = piece.translate(_VISIBLE)
            if weights[start] and not has_colour:
                piece = f"⟦{piece}⟧" if weights[start] == 1 else f"⟦{weights[start]:g}: {piece}⟧"
            text.append(piece, style=_style(weights[start]))
            start = end
    return text


def _style(weight: float) -> str:
    if weight == 0:
        return "bright_black"
    if weight < 0:
        return "red"
    return "green" if weight == 1 else "yellow"


def _take_count(arguments: list[str]) -> tuple[int, list[str]]:
    if "-n" not in arguments:
        return 3, arguments
    from lorakit.errors import ConfigError

    place = arguments.index("-n")
    value = arguments[place + 1] if place + 1 < len(arguments) else ""
    if not value.isdecimal():
        raise ConfigError(f"-n {value}: give a number of examples")
    return int(value), arguments[:place] + arguments[place + 2 :]


if __name__ == "__main__":
    run_command(main)
