"""Conversations as the model's own chat template writes them: tools, calls and thoughts in the
form that it wants, nothing lost.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import msgspec

from lorakit.data.images import is_image_part
from lorakit.data.read.rows import Message
from lorakit.data.read.tool_calls import has_calls, is_written_by_python, with_arguments
from lorakit.errors import DataError


class ConversationWriter:
    """Renders conversations, and prefixes of them, by the template of ``tokenizer``."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer

    def write(self, given: Sequence[Message], tools: Any) -> tuple[list[dict], str]:
        """Return the messages, with calls in the form that the template needs, and the whole
        conversation as it writes it.

        Some templates write a call's arguments as JSON themselves, and would quote a text a second
        time; others want a text.
        """
        messages = [self._to_plain(message) for message in given]
        turn = len(messages) - 1
        if not has_calls(messages):
            return messages, self.template(messages, tools, turn=turn)
        as_objects, problem = with_arguments(messages, as_text=False), None
        try:
            text = self.template(as_objects, tools, turn=turn)
            silent = self.template(_without_calls(messages), tools, turn=turn)
            if not is_written_by_python(text, silent, as_objects):
                return as_objects, text
        except DataError as error:
            problem = error
        as_texts = with_arguments(messages, as_text=True)
        try:
            return as_texts, self.template(as_texts, tools, turn=turn)
        except DataError as error:
            raise problem or error from None

    def template(
        self, messages: list[dict], tools: Any, *, turn: int, generation_prompt: bool = False
    ) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages, tools=tools, tokenize=False, add_generation_prompt=generation_prompt
                )
            )
        except Exception as error:  # templates raise whatever jinja or their author likes
            raise DataError(
                f"message {turn}: the chat template refuses the conversation up to here: {error}"
            ) from error

    def header(self, messages: list[dict], tools: Any, index: int) -> str:
        """The rendered text up to where the content of message ``index`` begins."""
        if messages[index]["role"] == "assistant":
            return self.template(messages[:index], tools, turn=index, generation_prompt=True)
        # No generation prompt exists for other roles: what two different contents have in common in
        # front is the header.
        variants = []
        for content in ("A", "B"):
            changed = [*messages[:index], {**messages[index], "content": content}]
            variants.append(self.template(changed, tools, turn=index))
        return _common_prefix(*variants)

    def check_left_out(
        self, text: str, messages: list[dict], tools: Any, weights: list[float]
    ) -> None:
        """Raise DataError where the template writes nothing of the row's tools, of the
        assistant's calls, or of trained thoughts.
        """
        turn = len(messages) - 1
        if tools and self.template(messages, None, turn=turn) == text:
            raise DataError("the row has `tools`, but the model's chat template leaves them out")
        calling = [index for index, message in enumerate(messages) if message.get("tool_calls")]
        if calling and self.template(_without_calls(messages), tools, turn=turn) == text:
            raise DataError(
                f"message {calling[0]} has `tool_calls`, but the model's chat template leaves"
                " them out"
            )
        for index, message in enumerate(messages):
            thought = (message.get("reasoning_content") or message.get("thinking") or "").strip()
            if (
                thought
                and weights[index]
                and thought not in self.template(messages[: index + 1], tools, turn=index)
            ):
                raise DataError(
                    f"message {index} has `reasoning_content`, but the model's chat template leaves"
                    " it out; write it into `content`, in the marks that the model uses, or"
                    " remove it"
                )

    def _to_plain(self, message: Message) -> dict[str, Any]:
        """A message as templates read it; what was thought under the name that this one knows."""
        plain = _to_plain(message)
        template = str(self.tokenizer.chat_template)
        if (
            "reasoning_content" in plain
            and "reasoning_content" not in template
            and "thinking" in template
        ):
            plain["thinking"] = plain.pop("reasoning_content")
        return plain


def _to_plain(message: Message) -> dict[str, Any]:
    plain = {
        key: value
        for key, value in msgspec.to_builtins(message).items()
        if key not in ("weight", "id")
    }
    if isinstance(message.content, list):
        plain["content"] = [
            {"type": "image"} if is_image_part(part) else {"type": "text", "text": part["text"]}
            for part in message.content
        ]
        if not any(is_image_part(part) for part in message.content):  # as every template reads it
            plain["content"] = "".join(part["text"] for part in message.content)
    return plain | ({"content": ""} if "content" not in plain else {})


def _without_calls(messages: list[dict]) -> list[dict]:
    return [
        {key: value for key, value in message.items() if key != "tool_calls"}
        for message in messages
    ]


def _common_prefix(a: str, b: str) -> str:
    length = next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
    return a[:length]
