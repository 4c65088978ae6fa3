"""What public chat templates do: token by token as transformers writes it, and nothing lost or
quoted twice.
"""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import chat_templates
import pytest
from data_toys import text_of, trained_text, write_jsonl

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.read.rows import Chat, Message
from lorakit.data.read.sources import open_source
from lorakit.data.render.renderer import Renderer
from lorakit.data.render.templates import read_template, use_template
from lorakit.errors import ConfigError, DataError

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object"}}}]
CITY = {"city": "Łódź", "days": 2, "note": 'say "hi"'}


def call(arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "weather", "arguments": arguments}}


def conversation(arguments: Any, *, system: str | None = None) -> list[Message]:
    return [
        *([Message("system", system)] if system else []),
        Message("user", "How is it?"),
        Message("assistant", None, tool_calls=[call(arguments)]),
        Message("tool", "rain"),
        Message("assistant", "It rains."),
    ]


def whole(tokenizer: Any, messages: list[dict[str, Any]], tools: Any = None) -> list[int]:
    """What transformers itself makes of a conversation."""
    return list(
        tokenizer.apply_chat_template(messages, tools=tools, tokenize=True, return_dict=False)
    )


@pytest.mark.parametrize("system", [None, "Be brief."])
@pytest.mark.parametrize("tools", [None, TOOLS])
def test_system_prompt_and_tools_stand_where_the_template_puts_them(
    tiny: Any, with_template: Any, system: str | None, tools: Any
) -> None:
    tokenizer = with_template(tiny, chat_templates.DEFAULT_SYSTEM)
    (example,) = Renderer(tokenizer).render(Chat(conversation(CITY, system=system), tools))
    plain = [{"role": "system", "content": system}] if system else []
    plain += [
        {"role": "user", "content": "How is it?"},
        {"role": "assistant", "content": "", "tool_calls": [call(CITY)]},
    ]
    plain += [{"role": "tool", "content": "rain"}, {"role": "assistant", "content": "It rains."}]
    assert example.tokens == whole(tokenizer, plain, tools)
    text = text_of(tokenizer, example.tokens)
    assert (system or "You are a helpful assistant.") in text and ("<tools>" in text) == bool(tools)
    trained = trained_text(tokenizer, example)
    assert (
        trained.endswith("</tool_call><|im_end|>It rains.<|im_end|>")
        and "helpful" not in trained
        and "rain<" not in trained
    )


@pytest.mark.parametrize("given", [CITY, json.dumps(CITY, ensure_ascii=False), json.dumps(CITY)])
@pytest.mark.parametrize(
    "name", ["DEFAULT_SYSTEM", "ARGUMENTS_AS_TEXT", "ARGUMENTS_PRINTED", "ARGUMENTS_BY_NAME"]
)
def test_arguments_are_written_once_whichever_form_the_row_and_the_template_have(
    tiny: Any, with_template: Any, name: str, given: Any
) -> None:
    tokenizer = with_template(tiny, getattr(chat_templates, name))
    (example,) = Renderer(tokenizer).render(Chat(conversation(given)))
    text = text_of(tokenizer, example.tokens)
    if name == "ARGUMENTS_BY_NAME":
        assert '<city>Łódź</city><days>2</days><note>say "hi"</note>' in text
        return
    start = text.index('{"city"')
    found, _ = json.JSONDecoder().raw_decode(text, start)
    assert found == CITY and "'city'" not in text and '\\"city' not in text


def test_a_message_that_quotes_a_dict_of_python_changes_no_call(
    tiny: Any, with_template: Any
) -> None:
    tokenizer = with_template(tiny, chat_templates.DEFAULT_SYSTEM)
    messages = [
        Message("user", "call it with {'city': 'Oslo'}"),
        Message("assistant", None, tool_calls=[call({"city": "Oslo"})]),
    ]
    (example,) = Renderer(tokenizer).render(Chat(messages))
    assert '"arguments": {"city": "Oslo"}}' in text_of(tokenizer, example.tokens)


