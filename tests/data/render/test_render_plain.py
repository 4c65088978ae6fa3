"""Rows without turns: what is trained of them, where EOS goes, and that there is one BOS. All on
two tokenizers.
"""

from __future__ import annotations

from typing import Any

import pytest
from data_toys import text_of, trained_text

from lorakit.data.read.rows import Alpaca, PromptCompletion, Text, Tokens
from lorakit.data.render.renderer import Renderer, TrainOnWhat
from lorakit.errors import ConfigError, DataError

PROMPT, COMPLETION = "English: banana split\nPig Latin:", " anana-bay it-splay\n\n"


def test_the_prompt_weighs_0_and_the_completion_1(tokenizer: Any) -> None:
    (example,) = Renderer(tokenizer).render(PromptCompletion(PROMPT, COMPLETION))
    prompt_ids = tokenizer(PROMPT)["input_ids"]  # with special tokens, as sampling encodes it
    rest = len(example.tokens) - len(prompt_ids)
    assert example.tokens[: len(prompt_ids)] == prompt_ids
    assert example.weights == [0.0] * len(prompt_ids) + [1.0] * rest
    assert text_of(tokenizer, example.tokens[len(prompt_ids) :]) == COMPLETION + tokenizer.eos_token


@pytest.mark.parametrize("completion", ["yes", " yes", "\nyes", "  yes ", "é", "\n"])
def test_a_completion_is_spelt_as_written_without_a_dummy_space(
    tokenizer: Any, completion: str
) -> None:
    (example,) = Renderer(tokenizer, append_eos=False).render(
        PromptCompletion("answer:", completion)
    )
    assert trained_text(tokenizer, example) == completion
    assert text_of(tokenizer, example.tokens).endswith("answer:" + completion)


EOS = "<EOS>"  # stands for each tokenizer's own


@pytest.mark.parametrize(
    ("append_eos", "stop", "completion", "expected"),
    [
        ("auto", None, "x", "x<EOS>"),
        ("auto", "\n\n", "x\n\n", "x\n\n"),
        ("auto", "\n\n", "x\n", "x\n<EOS>"),
        ("auto", "\n\n", "\n\nx", "\n\nx<EOS>"),
        ("auto", ["###", "."], "x.", "x."),
        ("auto", [], "x.", "x.<EOS>"),
        ("auto", None, "x<EOS>", "x<EOS>"),
        (True, "\n\n", "x\n\n", "x\n\n<EOS>"),
        (True, None, "x<EOS>", "x<EOS>"),
        (False, None, "x", "x"),
        (False, None, "x<EOS>", "x<EOS>"),
    ],
)
def test_eos_is_appended_once_and_trained_unless_a_stop_string_ends_the_row(
    tokenizer: Any, append_eos: Any, stop: Any, completion: str, expected: str
) -> None:
    renderer = Renderer(tokenizer, append_eos=append_eos, stop=stop)
    row = PromptCompletion("answer:", completion.replace(EOS, tokenizer.eos_token))
    (example,) = renderer.render(row)
    assert trained_text(tokenizer, example) == expected.replace(EOS, tokenizer.eos_token)
    assert example.weights[-1] == 1.0


def test_eos_is_trained_even_where_it_is_the_pad_token_too(
    tokenizer: Any, with_template: Any
) -> None:
    same = with_template(tokenizer, None)
    same.pad_token = same.eos_token
    (example,) = Renderer(same).render(PromptCompletion("a", "b"))
    assert (example.tokens[-1], example.weights[-1]) == (same.eos_token_id, 1.0)


def test_masking_goes_by_position_so_an_eos_inside_the_prompt_is_not_trained(
    tokenizer: Any,
) -> None:
    eos = tokenizer.eos_token
    (example,) = Renderer(tokenizer).render(
        PromptCompletion(f"hello{eos}hello", f" hello{eos}hello")
    )
    assert trained_text(tokenizer, example) == f" hello{eos}hello{eos}"
    assert example.tokens.count(tokenizer.eos_token_id) == 3


