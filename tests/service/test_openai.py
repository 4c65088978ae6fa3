"""The real `openai` client against the server: completions, chats, streams, log-probabilities,
errors.
"""

from __future__ import annotations

from typing import Any

import httpx
import numpy as np
import openai
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import make_data, train
from serving import Server

from lorakit.model.load import load_tokenizer
from lorakit.sampling.text_stream import TextStream


@pytest.fixture
def client(server: Server) -> Any:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=server.key, max_retries=0) as made:
        yield made


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny", "Qwen/Qwen3-8B"]
    assert client.models.retrieve("Qwen/Qwen3-8B").id == "Qwen/Qwen3-8B"


def test_completions_of_text_and_tokens(client: openai.OpenAI) -> None:
    tokenizer = load_tokenizer("tiny")
    whole = client.completions.create(
        model="tiny", prompt="copy: abc\n", max_tokens=8, temperature=0
    )
    (choice,) = whole.choices
    assert choice.text and choice.finish_reason in ("stop", "length") and whole.usage is not None
    assert whole.usage.prompt_tokens == len(tokenizer.encode("copy: abc\n"))
    tokens: Any = [tokenizer.encode("copy: abc\n"), tokenizer.encode("upper: x\n")]
    several = client.completions.create(
        model="tiny", prompt=tokens, max_tokens=8, temperature=0, n=2
    )
    assert [one.index for one in several.choices] == [0, 1, 2, 3]
    assert several.choices[0].text == several.choices[1].text == choice.text
    stopped = client.completions.create(
        model="tiny", prompt="copy: abc\n", max_tokens=8, temperature=0, stop=choice.text[:1]
    )
    assert stopped.choices[0].text == "" and stopped.choices[0].finish_reason == "stop"
    first, second = (
        client.completions.create(
            model="tiny", prompt="a", max_tokens=8, temperature=2.0, seed=seed
        )
        .choices[0]
        .text
        for seed in (1, 2)
    )
    again = client.completions.create(
        model="tiny", prompt="a", max_tokens=8, temperature=2.0, seed=1
    )
    assert again.choices[0].text == first != second


def test_logprobs_of_completions(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="tiny", prompt="copy: abc\n", max_tokens=4, temperature=0, logprobs=3, echo=True
    )
    choice = answer.choices[0]
    logprobs: Any = choice.logprobs
    prompt = load_tokenizer("tiny").encode("copy: abc\n")
    assert (
        choice.text.startswith("copy: abc\n")
        and len(logprobs.tokens) == len(prompt) + answer.usage.completion_tokens
    )  # type: ignore[union-attr]
    assert logprobs.token_logprobs[0] is None and all(
        value <= 0 for value in logprobs.token_logprobs[1:]
    )
    for token, value, best in zip(
        logprobs.tokens, logprobs.token_logprobs, logprobs.top_logprobs, strict=True
    ):
        if best is not None:
            assert len(best) == 3 and np.isclose(best[token], value, atol=1e-5)


def test_a_prompt_alone_is_scored(client: openai.OpenAI) -> None:
    asked: Any = {"model": "tiny", "prompt": "copy: abc\n", "max_tokens": 0, "n": 2}
    scored: Any = client.completions.create(**asked, echo=True, logprobs=1).choices
    longer: Any = (
        client.completions.create(**{**asked, "max_tokens": 1}, echo=True, logprobs=1)
        .choices[0]
        .logprobs
    )
    num_tokens = len(load_tokenizer("tiny").encode("copy: abc\n"))
    assert [choice.text for choice in scored] == ["copy: abc\n"] * 2 and scored[
        0
    ].finish_reason == "length"
    assert scored[0].logprobs.token_logprobs == longer.token_logprobs[:num_tokens]
    events = list(client.completions.create(**asked, stream=True))
    assert [event.choices[0].finish_reason for event in events] == ["length", "length"]


def test_chats_and_their_logprobs(client: openai.OpenAI) -> None:
    messages: Any = [{"role": "user", "content": "hello"}]
    answer = client.chat.completions.create(
        model="tiny",
        messages=messages,
        max_completion_tokens=6,
        temperature=0,
        logprobs=True,
        top_logprobs=2,
    )
    content: Any = answer.choices[0].logprobs.content  # type: ignore[union-attr]
    assert (
        answer.choices[0].message.role == "assistant"
        and len(content) == answer.usage.completion_tokens
    )  # type: ignore[union-attr]
    assert all(
        len(one.top_logprobs) == 2 and one.top_logprobs[0].logprob >= one.logprob - 1e-6
        for one in content
    )


