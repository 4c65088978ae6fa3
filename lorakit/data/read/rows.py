"""What a row of a data set may look like. Each format is a typed record; the types are the
schema that rows are checked by.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any, Literal

import msgspec

from lorakit.data.images import (
    find_image_problem,
    find_stored_problem,
    find_text_problem,
    has_no_name,
    is_image_part,
    parts_of,
)
from lorakit.data.read.tool_calls import find_arguments_problem, find_tools_problem, read_tools
from lorakit.errors import ConfigError

# in the text of a ShareGPT turn, where the row has images: LLaVA's way to say where they go
IMAGE_MARK = "<image>"

Role = Literal["system", "developer", "user", "assistant", "tool"]


class PromptCompletion(msgspec.Struct):
    """``{"prompt": …, "completion": …}``: the completion is trained."""

    prompt: str
    completion: str


class Message(msgspec.Struct, omit_defaults=True, forbid_unknown_fields=True):
    """A message as the OpenAI interface writes it; ``weight`` scales the loss of this message.

    A field that is not listed is an error: it might hold text that its author believes is trained.
    """

    role: Role
    content: str | list[dict[str, Any]] | None = None
    weight: float | None = None
    name: str | None = None
    tool_calls: list[dict[str, Any]] | None = None
    tool_call_id: str | None = None
    reasoning_content: str | None = None
    # What the interface's answers carry beside the text; these hold nothing to train on.
    id: str | int | None = None
    refusal: None = None
    audio: None = None
    function_call: None = None


class Chat(msgspec.Struct):
    """``{"messages": [{"role": …, "content": …}, …]}``, where content is text, or parts that are
    text or images.

    A part ``{"type": "image"}`` that names none stands for the next of ``images``.
    """

    messages: list[Message]
    tools: list[dict[str, Any]] | str | None = None  # a text is JSON, as tables have it
    images: list[Any] | None = None


class Turn(msgspec.Struct):
    """A ShareGPT turn."""

    speaker: str = msgspec.field(name="from")
    value: str
    weight: float | None = None


class Conversations(msgspec.Struct):
    """``{"conversations": [{"from": "human", "value": …}, {"from": "gpt", "value": …}]}``.

    Where the row has ``image`` (one, or a list) or ``images``, ``<image>`` in a text stands for the
    next of them.
    """

    conversations: list[Turn]
    system: str | None = None
    image: Any = None
    images: list[Any] | None = None


class Alpaca(msgspec.Struct):
    """``{"instruction": …, "input": …, "output": …}``."""

    instruction: str
    output: str
    input: str | None = None


class Preference(msgspec.Struct):
    """``{"prompt": …, "chosen": …, "rejected": …}``: texts, or lists of messages; of two answers
    the first is the better one.

    Without ``prompt``, what both begin with is the prompt.
    """

    chosen: str | list[Message]
    rejected: str | list[Message]
    prompt: str | list[Message] | None = None
    tools: list[dict[str, Any]] | str | None = None


class Text(msgspec.Struct):
    """``{"text": …}``: every token is trained."""

    text: str


class Tokens(msgspec.Struct):
    """``{"tokens": […], "weights": […]}``: taken as they are."""

    tokens: list[int]
    weights: list[float]


Row = PromptCompletion | Chat | Conversations | Alpaca | Preference | Text | Tokens
# In the order in which they are recognised: the first whose required columns are all there.
FORMATS: dict[str, type[Row]] = {
    "tokens": Tokens,
    "messages": Chat,
    "conversations": Conversations,
    "preference": Preference,
    "prompt_completion": PromptCompletion,
    "alpaca": Alpaca,
    "text": Text,
}
CHAT_PAIRS = "preference, as messages"  # what is said of rows of preference that are conversations
SPEAKERS: dict[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bard": "assistant",
    "system": "system",
    "tool": "tool",
    "observation": "tool",
}


def are_chats(formats: Iterable[str]) -> bool:
    """Whether rows of these formats are conversations, which a chat template renders."""
    chats, found = {"messages", "conversations", "alpaca", CHAT_PAIRS}, set(formats)
    return bool(found) and found <= chats


def are_pairs(formats: Iterable[str]) -> bool:
    """Whether rows of these formats are pairs of a better and a worse answer. Raises ConfigError
    where only some are.
    """
    found = set(formats)
    others = found - {"preference", CHAT_PAIRS}
    if others and others != found:
        raise ConfigError(
            f"rows of preference and of {', '.join(sorted(others))} cannot be trained together"
        )
    return bool(found - others)


def has_images(row: Row) -> bool:
    """Whether a row has an image."""
    if isinstance(row, Conversations):
        return bool(_images_beside(row))
    return isinstance(row, Chat) and any(map(is_image_part, parts_of(row.messages)))


def to_chat(row: Conversations) -> Chat:
    """Return a ShareGPT row as messages. Raises KeyError for an unknown speaker."""
    images = _images_beside(row)
    messages = [
        Message(
            SPEAKERS[turn.speaker],
            _split_at_images(turn.value) if images else turn.value,
            turn.weight,
        )
        for turn in row.conversations
    ]
    if row.system:
        messages.insert(0, Message("system", row.system))
    return Chat(messages, images=images or None)


def _images_beside(row: Conversations) -> list[Any]:
    """The images of a ShareGPT row, from either column."""
    one = (
        row.image if isinstance(row.image, list) else [] if row.image in (None, "") else [row.image]
    )
    return [*one, *(row.images or ())]


def _split_at_images(text: str) -> str | list[dict[str, Any]]:
    """A turn's text as parts, an image instead of each mark."""
    if IMAGE_MARK not in text:
        return text
    first, *rest = text.split(IMAGE_MARK)
    parts: list[dict[str, Any]] = [{"type": "text", "text": first}]
    for piece in rest:
        parts += [{"type": "image"}, {"type": "text", "text": piece}]
    return [part for part in parts if part.get("text") != ""]


