"""`lorakit show`: what is trained can be told with and without colour, and nothing invisible stays so."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorakit.cli.show import colour
from lorakit.model.load import load_tokenizer

Call = Callable[..., tuple[int, str, str]]


def test_trained_text_stands_in_brackets_where_there_is_no_colour(workplace: Path, lorakit: Call) -> None:
    (workplace / "rows.jsonl").write_text('{"prompt": "a\\u0007b", "completion": "c\\n\\n"}\n')
    code, out, err = lorakit("show", "data.path=rows.jsonl", "data.stop=\\n\\n")
    assert code == 0, err
    assert "a␇b⟦c↵\n↵\n⟧" in out
    assert "1 rows (prompt_completion)" in out and "tokens per example" in out


def test_weights_other_than_one_are_named() -> None:
    tokenizer = load_tokenizer("tiny")
    tokens = tokenizer("abcd")["input_ids"]
    assert colour(tokenizer, tokens, [0.0, 1.0, 0.5, -1.0], has_colour=False).plain == "a⟦b⟧⟦0.5: c⟧⟦-1: d⟧"
    text = colour(tokenizer, tokens, [0.0, 1.0, 0.5, -1.0])
    assert text.plain == "abcd" and colour(tokenizer, tokenizer("\t\x00")["input_ids"], [0.0, 0.0]).plain == "→\t␀"
    assert [str(span.style) for span in text.spans] == ["bright_black", "green", "yellow", "red"]
