"""A data set's examples as a person looks at them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rich.text import Text

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.render.renderer import Rendered
from lorakit.errors import DataError

# Unicode has a picture of each control character; a line's end is shown and kept.
_VISIBLE = {code: chr(0x2400 + code) for code in range(0x20)} | {
    0x7F: "␡",
    ord("\n"): "↵\n",
    ord("\t"): "→\t",
}


def decode(tokenizer: Any, tokens: list[int]) -> str:
    """The text of ``tokens``, with a picture for each character that cannot be seen."""
    text: str = tokenizer.decode(
        tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
    )
    return text.translate(_VISIBLE)


def first_examples(
    datamodule: LoRADataModule, num_rows: int
) -> Iterator[tuple[str, Rendered | str]]:
    """Yield where each example of the first rows is, source by source, and the example, or why
    there is none.
    """
    examples, indices = datamodule.train_examples, datamodule.train_indices
    origins = examples.source.origins_of(indices)
    firsts = [
        indices[origins == number][:num_rows]
        for number in range(max(len(datamodule.source_names), 1))
    ]
    for index in (int(index) for rows in firsts for index in rows):
        where = examples.source.where(index)
        try:
            found = examples.rendered(index)
            if examples.images is not None:
                examples.images.encode(
                    [image.chunk for example in found for image in example.images]
                )
            yield from ((where, example) for example in found)
        except DataError as error:
            if examples.on_error == "raise":
                raise
            yield where, str(error)


def colour(tokenizer: Any, example: Rendered, *, has_colour: bool = True) -> Text:
    """Return the text of ``example``, each run of equal weight in its colour or in brackets;
    what cannot be seen is marked.
    """
    text = Text()
    tokens, weights = example.tokens, example.weights
    starts = {image.start: image.chunk.length for image in example.images}
    start = 0
    while start < len(tokens):
        end = start + 1
        if length := starts.get(start):
            end, piece = start + length, f"{decode(tokenizer, tokens[start:end])} x {length}"
        else:
            while end < len(tokens) and weights[end] == weights[start] and end not in starts:
                end += 1
            piece = decode(tokenizer, tokens[start:end])
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
