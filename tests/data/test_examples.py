"""Rows to Datums and the figures of a data set: nothing disappears without being counted or
named.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_toys import THINKING_TEMPLATE, write_jsonl

from lorakit.data.datum import OnLong, TruncationStats
from lorakit.data.examples import Examples, profile
from lorakit.data.read.sources import open_source
from lorakit.data.render.renderer import Renderer
from lorakit.errors import DataError


def make(
    path: Path,
    rows: list[Any],
    tokenizer: Any,
    max_tokens: int = 32,
    on_long: str = "error",
    **options: Any,
) -> Examples:
    source = open_source(
        write_jsonl(path / "rows.jsonl", rows), on_error=options.get("on_error", "raise")
    )
    renderer = Renderer(
        tokenizer, stop=options.get("stop"), append_eos=options.get("append_eos", "auto")
    )
    return Examples(source, renderer, max_tokens, OnLong(on_long), options.get("on_error", "raise"))


def tokens_row(length: int) -> dict[str, Any]:
    return {"tokens": [7] * length, "weights": [0] * (length - 2) + [1, 1]}


def everything(examples: Examples) -> np.ndarray:
    return np.arange(len(examples.source))


def test_rows_over_max_tokens_are_all_named_by_line_in_one_report(
    tmp_path: Path, tokenizer: Any
) -> None:
    examples = make(
        tmp_path, [tokens_row(4 if n % 2 else 9) for n in range(60)], tokenizer, max_tokens=8
    )
    with pytest.raises(DataError) as error:
        profile(examples, everything(examples), 1_000)
    message = str(error.value)
    assert "30 of 60 rows" in message and message.count("9 tokens, but") == 1
    assert "rows.jsonl:1, 3, 5, " in message and ", 37, 39 and 10 more: 9 tokens, but" in message


def test_a_bad_row_that_streams_by_is_named_by_its_line_or_counted(
    tmp_path: Path, tokenizer: Any
) -> None:
    rows = [tokens_row(4), tokens_row(9)]
    examples = make(tmp_path, rows, tokenizer, max_tokens=8)
    assert len(examples.datums(0)) == 1
    with pytest.raises(DataError, match=r"rows\.jsonl:2: 9 tokens"):
        examples.datums(1)
    skipping = make(tmp_path, rows, tokenizer, max_tokens=8, on_error="skip")
    assert [len(skipping.datums(i)) for i in (0, 1)] == [1, 0]
    assert skipping.num_skipped == 1


def test_max_tokens_counts_the_tokens_before_the_shift(tmp_path: Path, tokenizer: Any) -> None:
    (datum,) = make(tmp_path, [tokens_row(8)], tokenizer, max_tokens=8).datums(0)
    assert len(datum) == 7


def test_the_figures_of_a_data_set_by_hand(tmp_path: Path, tiny: Any) -> None:
    rows = [{"prompt": "ab", "completion": "c\n"}, {"prompt": "a", "completion": "xyz"}]
    report = profile(
        examples := make(tmp_path, rows, tiny, append_eos=False, stop="\n"),
        everything(examples),
        10,
    )
    lengths = [len(tiny(row["prompt"] + row["completion"])["input_ids"]) for row in rows]
    trained = [len(tiny(row["completion"])["input_ids"]) for row in rows]
    assert report.lengths.tolist() == lengths
    assert (report.num_tokens, report.num_trained_tokens) == (sum(lengths), sum(trained))
    assert report.trained_share == sum(trained) / sum(lengths)
    assert (
        report.num_rows,
        report.num_examples,
        report.examples_per_row,
        report.num_without_stop,
    ) == (2, 2, 1.0, 1)
    assert sum(count for _, _, count in report.histogram()) == 2
    assert report.cuts == TruncationStats() and report.num_rows_skipped == 0


def test_eos_counts_as_a_stop_token(tmp_path: Path, tokenizer: Any) -> None:
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}]
    for append_eos, expected in ((True, 0), (False, 2)):
        examples = make(tmp_path, rows, tokenizer, append_eos=append_eos)
        assert profile(examples, everything(examples), 10).num_without_stop == expected


@pytest.mark.parametrize(
    ("on_long", "expected", "lengths"),
    [
        ("drop", TruncationStats(num_dropped=3), [4, 4]),
        (
            "truncate_prompt",
            TruncationStats(num_truncated=3, num_tokens_cut=3 + 4 + 5),
            [4, 8, 8, 8, 4],
        ),
    ],
)
def test_what_is_cut_is_counted_once_however_often_the_rows_are_read(
    tmp_path: Path, tokenizer: Any, on_long: str, expected: TruncationStats, lengths: list[int]
) -> None:
    examples = make(
        tmp_path,
        [tokens_row(n) for n in (4, 11, 12, 13, 4)],
        tokenizer,
        max_tokens=8,
        on_long=on_long,
    )
    for _ in range(2):
        report = profile(examples, everything(examples), 100)
        assert report.cuts == expected and report.lengths.tolist() == lengths
    assert examples.cuts == TruncationStats()


def test_skipped_rows_of_both_passes_are_counted(tmp_path: Path, tokenizer: Any) -> None:
    rows = [tokens_row(4), {"tokens": [1], "weights": []}, tokens_row(9), tokens_row(5)]
    examples = make(tmp_path, rows, tokenizer, max_tokens=8, on_error="skip")
    report = profile(examples, everything(examples), 100)
    assert (report.num_rows, report.num_rows_skipped, report.num_examples) == (3, 2, 2)


def test_a_row_may_give_several_examples(
    tmp_path: Path, tokenizer: Any, with_template: Any
) -> None:
    thought = "<think>\nhm\n</think>\n\nyes"
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": thought}] * 2
    examples = make(
        tmp_path,
        [{"messages": turns}] * 3,
        with_template(tokenizer, THINKING_TEMPLATE),
        max_tokens=200,
    )
    assert len(examples.datums(0)) == 2
    assert profile(examples, everything(examples), 100).examples_per_row == 2.0


def test_no_usable_row_is_an_error_even_when_rows_may_be_skipped(
    tmp_path: Path, tokenizer: Any
) -> None:
    for options in ({"on_long": "drop"}, {"on_error": "skip"}):
        examples = make(tmp_path, [tokens_row(9)] * 2, tokenizer, max_tokens=8, **options)
        with pytest.raises(DataError, match="none of the 2 rows"):
            profile(examples, everything(examples), 100)


def test_only_the_rows_asked_for_are_looked_at(tmp_path: Path, tokenizer: Any) -> None:
    examples = make(tmp_path, [tokens_row(4)] * 5 + [tokens_row(9)], tokenizer, max_tokens=8)
    report = profile(examples, everything(examples), 5)
    assert (report.num_rows, report.num_rows_profiled) == (6, 5)
    with pytest.raises(DataError, match=r"rows\.jsonl:6"):
        profile(examples, np.array([5]), 5)


def test_answers_that_say_nothing_are_counted_with_their_place(
    tmp_path: Path, tokenizer: Any
) -> None:
    said, eos = tokenizer.encode("yes", add_special_tokens=False), tokenizer.eos_token_id
    answers = [[*said, eos], [eos], [*said, eos, *said, eos], said]
    rows = [
        {"tokens": [*said, *answer], "weights": [0] * len(said) + [1] * len(answer)}
        for answer in answers
    ]
    rows.append(
        {
            "tokens": [*said, eos, *said, eos],
            "weights": [0] * len(said) + [1] + [0] * len(said) + [0.5],
        }
    )
    examples = make(tmp_path, rows, tokenizer)
    report = profile(examples, everything(examples), 10)
    assert report.num_empty_answers == 3 and str(report.first_empty_answer).endswith(":2")