def find_problem(row: Row) -> str | None:
    """Return what is wrong with a row that has the right columns and types, or None."""
    if isinstance(row, PromptCompletion):
        return None if row.completion else "`completion` is empty: no trained token"
    if isinstance(row, Chat):
        return (
            _find_message_problem(row.messages)
            or find_tools_problem(row.tools)
            or _find_image_problem(row)
        )
    if isinstance(row, Conversations):
        unknown = next(
            (turn.speaker for turn in row.conversations if turn.speaker not in SPEAKERS), None
        )
        if unknown is not None:
            return f"unknown speaker {unknown!r} in `conversations` (known: {', '.join(SPEAKERS)})"
        images = _images_beside(row)
        marks = sum(turn.value.count(IMAGE_MARK) for turn in row.conversations)
        if images and len(images) != marks:
            return (
                f"`conversations` have {marks} {IMAGE_MARK}, but the row has {len(images)} images"
            )
        return find_problem(to_chat(row))
    if isinstance(row, Preference):
        return _find_preference_problem(row)
    if isinstance(row, Alpaca):
        return None if row.output else "`output` is empty: no trained token"
    if isinstance(row, Text):
        return None if row.text else "`text` is empty: no trained token"
    assert isinstance(row, Tokens)
    return _find_token_problem(row)


def split_preference(
    row: Preference,
) -> tuple[str | list[Message], str | list[Message], str | list[Message]]:
    """Return (prompt, chosen, rejected) of a row without a problem; of texts the prompt ends
    before white space.
    """
    if row.prompt is not None:
        return row.prompt, row.chosen, row.rejected
    chosen, rejected = row.chosen, row.rejected
    length = next(
        (i for i, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b),
        min(len(chosen), len(rejected)),
    )
    if isinstance(chosen, str):
        length = max(chosen.rfind(" ", 0, length), chosen.rfind("\n", 0, length), 0)
    return chosen[:length], chosen[length:], rejected[length:]


