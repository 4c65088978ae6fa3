"""Which format a row has, and what is wrong with rows of the right columns and types."""

from __future__ import annotations

import json
from typing import Any

import msgspec
import pytest

from lorakit.data.read.columns import recognise
from lorakit.data.read.rows import FORMATS, Chat, find_problem, to_chat


def problem_of(format: str, row: dict[str, Any]) -> str | None:
    return find_problem(msgspec.json.decode(json.dumps(row).encode(), type=FORMATS[format]))


def chat(*roles: str) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (["prompt", "completion"], "prompt_completion"),
        (["completion", "id", "prompt", "text"], "prompt_completion"),
        (["messages"], "messages"),
        (["messages", "tools", "prompt"], "messages"),
        (["conversations"], "conversations"),
        (["conversations", "system", "id"], "conversations"),
        (["instruction", "output"], "alpaca"),
        (["instruction", "input", "output", "text"], "alpaca"),
        (["text"], "text"),
        (["meta", "text"], "text"),
        (["tokens", "weights"], "tokens"),
        (["tokens", "weights", "text"], "tokens"),
        (["tokens"], None),
        (["prompt"], None),
        (["instruction", "input"], None),
        (["Text"], None),
        ([], None),
    ],
)
def test_a_format_is_recognised_by_its_columns(columns: list[str], expected: str | None) -> None:
    assert recognise(columns) == recognise(reversed(columns)) == expected


@pytest.mark.parametrize(
    "roles",
    [
        ["user", "assistant"],
        ["system", "user", "assistant", "user", "assistant"],
        ["developer", "user", "assistant"],
        ["user", "assistant", "tool", "assistant"],
        ["user", "assistant", "tool", "tool", "assistant", "user"],
        ["user"],
    ],
)
def test_these_orders_of_roles_are_conversations(roles: list[str]) -> None:
    assert problem_of("messages", chat(*roles)) is None


@pytest.mark.parametrize(
    ("roles", "index"),
    [
        (["assistant"], 0),
        (["system", "assistant"], 1),
        (["user", "assistant", "assistant"], 2),
        (["user", "user"], 1),
        (["user", "system"], 1),
        (["system", "system"], 1),
        (["tool"], 0),
        (["user", "tool"], 1),
        (["user", "assistant", "developer"], 2),
        (["system", "tool"], 1),
    ],
)
def test_roles_out_of_order_are_named_by_the_message(roles: list[str], index: int) -> None:
    problem = problem_of("messages", chat(*roles))
    assert problem is not None and problem.startswith(
        f"roles out of order: message {index} ({roles[index]})"
    )


def test_an_unknown_role_or_speaker_is_refused() -> None:
    with pytest.raises(msgspec.ValidationError):
        problem_of("messages", chat("user", "robot"))
    problem = problem_of(
        "conversations",
        {"conversations": [{"from": "human", "value": "a"}, {"from": "gtp", "value": "b"}]},
    )
    assert problem is not None and "'gtp'" in problem


@pytest.mark.parametrize(
    ("format", "row"),
    [
        ("prompt_completion", {"prompt": "a", "completion": ""}),
        ("alpaca", {"instruction": "a", "output": ""}),
        ("text", {"text": ""}),
        ("messages", {"messages": []}),
        ("conversations", {"conversations": []}),
        ("tokens", {"tokens": [1, 2], "weights": [1, 0]}),
        ("tokens", {"tokens": [], "weights": []}),
        ("tokens", {"tokens": [1], "weights": [1]}),
    ],
)
def test_a_row_without_a_trained_token_is_a_problem(format: str, row: dict[str, Any]) -> None:
    assert "no trained token" in (problem_of(format, row) or "")


def test_tokens_and_weights_must_be_of_one_length() -> None:
    assert (
        problem_of("tokens", {"tokens": [1, 2, 3], "weights": [0, 1]})
        == "3 `tokens` but 2 `weights`"
    )


@pytest.mark.parametrize("weights", [[0, 1, 0], [0, -1, -1], [0.25, 0.5, 1e-3], [0, 0, -0.125]])
def test_negative_and_fractional_weights_are_legal(weights: list[float]) -> None:
    assert problem_of("tokens", {"tokens": [1, 2, 3], "weights": weights}) is None


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_a_weight_that_is_not_finite_is_refused(bad: float) -> None:
    assert "not finite" in (
        find_problem(msgspec.convert({"tokens": [1, 2], "weights": [0, bad]}, FORMATS["tokens"]))
        or ""
    )
    messages = [
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": bad},
    ]
    problem = find_problem(msgspec.convert({"messages": messages}, Chat))
    assert problem == "message 1 (assistant): `weight` is not finite"


def test_a_negative_token_is_refused() -> None:
    assert "-5" in (problem_of("tokens", {"tokens": [1, -5], "weights": [0, 1]}) or "")


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (None, "neither"),
        ([{"type": "video", "video": "x"}], "content part 0"),
        ([{"type": "text"}], "content part 0"),
        ([{"type": "text", "text": "a"}, {"type": "text", "text": 3}], "content part 1"),
    ],
)
def test_content_that_cannot_be_trained_on_is_named_by_message_and_part(
    content: Any, expected: str
) -> None:
    row = {
        "messages": [{"role": "user", "content": "x"}, {"role": "assistant", "content": content}]
    }
    problem = problem_of("messages", row)
    assert (
        problem is not None and problem.startswith("message 1 (assistant)") and expected in problem
    )


def test_a_tool_call_needs_no_content() -> None:
    call = {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}],
    }
    assert problem_of("messages", {"messages": [{"role": "user", "content": "x"}, call]}) is None


def test_sharegpt_becomes_messages_turn_by_turn_with_weights() -> None:
    turns = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "weight": -0.5}]
    converted = to_chat(
        msgspec.convert({"conversations": turns, "system": "s"}, FORMATS["conversations"])
    )
    assert [(m.role, m.content, m.weight) for m in converted.messages] == [
        ("system", "s", None),
        ("user", "q", None),
        ("assistant", "a", -0.5),
    ]