@pytest.mark.parametrize("tools", ["", "  ", "null", None])
@pytest.mark.parametrize("arguments", ["null", "", None])
def test_nothing_is_no_tool_and_no_argument(
    tiny: Any, with_template: Any, tools: Any, arguments: Any, tmp_path: Path
) -> None:
    row = {
        "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "tool_calls": [call(arguments)]},
        ],
        "tools": tools,
    }
    source = open_source(write_jsonl(tmp_path / "a.jsonl", [row]))
    (example,) = Renderer(with_template(tiny, chat_templates.DEFAULT_SYSTEM)).render(source.row(0))
    assert '"arguments": {}}' in text_of(tiny, example.tokens)


@pytest.mark.parametrize(
    "mark", ["{% generation %}", "{%-generation-%}", "{%  generation %}", "{%+ generation %}"]
)
def test_transformers_own_tag_is_no_error(tmp_path: Path, tiny: Any, mark: str) -> None:
    (tmp_path / "a.jinja").write_text(
        "{% for m in messages %}" + mark + "{{ m.content }}{% endgeneration %}{% endfor %}"
    )
    use_template(copy.deepcopy(tiny), str(tmp_path / "a.jinja"))


def test_arguments_and_tools_that_are_not_json_are_errors_by_line(tmp_path: Path) -> None:
    ask, answer = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
    rows = [
        {"messages": [ask, {"role": "assistant", "tool_calls": [call('{"city": ')]}]},
        {"messages": [ask, {"role": "assistant", "tool_calls": [call("[1]")]}]},
        {"messages": [ask, {"role": "assistant", "tool_calls": [{"id": "x"}]}]},
        {"messages": [ask, answer], "tools": "{"},
        {"messages": [ask, answer], "tools": "[1]"},
        {"messages": [ask, answer], "tools": "[]"},
    ]
    with pytest.raises(DataError) as caught:
        open_source(write_jsonl(tmp_path / "rows.jsonl", rows))
    lines = str(caught.value).splitlines()
    for number, words in enumerate(
        ["a text that is not JSON", "no object", "no call", "not JSON", "list of objects"], 1
    ):
        assert f"rows.jsonl:{number}:" in lines[number] and words in lines[number]
    assert "5 of 6 rows" in lines[0]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_rows_may_have_arguments_of_different_kinds(
    tmp_path: Path, tiny: Any, with_template: Any, suffix: str
) -> None:
    kinds = [CITY, json.dumps(CITY), {"city": 3}, {"city": ["a", {"b": None}]}, "", None]
    rows = [
        {
            "messages": [
                {"role": "user", "content": "q"},
                {"role": "assistant", "tool_calls": [call(kind)]},
            ],
            "tools": tools,
        }
        for kind in kinds
        for tools in (TOOLS, json.dumps(TOOLS))
    ]
    path = tmp_path / f"rows{suffix}"
    path.write_text(
        "\n".join(map(json.dumps, rows)) if suffix == ".jsonl" else json.dumps(rows),
        encoding="utf-8",
    )
    data = LoRADataModule(path=str(path))
    data.set_tokenizer(with_template(tiny, chat_templates.DEFAULT_SYSTEM))
    assert data.check_tokens().num_examples == len(rows)
    texts = [
        text_of(tiny, data.train_examples.rendered(index)[0].tokens) for index in range(len(rows))
    ]
    # tools as JSON are the same tools
    assert all(texts[i] == texts[i + 1] for i in range(0, len(rows), 2))
    assert '"arguments": {}}' in texts[-1]


def test_what_was_thought_is_trained_in_its_own_turn_and_dropped_from_earlier_ones(
    tiny: Any, with_template: Any
) -> None:
    tokenizer = with_template(tiny, chat_templates.REASONING)
    said = [("a?", "hm", "yes"), ("b?", "aha", "no")]
    messages = [
        message
        for question, thought, answer in said
        for message in (
            Message("user", question),
            Message("assistant", answer, reasoning_content=thought),
        )
    ]
    first, second = Renderer(tokenizer).render(Chat(messages))
    assert trained_text(tokenizer, first) == "<think>\nhm\n</think>\n\nyes<|im_end|>"
    assert trained_text(tokenizer, second) == "<think>\naha\n</think>\n\nno<|im_end|>"
    plain = [
        message
        for question, thought, answer in said
        for message in (
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, "reasoning_content": thought},
        )
    ]
    assert second.tokens == whole(tokenizer, plain) and first.tokens == whole(tokenizer, plain[:2])


