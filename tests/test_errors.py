"""Equal messages are one line that loses no place and no figure."""

from __future__ import annotations

import pickle

from lorakit.errors import DataError, fold, report


def test_equal_messages_are_one_line_with_every_place() -> None:
    problems = [
        ("a.jsonl:2", "no role"),
        ("a.jsonl:7", "empty"),
        ("a.jsonl:9", "no role"),
        ("b2.csv: row 3", "no role"),
        ("b2.csv: row 14", "no role"),
        ("somewhere", "no role"),
    ]
    assert fold(problems) == [
        "a.jsonl:2, 9: no role",
        "a.jsonl:7: empty",
        "b2.csv: row 3, 14: no role",
        "somewhere: no role",
    ]


def test_the_largest_leading_count_is_kept() -> None:
    problems = [("r:1", "1,300 tokens, but 8"), ("r:2", "90 tokens, but 8"), ("r:3", "9 images")]
    assert fold(problems) == ["r:1, 2: up to 1,300 tokens, but 8", "r:3: 9 images"]


def test_many_places_are_counted_and_many_messages_too() -> None:
    (line,) = fold([(f"data[{i}]", ".weights is missing") for i in range(1030)], separator="")
    assert line == "data[0–1029].weights is missing"
    (line,) = fold([(f"r:{i}", "empty") for i in (1, 2, *range(4, 90, 2))])
    assert line.startswith("r:1, 2, 4, 6, ") and line.endswith(", 40 and 24 more: empty")
    shown = report("bad:", fold([(f"r:{i}", f"word{i}x") for i in range(25)])).splitlines()
    assert len(shown) == 22 and shown[-1] == "  … and 5 more"


def test_an_error_keeps_its_place_between_processes() -> None:
    error = pickle.loads(pickle.dumps(DataError("empty", "rows.jsonl:3")))
    assert (str(error), error.text, error.where) == ("rows.jsonl:3: empty", "empty", "rows.jsonl:3")
    assert str(DataError("empty")) == "empty"
