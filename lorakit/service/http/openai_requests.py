"""What OpenAI's clients ask: bodies of requests, and conversations as what a model reads."""

from __future__ import annotations

from typing import Any

from pydantic import BaseModel, Field

from lorakit.data.images import ImageEncoder, locate
from lorakit.data.render.tokenizer import Encoder
from lorakit.errors import DataError
from lorakit.types import ImageChunk, ModelInput, SamplingParams

_IGNORED = {"user", "store", "metadata", "service_tier", "stream_options"}


class Asked(BaseModel, extra="allow"):
    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    n: int = Field(default=1, ge=1, le=1024)
    seed: int | None = None
    stop: str | list[str] | None = None
    stream: bool = False
    stream_options: dict[str, Any] | None = None

    def check(self) -> None:
        """Raise DataError for what would be ignored."""
        unknown = [
            name
            for name, value in (self.model_extra or {}).items()
            if value and name not in _IGNORED and (name, value) != ("best_of", self.n)
        ]
        if unknown:
            raise DataError(f"not offered here: {', '.join(sorted(unknown))}")

    def params(self, max_tokens: int | None) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            seed=self.seed,
            stop=self.stop,
        )


class Completion(Asked):
    prompt: str | list[str] | list[int] | list[list[int]] = ""
    logprobs: int | None = Field(default=None, ge=0)
    echo: bool = False


class ChatCompletion(Asked):
    messages: list[dict[str, Any]]
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool = False
    top_logprobs: int = Field(default=0, ge=0)


def read_messages(
    messages: list[dict[str, Any]], encoder: Encoder, images: ImageEncoder | None
) -> ModelInput:
    """A conversation up to where the assistant answers, by the chat template, with the images that
    it names in data: URLs.

    Raises:
        DataError: a part is neither text nor such an image; a template might print it.
    """
    plain: list[dict[str, Any]] = []
    shown: list[ImageChunk] = []
    for number, message in enumerate(messages):
        content = message.get("content")
        if isinstance(content, list):
            parts = [
                _read_part(f"messages[{number}].content[{place}]", part, images)
                for place, part in enumerate(content)
            ]
            shown += [part for part in parts if isinstance(part, ImageChunk)]
            content = [
                {"type": "image"}
                if isinstance(part, ImageChunk)
                else {"type": "text", "text": part}
                for part in parts
            ]
            if all(isinstance(part, str) for part in parts):  # as every template reads it
                content = "".join(part["text"] for part in content)
        if not isinstance(content, (str, list)) or not isinstance(message.get("role"), str):
            raise DataError(f"messages[{number}] needs a role, and content that is text")
        plain.append({**message, "content": content})
    tokens = encoder.encode_chat(plain)
    return images.place(tokens, shown) if images is not None else ModelInput.from_ints(tokens)


def _read_part(name: str, part: Any, images: ImageEncoder | None) -> str | ImageChunk:
    url = part.get("image_url") if isinstance(part, dict) else None
    if isinstance(part, dict) and isinstance(part.get("text"), str):
        if url is not None:
            raise DataError(f"{name} has text and an image_url; send two parts")
        return str(part["text"])
    url = url.get("url") if isinstance(url, dict) else url
    # a path would be one of this machine
    if not isinstance(url, str) or not url.startswith("data:"):
        raise DataError(f"{name} is neither text nor an image_url that begins with data:")
    if images is None:
        raise DataError(f"{name} is an image, and this model takes none")
    chunk = ImageChunk(locate(url, None).read(), name=name)
    return ImageChunk(chunk.data, expected_tokens=images.count_tokens(chunk), name=name)
