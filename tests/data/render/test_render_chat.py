"""Conversations: which tokens each policy trains, compared with text written by hand, on two
tokenizers.
"""

from __future__ import annotations

from typing import Any

import pytest
from data_toys import COUNTING_TEMPLATE, THINKING_TEMPLATE, text_of, trained_text

from lorakit.data.read.rows import Alpaca, Chat, Conversations, Message, PromptCompletion, Turn
from lorakit.data.render.renderer import Renderer, TrainOnWhat
from lorakit.errors import ConfigError, DataError

CHAT = [
    ("system", "You answer in one word."),
    ("user", "First question?"),
    ("assistant", "yes"),
    ("user", "Second question?"),
    ("assistant", " no\n"),
    ("user", "yes"),  # the same words as an answer: a search for text would train them
    ("assistant", "The answer is no."),
]
TRAINED = {
    "last_assistant_message": ["The answer is no."],
    "all_assistant_messages": ["yes", " no\n", "The answer is no."],
    "all_messages": [content for _, content in CHAT],
}


def chat_of(*turns: tuple[str, str]) -> Chat:
    return Chat([Message(role, content) for role, content in turns])


@pytest.mark.parametrize("policy", TRAINED)
def test_a_policy_trains_these_messages_each_with_its_end_of_turn(
    tokenizer: Any, policy: str
) -> None:
    (example,) = Renderer(tokenizer, train_on=policy).render(chat_of(*CHAT))
    assert trained_text(tokenizer, example) == "".join(
        text + tokenizer.eos_token for text in TRAINED[policy]
    )
    assert set(example.weights) == {0.0, 1.0}


@pytest.mark.parametrize("policy", [*TRAINED, "all_tokens"])
def test_the_tokens_spell_what_the_template_writes_whatever_is_trained(
    tokenizer: Any, policy: str
) -> None:
    (example,) = Renderer(tokenizer, train_on=policy).render(chat_of(*CHAT))
    messages = [{"role": role, "content": content} for role, content in CHAT]
    assert text_of(tokenizer, example.tokens) == tokenizer.apply_chat_template(
        messages, tokenize=False
    )
    assert example.tokens.count(tokenizer.bos_token_id) == (tokenizer.bos_token is not None)


def test_all_tokens_trains_every_token(tokenizer: Any) -> None:
    (example,) = Renderer(tokenizer, train_on="all_tokens").render(chat_of(*CHAT))
    assert example.weights == [1.0] * len(example.tokens)


def test_white_space_behind_the_end_of_turn_is_not_trained(tokenizer: Any) -> None:
    (example,) = Renderer(tokenizer).render(chat_of(*CHAT))
    assert text_of(tokenizer, example.tokens).endswith(tokenizer.eos_token + "\n")
    assert (example.tokens[-2], example.weights[-2:]) == (tokenizer.eos_token_id, [1.0, 0.0])


def test_what_is_untrained_before_an_answer_is_the_prompt_of_sampling(tokenizer: Any) -> None:
    (example,) = Renderer(tokenizer, train_on="last_assistant_message").render(chat_of(*CHAT))
    messages = [{"role": role, "content": content} for role, content in CHAT[:-1]]
    prompt = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, tokenize=True, return_dict=False
    )
    assert example.tokens[: len(prompt)] == prompt
    assert example.weights.index(1.0) == len(prompt)


@pytest.mark.parametrize(
    ("policy", "expected"),
    [
        ("all_assistant_messages", [("yes", -0.5), ("no", 1.0)]),
        ("weights_given", [("First", 2.0), ("yes", -0.5)]),
        ("last_assistant_message", [("no", 1.0)]),
    ],
)
def test_a_messages_weight_scales_its_tokens_alone(
    tokenizer: Any, policy: str, expected: list[tuple[str, float]]
) -> None:
    row = Chat(
        [
            Message("user", "First", 2.0),
            Message("assistant", "yes", -0.5),
            Message("user", "Second", None if policy == "weights_given" else 0.0),
            Message("assistant", "no"),
        ]
    )
    (example,) = Renderer(tokenizer, train_on=policy).render(row)
    for text, weight in expected:
        chosen = [t for t, w in zip(example.tokens, example.weights, strict=True) if w == weight]
        assert text_of(tokenizer, chosen) == text + tokenizer.eos_token
    assert set(example.weights) == {0.0, *(weight for _, weight in expected)}


def test_a_message_of_weight_0_is_not_trained(tokenizer: Any) -> None:
    row = Chat(
        [
            Message("user", "q"),
            Message("assistant", "yes", 0),
            Message("user", "q"),
            Message("assistant", "no"),
        ]
    )
    (example,) = Renderer(tokenizer).render(row)
    assert trained_text(tokenizer, example) == "no" + tokenizer.eos_token


def test_a_conversation_without_an_assistant_has_nothing_to_train(tokenizer: Any) -> None:
    with pytest.raises(
        DataError, match=r"no trained token under data\.train_on=all_assistant_messages"
    ):
        Renderer(tokenizer).render(chat_of(("user", "hello")))
    (example,) = Renderer(tokenizer, train_on="all_messages").render(chat_of(("user", "hello")))
    assert trained_text(tokenizer, example) == "hello" + tokenizer.eos_token