@pytest.mark.parametrize("stop", [None, "b", ["zz", "c\n"]])
def test_streams_say_what_the_whole_answer_says(client: openai.OpenAI, stop: Any) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "max_tokens": 24,
        "temperature": 1.3,
        "seed": 4,
        "n": 2,
        "stop": stop,
    }
    whole = client.completions.create(prompt="copy: abc\n", **asked)
    texts, reasons, usage = ["", ""], ["", ""], None
    for event in client.completions.create(
        prompt="copy: abc\n", stream=True, stream_options={"include_usage": True}, **asked
    ):
        usage = event.usage or usage
        for choice in event.choices:
            texts[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason or reasons[choice.index]
    assert texts == [choice.text for choice in whole.choices]
    assert reasons == [choice.finish_reason for choice in whole.choices] and usage == whole.usage
    messages: Any = [{"role": "user", "content": "hello"}]
    chat = client.chat.completions.create(messages=messages, **asked)
    said = ["", ""]
    for part in client.chat.completions.create(messages=messages, stream=True, **asked):
        said[part.choices[0].index] += part.choices[0].delta.content or ""
    assert said == [choice.message.content for choice in chat.choices]


def test_streams_say_logprobs_as_the_whole_answer_does(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 12, "temperature": 0.0}
    plain: Any = {"prompt": "copy: abc\n", "logprobs": 2, **asked}
    whole: Any = client.completions.create(**plain).choices[0].logprobs
    parts: Any = [
        e.choices[0].logprobs
        for e in client.completions.create(**plain, stream=True)
        if e.choices[0].logprobs
    ]
    for name in ("tokens", "text_offset"):
        assert [value for part in parts for value in getattr(part, name)] == getattr(whole, name), (
            name
        )
    # Another pass, perhaps of other rows: equal up to a float32's rounding.
    assert [value for part in parts for value in part.token_logprobs] == pytest.approx(
        whole.token_logprobs, abs=1e-5
    )
    for streamed, best in zip(
        [best for part in parts for best in part.top_logprobs], whole.top_logprobs, strict=True
    ):
        assert streamed == pytest.approx(best, abs=1e-5)
    talk: Any = {
        "messages": [{"role": "user", "content": "hello"}],
        "logprobs": True,
        "top_logprobs": 2,
        **asked,
    }
    content: Any = client.chat.completions.create(**talk).choices[0].logprobs
    pieces: Any = [
        e.choices[0].logprobs
        for e in client.chat.completions.create(**talk, stream=True)
        if e.choices[0].logprobs
    ]
    said = [one for piece in pieces for one in piece.content]
    assert [one.token for one in said] == [one.token for one in content.content]
    assert [one.logprob for one in said] == pytest.approx(
        [one.logprob for one in content.content], abs=1e-5
    )
    assert all(len(one.top_logprobs) == 2 for one in said)
    with pytest.raises(openai.BadRequestError, match="echo of a stream"):
        client.completions.create(model="tiny", prompt="a", echo=True, stream=True)


def test_messages_of_parts_are_read_and_strange_ones_refused(client: openai.OpenAI) -> None:
    def ask(content: Any, **more: Any) -> str:
        message: Any = {"role": "user", **({} if content is None else {"content": content}), **more}
        answer = client.chat.completions.create(
            model="tiny", messages=[message], temperature=0, max_tokens=4
        )
        return str(answer.choices[0].message.content)

    parts = [{"type": "text", "text": "hel"}, {"type": "text", "text": "lo"}]
    assert ask(parts) == ask("hello")
    for strange in (None, [{"type": "input_audio", "input_audio": {}}], 5):
        with pytest.raises(openai.BadRequestError, match="messages"):
            ask(strange)


def test_an_adapter_is_named_by_its_path(client: openai.OpenAI, sdk: Any) -> None:
    with sdk.ServiceClient() as service:
        training = service.create_lora_training_client("tiny", rank=8, seed=1).result()
        train(training, sdk.types, make_data(sdk.types, training.get_tokenizer()), 40)
        path = training.save_weights_for_sampler("ducks").result().path
    prompt = "English: rubber duck\nPig Latin:"
    adapted = client.completions.create(
        model=path, prompt=prompt, max_tokens=20, temperature=0, stop="\n"
    )
    assert adapted.choices[0].text == " ubber-ray uck-day"
    plain = client.completions.create(
        model="tiny", prompt=prompt, max_tokens=20, temperature=0, stop="\n"
    )
    assert plain.choices[0].text != adapted.choices[0].text


def test_errors_have_openais_shape(client: openai.OpenAI, server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match="there is no model"):
        client.completions.create(model="gpt-5", prompt="a")
    with pytest.raises(openai.BadRequestError, match="no run x"):
        client.completions.create(model="tinker://x/weights/y", prompt="a")
    with pytest.raises(openai.BadRequestError, match="not offered here: presence_penalty"):
        client.completions.create(model="tiny", prompt="a", presence_penalty=0.5)
    with pytest.raises(openai.BadRequestError, match="temperature"):
        client.completions.create(model="tiny", prompt="a", temperature=-1.0)
    with pytest.raises(openai.BadRequestError, match="prompt is empty"):
        client.completions.create(model="tiny", prompt=[[]])  # type: ignore[list-item]
    with pytest.raises(openai.BadRequestError):
        client.chat.completions.create(model="tiny", messages="hello")  # type: ignore[arg-type]
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="tml-wrong", max_retries=0) as other,
        pytest.raises(openai.AuthenticationError),
    ):
        other.models.list()


def test_whoever_goes_away_ends_the_generation(server: Server) -> None:
    body = {
        "model": "tiny",
        "prompt": "a",
        "max_tokens": 900,
        "temperature": 2.0,
        "stream": True,
        "stop": [],
    }
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        with http.stream("POST", "/v1/completions", json=body) as answer:
            next(answer.iter_lines())
        short = http.post("/v1/completions", json={"model": "tiny", "prompt": "a", "max_tokens": 2})
        assert short.status_code == 200


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=30), st.lists(st.text(min_size=1, max_size=3), max_size=2))
def test_pieces_of_text_are_the_text(text: str, stop: list[str]) -> None:
    tokenizer = load_tokenizer("tiny")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    stream = TextStream(tokenizer, tuple(stop))
    pieces = [stream.add(tokens[: n + 1]) for n in range(len(tokens))]
    whole = tokenizer.decode(tokens)
    assert whole == "".join(pieces) + stream._held or whole.endswith("\ufffd")
    assert not any(piece.endswith("\ufffd") for piece in pieces) or "\ufffd" in text
