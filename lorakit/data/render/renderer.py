"""Rows to tokens and per-token weights: the one place that decides what is trained.

Chat spans come from rendering the conversation prefix by prefix with the model's own template,
never from a search for marker strings. What is trained of an assistant message is what the model
must write itself: everything from the generation prompt's end to the end-of-turn token, which is
included.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import msgspec

from lorakit.data.read.rows import (
    Alpaca,
    Chat,
    Conversations,
    Message,
    Preference,
    PromptCompletion,
    Row,
    Text,
    Tokens,
    split_preference,
    to_chat,
)
from lorakit.data.read.tool_calls import read_tools
from lorakit.data.render.conversation import ConversationWriter
from lorakit.data.render.templates import OFFER
from lorakit.data.render.tokenizer import Encoder
from lorakit.errors import ConfigError, DataError
from lorakit.types import ImageChunk

# After Stanford Alpaca's prompts (github.com/tatsu-lab/stanford_alpaca, README), for models without
# a chat template.
ALPACA_WITH_INPUT = (
    "Below is an instruction that describes a task, paired with an input that provides further"
    " context. Write a response that appropriately completes the request.\n\n###"
    " Instruction:\n{instruction}\n\n### Input:\n{input}\n\n### Response:\n"
)
ALPACA_WITHOUT_INPUT = (
    "Below is an instruction that describes a task. Write a response that appropriately completes"
    " the request.\n\n### Instruction:\n{instruction}\n\n### Response:\n"
)


class TrainOnWhat(StrEnum):
    """Which tokens of a row have a weight other than 0.

    A message's own ``weight`` scales what is chosen here; under WEIGHTS_GIVEN only messages that
    carry one are trained.
    """

    LAST_ASSISTANT_MESSAGE = "last_assistant_message"
    ALL_ASSISTANT_MESSAGES = "all_assistant_messages"
    ALL_MESSAGES = "all_messages"
    ALL_TOKENS = "all_tokens"
    WEIGHTS_GIVEN = "weights_given"


@dataclass(frozen=True)
class PlacedImage:
    """An image among the tokens: ``chunk.length`` placeholders from ``start``; from ``first`` to
    before ``end`` with its brackets.
    """

    chunk: ImageChunk
    start: int
    first: int
    end: int

    def moved(self, by: int) -> PlacedImage:
        return PlacedImage(self.chunk, self.start + by, self.first + by, self.end + by)


@dataclass(frozen=True)
class Rendered:
    """Tokens and their weights, not yet shifted."""

    tokens: list[int]
    weights: list[float]
    num_prefix: int = 0  # leading special tokens, which truncation keeps
    images: tuple[PlacedImage, ...] = ()


@dataclass(frozen=True)
class _Span:
    start: int  # characters of the rendered text
    end: int
    weight: float


class Renderer:
    """Turns rows into ``Rendered`` examples, by one tokenizer and one policy.

    Args:
        append_eos: ``auto`` ends plain rows with EOS unless they already end with one of ``stop``;
            True or False force it.
        stop: strings at which sampling will stop.
        image_token_id: what the chat template writes once for each image; None where the model
            takes none.
    """

    def __init__(
        self,
        tokenizer: Any,
        *,
        image_token_id: int | None = None,
        train_on: TrainOnWhat | str = TrainOnWhat.ALL_ASSISTANT_MESSAGES,
        append_eos: bool | str = "auto",
        stop: str | Sequence[str] | None = None,
    ) -> None:
        self.encoder, self.conversation = Encoder(tokenizer), ConversationWriter(tokenizer)
        self.tokenizer = tokenizer
        self.train_on = TrainOnWhat(train_on)
        self.append_eos = append_eos
        self.stop = tuple(
            text for text in ((stop,) if isinstance(stop, str) else stop or ()) if text
        )
        self.vocab_size = len(tokenizer)
        self.image_token_id = image_token_id
        self._image_token = (
            "" if image_token_id is None else str(tokenizer.convert_ids_to_tokens(image_token_id))
        )
        if append_eos not in (True, False, "auto"):
            raise ConfigError(
                f"data.append_eos={append_eos} is unknown; choose auto, true or false"
            )
        if append_eos is True and tokenizer.eos_token_id is None:
            raise ConfigError(
                "data.append_eos=true, but the tokenizer has no EOS token; set it, or use data.stop"
            )

    def render(self, row: Row, images: Sequence[ImageChunk] = ()) -> list[Rendered]:
        """Return the examples of ``row``: one, or one per assistant turn where the template
        rewrites earlier turns.

        Args:
            images: of the row, in order, each with the number of its tokens.

        Raises:
            DataError: no token is trained, or the template cannot render the row; the message names
                the turn.
        """
        if isinstance(row, Conversations):
            row = to_chat(row)
        if isinstance(row, Alpaca):
            row = self._from_alpaca(row)
        if isinstance(row, Preference):
            return self._render_pair(row)
        if isinstance(row, Tokens):
            examples = [self._render_tokens(row)]
        elif isinstance(row, Chat):
            examples = [self._with_images(example, images) for example in self._render_chat(row)]
        elif isinstance(row, Text):
            examples = [self._render_plain("", row.text, trains_all=True)]
        else:
            assert isinstance(row, PromptCompletion)
            examples = [self._render_plain(row.prompt, row.completion)]
        for example in examples:
            if self.image_token_id is not None and example.tokens.count(self.image_token_id) != sum(
                image.chunk.length for image in example.images
            ):
                raise DataError(f"the text has {self._image_token}, which stands for an image")
            # the first token has nothing before it to be predicted from
            if not any(example.weights[1:]):
                raise DataError(f"no trained token under data.train_on={self.train_on}")
        return examples

    def _render_pair(self, row: Preference) -> list[Rendered]:
        """Return the better answer and the worse one, each after the prompt; the answers alone
        have a weight.
        """
        prompt, *answers = split_preference(row)
        found = []
        for name, answer in zip(("chosen", "rejected"), answers, strict=True):
            whole: PromptCompletion | Chat
            if isinstance(prompt, str):
                whole = PromptCompletion(prompt, str(answer))
            else:
                silent = [msgspec.structs.replace(message, weight=0.0) for message in prompt]
                whole = Chat(
                    [*silent, *(message for message in answer if not isinstance(message, str))],
                    row.tools,
                )
            examples = self.render(whole)
            if len(examples) > 1:
                raise DataError(
                    f"`{name}` has several turns of the assistant, of which the chat template"
                    " rewrites earlier ones"
                )
            found += examples
        return found

    def _from_alpaca(self, row: Alpaca) -> Chat | PromptCompletion:
        if self.tokenizer.chat_template:
            question = f"{row.instruction}\n{row.input}" if row.input else row.instruction
            return Chat([Message("user", question), Message("assistant", row.output)])
        template = ALPACA_WITH_INPUT if row.input else ALPACA_WITHOUT_INPUT
        return PromptCompletion(
            template.format(instruction=row.instruction, input=row.input), row.output
        )

    def _render_tokens(self, row: Tokens) -> Rendered:
        if max(row.tokens) >= self.vocab_size:
            raise DataError(
                f"`tokens` holds the id {max(row.tokens)}, but the tokenizer has {self.vocab_size}"
                " tokens"
            )
        return Rendered(row.tokens, row.weights)

    def _render_plain(self, prompt: str, completion: str, *, trains_all: bool = False) -> Rendered:
        if self.train_on is TrainOnWhat.WEIGHTS_GIVEN:
            raise DataError("data.train_on=weights_given, but rows of this format carry no weights")
        trains_all = trains_all or self.train_on in (
            TrainOnWhat.ALL_TOKENS,
            TrainOnWhat.ALL_MESSAGES,
        )
        prefix = len(self.encoder.prefix)
        if prompt:
            prompt_ids = self.encoder.encode_prompt(prompt)
            completion_ids = self.encoder.encode_continuation(completion)
        else:
            ids = self.encoder.encode_prompt(completion)
            prompt_ids, completion_ids = ids[:prefix], ids[prefix:]
        eos = self.encoder.eos_token_id
        if eos is not None and self._wants_eos(completion, completion_ids):
            completion_ids = [*completion_ids, eos]
        tokens, num_silent = prompt_ids + completion_ids, prefix if trains_all else len(prompt_ids)
        weights = [0.0] * num_silent + [1.0] * (len(tokens) - num_silent)
        return Rendered(tokens, weights, prefix)

    def _wants_eos(self, text: str, ids: list[int]) -> bool:
        eos = self.encoder.eos_token_id
        if self.append_eos is False or eos is None:
            return False
        if ids and ids[-1] == eos:
            return False
        return self.append_eos is True or not (self.stop and text.endswith(self.stop))

    # ---- chat

    def _render_chat(self, row: Chat) -> list[Rendered]:
        if not self.tokenizer.chat_template:
            raise ConfigError(
                f"the tokenizer has no chat template, so `messages` cannot be rendered; {OFFER}; or"
                " use prompt/completion rows, or a model with a chat template (the -Instruct"
                " variant of most families)"
            )
        tools, weights = read_tools(row.tools), self._message_weights(row.messages)
        messages, text = self.conversation.write(row.messages, tools)
        self.conversation.check_left_out(text, messages, tools, weights)
        self._check_placeholders(text, messages)
        if self.train_on is TrainOnWhat.ALL_TOKENS:
            return [self._encode_spans(text, [_Span(0, len(text), 1.0)])]
        trained = [index for index, weight in enumerate(weights) if weight]
        spans = [self._find_span(text, messages, tools, index, weights[index]) for index in trained]
        if all(spans):
            return [self._encode_spans(text, [span for span in spans if span])]
        return [self._render_turn(messages, tools, index, weights[index]) for index in trained]

    def _check_placeholders(self, text: str, messages: list[dict]) -> None:
        """Raise DataError where the rendered text has not one placeholder for each image."""
        num_images, with_token = 0, None
        for number, message in enumerate(messages):
            said = message["content"]
            parts = [{"type": "text", "text": said}] if isinstance(said, str) else said
            num_images += sum(part["type"] == "image" for part in parts)
            if with_token is None and any(
                self._image_token in part.get("text", ()) for part in parts
            ):
                with_token = number
        written = text.count(self._image_token) if self._image_token else 0
        if written == num_images:
            return
        if with_token is not None:
            raise DataError(
                f"message {with_token} has the text {self._image_token}, which stands for an image;"
                " write a part of type image"
            )
        raise DataError(
            f"the row has {num_images} images, but the model's chat template writes {written}"
            " placeholders"
        )

    def _with_images(self, example: Rendered, images: Sequence[ImageChunk]) -> Rendered:
        """Widen each placeholder to the number of its image's tokens. They and their brackets
        weigh 0: no model writes them.
        """
        if not images:
            return example
        tokens: list[int] = []
        weights: list[float] = []
        found: list[PlacedImage] = []
        special, rest = self.encoder.special_ids, iter(images)
        for place, (token, weight) in enumerate(zip(example.tokens, example.weights, strict=True)):
            if token != self.image_token_id:
                tokens.append(token)
                weights.append(weight)
                continue
            chunk, start = next(rest), len(tokens)  # of a turn by itself the images before its end
            opens = place > 0 and example.tokens[place - 1] in special
            closes = place + 1 < len(example.tokens) and example.tokens[place + 1] in special
            tokens += [token] * chunk.length
            weights += [0.0] * chunk.length
            found.append(PlacedImage(chunk, start, start - opens, len(tokens) + closes))
        for image in found:
            weights[image.first : image.end] = [0.0] * (image.end - image.first)
        return Rendered(tokens, weights, example.num_prefix, tuple(found))

    def _message_weights(self, messages: list[Message]) -> list[float]:
        last = max(
            (i for i, message in enumerate(messages) if message.role == "assistant"), default=-1
        )
        weights = []
        for index, message in enumerate(messages):
            is_chosen = {
                TrainOnWhat.LAST_ASSISTANT_MESSAGE: index == last,
                TrainOnWhat.ALL_ASSISTANT_MESSAGES: message.role == "assistant",
                TrainOnWhat.ALL_MESSAGES: True,
                TrainOnWhat.ALL_TOKENS: True,
                TrainOnWhat.WEIGHTS_GIVEN: message.weight is not None,
            }[self.train_on]
            weight = 1.0 if message.weight is None else message.weight
            weights.append(weight if is_chosen else 0.0)
        return weights

    def _find_span(
        self, text: str, messages: list[dict], tools: Any, index: int, weight: float
    ) -> _Span | None:
        """Where message ``index`` is in ``text``, or None where a rendered prefix is not a
        prefix of the whole.
        """
        before = self.conversation.header(messages, tools, index)
        after = self.conversation.template(messages[: index + 1], tools, turn=index)
        if text.startswith(after) and after.startswith(before):
            return _Span(len(before), len(after), weight)
        return None

    def _render_turn(self, messages: list[dict], tools: Any, index: int, weight: float) -> Rendered:
        """Message ``index`` as an example of its own: the conversation as the model saw it when
        it had to answer.
        """
        before = self.conversation.header(messages, tools, index)
        after = self.conversation.template(messages[: index + 1], tools, turn=index)
        if not after.startswith(before):
            raise DataError(
                f"message {index} ({messages[index]['role']}): the chat template writes the"
                " conversation before this turn differently once the turn is there, so which"
                " tokens to train cannot be determined"
            )
        return self._encode_spans(after, [_Span(len(before), len(after), weight)])

    def _encode_spans(self, text: str, spans: list[_Span]) -> Rendered:
        """Encode ``text`` piece by piece, so that a piece's tokens are those that sampling sees
        and makes.
        """
        tokens: list[int] = []
        weights: list[float] = []
        position = 0
        for span in spans:
            before = text[position : span.start]
            tokens += self._encode_piece(before, is_start=position == 0)
            weights += [0.0] * (len(tokens) - len(weights))
            tokens += self._encode_piece(text[span.start : span.end], is_start=span.start == 0)
            weights += [span.weight] * (len(tokens) - len(weights))
            if self.train_on is not TrainOnWhat.ALL_TOKENS:
                self._untrain_tail(tokens, weights)
            position = span.end
        tokens += self.encoder.encode_continuation(text[position:])
        weights += [0.0] * (len(tokens) - len(weights))
        bos = self.tokenizer.bos_token_id
        if bos is not None and tokens[:2] == [bos, bos]:
            tokens, weights = tokens[1:], weights[1:]
        return Rendered(tokens, weights, num_prefix=int(bos is not None and tokens[:1] == [bos]))

    def _encode_piece(self, text: str, *, is_start: bool) -> list[int]:
        if is_start:
            return self.encoder.encode_rendered(text)
        return self.encoder.encode_continuation(text)

    def _untrain_tail(self, tokens: list[int], weights: list[float]) -> None:
        """White space after the end-of-turn token is not trained: generation stops before it."""
        for end in range(len(tokens), 0, -1):
            if tokens[end - 1] in self.encoder.special_ids:
                weights[end:] = [0.0] * (len(weights) - end)
                return
            if self.encoder.decode([tokens[end - 1]]).strip():
                return