@pytest.mark.parametrize(
    "row",
    [
        PromptCompletion("<s> hello", "yes"),
        PromptCompletion("hello", "yes"),
        Text("<s>hello"),
        Text("hello"),
        PromptCompletion("", "<s>hello"),
        PromptCompletion("", "hello"),
    ],
)
def test_there_is_one_bos_and_it_is_never_trained(second: Any, row: Any) -> None:
    for policy in (TrainOnWhat.ALL_ASSISTANT_MESSAGES, TrainOnWhat.ALL_TOKENS):
        (example,) = Renderer(second, train_on=policy).render(row)
        assert example.tokens.count(second.bos_token_id) == 1
        assert (example.tokens[0], example.weights[0], example.num_prefix) == (
            second.bos_token_id,
            0.0,
            1,
        )


def test_every_token_of_a_text_row_is_trained(tokenizer: Any) -> None:
    (example,) = Renderer(tokenizer).render(Text("hello world"))
    bare = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    bos = [tokenizer.bos_token_id] if tokenizer.bos_token else []
    assert example.tokens == [*bos, *bare, tokenizer.eos_token_id]
    assert example.weights == [0.0] * len(bos) + [1.0] * (len(bare) + 1)


@pytest.mark.parametrize("policy", [TrainOnWhat.ALL_TOKENS, TrainOnWhat.ALL_MESSAGES])
def test_prompts_are_trained_too_where_all_is_wanted(tokenizer: Any, policy: TrainOnWhat) -> None:
    (example,) = Renderer(tokenizer, train_on=policy).render(PromptCompletion("hello", " world"))
    assert trained_text(tokenizer, example).lstrip() == f"hello world{tokenizer.eos_token}"


def test_tokens_and_weights_are_never_changed(tokenizer: Any) -> None:
    tokens, weights = [7, 7, tokenizer.eos_token_id, 9], [0.5, -1.0, 0.0, 2.25]
    for append_eos in (True, "auto"):
        (example,) = Renderer(tokenizer, append_eos=append_eos).render(Tokens(tokens, weights))
        assert (example.tokens, example.weights) == (tokens, weights)


def test_a_token_outside_the_vocabulary_is_refused(tokenizer: Any) -> None:
    size = len(tokenizer)
    Renderer(tokenizer).render(Tokens([0, size - 1], [0, 1]))
    with pytest.raises(DataError, match=str(size)):
        Renderer(tokenizer).render(Tokens([0, size], [0, 1]))


def test_alpaca_without_a_chat_template_uses_stanfords_prompt(
    tokenizer: Any, with_template: Any
) -> None:
    bare = with_template(tokenizer, None)
    for row in (Alpaca("Add.", "4", "2 {2}"), Alpaca("Add.", "4"), Alpaca("Add.", "4", "")):
        (example,) = Renderer(bare).render(row)
        text = text_of(bare, example.tokens)
        assert "### Instruction:\nAdd.\n\n### " in text and text.count("### Response:") == 1
        assert ("### Input:\n2 {2}\n\n" in text) == ("### Input" in text) == bool(row.input)
        assert trained_text(bare, example) == "4" + bare.eos_token


def test_a_row_of_which_only_the_first_token_could_be_trained_is_refused(tiny: Any) -> None:
    with pytest.raises(DataError, match="no trained token"):
        Renderer(tiny, append_eos=False).render(Text("a"))


def test_append_eos_without_an_eos_token_is_refused(tiny: Any, with_template: Any) -> None:
    without = with_template(tiny, None)
    without.eos_token = None
    with pytest.raises(ConfigError, match="no EOS"):
        Renderer(without, append_eos=True)
    (example,) = Renderer(without).render(PromptCompletion("a", "bc"))
    assert trained_text(without, example) == "bc"
    with pytest.raises(ConfigError, match="append_eos"):
        Renderer(tiny, append_eos="never")