def test_content_parts_sharegpt_and_alpaca_render_like_plain_messages(tokenizer: Any) -> None:
    render = Renderer(tokenizer).render
    plain = chat_of(("system", "Be kind."), ("user", "Add.\n2"), ("assistant", "four"))
    parts = [{"type": "text", "text": "Add."}, {"type": "text", "text": "\n2"}]
    assert render(Chat([plain.messages[0], Message("user", parts), plain.messages[2]])) == render(
        plain
    )
    turns = [Turn("human", "Add.\n2"), Turn("gpt", "four")]
    assert render(Conversations(turns, "Be kind.")) == render(plain)
    assert render(Conversations([Turn("system", "Be kind."), *turns])) == render(plain)
    assert render(Alpaca("Add.", "four", "2")) == render(Chat(plain.messages[1:]))


THOUGHTS = [
    ("user", "First question?"),
    ("assistant", "<think>\nhm\n</think>\n\nyes"),
    ("user", "Second question?"),
    ("assistant", "<think>\naha\n</think>\n\nno"),
    ("user", "third?"),
    ("assistant", "welcome"),
]


def test_a_template_that_drops_thoughts_gives_one_example_per_turn_as_the_model_saw_it(
    tokenizer: Any, with_template: Any
) -> None:
    thinking = with_template(tokenizer, THINKING_TEMPLATE)
    examples = Renderer(thinking).render(chat_of(*THOUGHTS))
    assert len(examples) == 3
    for example, turn in zip(examples, (1, 3, 5), strict=True):
        messages = [{"role": role, "content": content} for role, content in THOUGHTS[:turn]]
        prompt = thinking.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False
        )
        assert example.tokens[: len(prompt)] == prompt
        assert not any(example.weights[: len(prompt)])
        assert trained_text(thinking, example) == THOUGHTS[turn][1] + thinking.eos_token
        assert text_of(thinking, example.tokens).count("<think>") == THOUGHTS[turn][1].count(
            "<think>"
        )


def test_a_template_that_drops_thoughts_gives_one_example_where_no_thought_is_dropped(
    tokenizer: Any, with_template: Any
) -> None:
    thinking = with_template(tokenizer, THINKING_TEMPLATE)
    plain = chat_of(("user", "a"), ("assistant", "yes"), ("user", "b"), ("assistant", "no"))
    assert len(Renderer(thinking).render(plain)) == 1
    (last,) = Renderer(thinking, train_on="last_assistant_message").render(chat_of(*THOUGHTS[:4]))
    assert trained_text(thinking, last) == THOUGHTS[3][1] + thinking.eos_token


def test_a_weight_follows_its_turn_when_turns_become_examples(
    tokenizer: Any, with_template: Any
) -> None:
    row = chat_of(*THOUGHTS[:4])
    row.messages[1].weight, row.messages[3].weight = 0.25, -2.0
    examples = Renderer(with_template(tokenizer, THINKING_TEMPLATE)).render(row)
    assert [set(example.weights) - {0.0} for example in examples] == [{0.25}, {-2.0}]


def test_a_template_that_cannot_be_split_exactly_is_an_error_that_names_the_turn(
    tokenizer: Any, with_template: Any
) -> None:
    counting = with_template(tokenizer, COUNTING_TEMPLATE)
    with pytest.raises(DataError, match=r"message 2 \(assistant\)"):
        Renderer(counting).render(chat_of(*CHAT))
    Renderer(counting, train_on="all_tokens").render(chat_of(*CHAT))


def test_what_a_template_refuses_is_an_error_with_its_words(
    tokenizer: Any, with_template: Any
) -> None:
    refusing = with_template(tokenizer, "{{ raise_exception('no system please') }}")
    with pytest.raises(DataError, match="no system please"):
        Renderer(refusing).render(chat_of(*CHAT))


def test_messages_without_a_chat_template_are_a_clear_error(
    tokenizer: Any, with_template: Any
) -> None:
    with pytest.raises(ConfigError, match="no chat template"):
        Renderer(with_template(tokenizer, None)).render(chat_of(*CHAT))


def test_a_template_that_writes_bos_itself_does_not_lead_to_two(
    second: Any, with_template: Any
) -> None:
    doubled = with_template(second, "{{- bos_token }}" + second.chat_template)
    (example,) = Renderer(doubled).render(chat_of(*CHAT))
    assert example.tokens.count(second.bos_token_id) == 1 and example.num_prefix == 1
    assert trained_text(second, example) == "".join(
        t + "</s>" for t in TRAINED["all_assistant_messages"]
    )


def test_no_policy_is_forgotten_here() -> None:
    assert {*TRAINED, "all_tokens", "weights_given"} == set(TrainOnWhat)
    assert isinstance(PromptCompletion("a", "b").prompt, str)