def _find_preference_problem(row: Preference) -> str | None:
    if problem := find_tools_problem(row.tools):
        return problem
    given = [part for part in (row.chosen, row.rejected, row.prompt) if part is not None]
    if len({isinstance(part, str) for part in given}) > 1:
        return "`prompt`, `chosen` and `rejected` must all be texts, or all lists of messages"
    if row.chosen == row.rejected:
        return "`chosen` and `rejected` are the same"
    prompt, *answers = split_preference(row)
    if isinstance(prompt, str) and read_tools(row.tools):
        return (
            "`tools` belong to conversations, and this row has texts: write `chosen` and `rejected`"
            " as messages"
        )
    for name, answer in zip(("chosen", "rejected"), answers, strict=True):
        if isinstance(prompt, str) or isinstance(answer, str):
            if not answer:
                return f"`{name}` is empty"
            continue
        if not any(message.role == "assistant" for message in answer):
            return f"`{name}` has no message of the assistant after the prompt"
        if problem := _find_message_problem([*prompt, *answer]):
            return f"`{name}`: {problem}"
    return None


def _find_token_problem(row: Tokens) -> str | None:
    if len(row.tokens) != len(row.weights):
        return f"{len(row.tokens)} `tokens` but {len(row.weights)} `weights`"
    for weight in row.weights:
        if problem := _find_weight_problem(weight):
            return f"`weights` holds a value that {problem}"
    if min(row.tokens, default=0) < 0:
        return f"`tokens` holds the negative id {min(row.tokens)}"
    if not any(row.weights[1:]):
        return "no trained token: all `weights` after the first are 0"
    return None


def _find_message_problem(messages: list[Message]) -> str | None:
    """Roles must follow one another as a conversation does."""
    previous: str | None = None
    for index, message in enumerate(messages):
        role = message.role
        if problem := _find_order_problem(role, previous, index):
            return f"roles out of order: message {index} ({role}) {problem}"
        if message.content is None and not message.tool_calls:
            return f"message {index} ({role}) has neither `content` nor `tool_calls`"
        for call in message.tool_calls or ():
            if problem := find_arguments_problem(call):
                return f"message {index} ({role}): {problem}"
        if isinstance(message.content, list) and (problem := _find_part_problem(message.content)):
            return f"message {index} ({role}): {problem}"
        if message.weight is not None and (problem := _find_weight_problem(message.weight)):
            return f"message {index} ({role}): `weight` {problem}"
        previous = role
    return None if messages else "no messages: no trained token"


def _find_weight_problem(weight: float) -> str | None:
    if not math.isfinite(weight):
        return "is not finite"
    if weight != 0 and not 1e-30 < abs(weight) < 1e30:
        return "is too large or too small for float32"
    return None


def _find_order_problem(role: str, previous: str | None, index: int) -> str | None:
    if role in ("system", "developer"):
        return "must come first" if index else None
    if role == "assistant" and previous not in ("user", "tool"):
        return f"must follow a user or tool message, not {previous or 'the beginning'}"
    if role == "tool" and previous not in ("assistant", "tool"):
        return f"must follow an assistant message, not {previous or 'the beginning'}"
    if role == "user" and previous == "user":
        return "follows another user message"
    return None


def _find_part_problem(parts: list[dict[str, Any]]) -> str | None:
    for number, part in enumerate(parts):
        if is_image_part(part):
            if problem := find_image_problem(part):
                return f"content part {number} {problem}"
        elif part.get("type", "text") != "text":
            return f"content part {number} has type {part.get('type')!r}; there are text and image"
        elif not isinstance(part.get("text"), str):
            return f"content part {number} has no `text`"
        elif problem := find_text_problem(part):
            return f"content part {number} {problem}"
    return None


def _find_image_problem(row: Chat) -> str | None:
    """Parts that name no image, and the row's ``images``, must be as many."""
    images = row.images or ()
    num_parts = sum(is_image_part(part) and has_no_name(part) for part in parts_of(row.messages))
    if num_parts != len(images):
        return f"{num_parts} image parts name no image, but `images` holds {len(images)}"
    return next(filter(None, map(find_stored_problem, images)), None)