def test_a_template_that_calls_it_thinking_is_given_it_so(tiny: Any, with_template: Any) -> None:
    row = Chat([Message("user", "q"), Message("assistant", "a", reasoning_content="hm")])
    (example,) = Renderer(with_template(tiny, chat_templates.THINKING)).render(row)
    assert trained_text(tiny, example) == "<think>\nhm\n</think>\n\na<|im_end|>"


def test_thoughts_that_the_template_leaves_out_are_an_error_unless_they_are_not_trained(
    tiny: Any,
) -> None:
    row = Chat([Message("user", "q"), Message("assistant", "a", reasoning_content="hm")])
    with pytest.raises(DataError, match=r"message 1 has `reasoning_content`.*leaves it out"):
        Renderer(tiny).render(row)
    row.messages[1].weight = 0.0
    assert Renderer(tiny).render(
        Chat([*row.messages, Message("user", "q"), Message("assistant", "b")])
    )


# ---- data.chat_template


def test_the_plain_template_ends_answers_with_eos_and_prompts_as_sampling_does(
    second: Any, with_template: Any
) -> None:
    tokenizer = with_template(second, None)
    use_template(tokenizer, "plain")
    (example,) = Renderer(tokenizer).render(
        Chat([Message("user", "hello"), Message("assistant", "yes")])
    )
    assert (
        text_of(tokenizer, example.tokens).strip() == "<s>User: hello\n\nAssistant: yes</s>".strip()
    )
    assert trained_text(tokenizer, example) == " yes</s>"
    prompt = whole(tokenizer, [{"role": "user", "content": "hello"}]) and Renderer(
        tokenizer
    ).encoder.encode_chat([{"role": "user", "content": "hello"}])
    assert example.tokens[: len(prompt)] == prompt and not any(example.weights[: len(prompt)])


def test_a_template_of_the_users_own_decides_what_is_trained_and_belongs_to_the_fingerprint(
    tmp_path: Path, tiny: Any
) -> None:
    messages = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    rows = write_jsonl(tmp_path / "a.jsonl", [{"messages": messages}])
    mine = (
        read_template("chatml")
        .replace("message.role", "message.role.upper()")
        .replace("assistant", "ASSISTANT")
    )
    (tmp_path / "mine.jinja").write_text(mine, encoding="utf-8")
    found = []
    for template in (None, "chatml", str(tmp_path / "mine.jinja")):
        data = LoRADataModule(path=rows, chat_template=template)
        data.set_tokenizer(copy.deepcopy(tiny))
        found.append((data.train_examples.rendered(0)[0], data.fingerprint))
    assert len({fingerprint for _, fingerprint in found}) == 3
    assert trained_text(tiny, found[2][0]) == "a<|im_end|>" and "ASSISTANT" in text_of(
        tiny, found[2][0].tokens
    )


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("plane", None, "did you mean plain"),
        ("/nowhere/x.jinja", None, "no such file; give a file"),
        ("bad.jinja", "{% for message in messages %}\n{{ message.role }", "line 2"),
        ("chatml", None, "no token <|im_end|>.*use plain"),
    ],
)
def test_a_template_that_cannot_be_used_is_one_message(
    tmp_path: Path, second: Any, with_template: Any, name: str, text: str | None, words: str
) -> None:
    if text:
        (tmp_path / name).write_text(text, encoding="utf-8")
        name = str(tmp_path / name)
    with pytest.raises(ConfigError, match=words):
        use_template(with_template(second, None), name)


def test_a_model_without_a_template_is_told_what_to_type(second: Any, with_template: Any) -> None:
    with pytest.raises(ConfigError, match=r"data\.chat_template=plain"):
        Renderer(with_template(second, None)).render(
            Chat([Message("user", "q"), Message("assistant", "a")])
        )
