"""The text of a sample as it grows, for those who read along."""

from __future__ import annotations

from typing import Any


class TextStream:
    """Turns a growing list of tokens into pieces of text that will not change any more.

    A character of several tokens is held back until it is whole, and so is what may be the
    beginning of a stop string.
    """

    def __init__(self, tokenizer: Any, stop: tuple[str, ...]) -> None:
        self.tokenizer, self.stop = tokenizer, stop
        # tokens before ``_start`` are done with; those before ``_read`` are in the text
        self._start = self._read = 0
        self._held = ""

    def add(self, tokens: list[int]) -> str:
        """Return what has become certain with ``tokens``, all so far."""
        before = self.tokenizer.decode(tokens[self._start : self._read], skip_special_tokens=False)
        whole = self.tokenizer.decode(tokens[self._start :], skip_special_tokens=False)
        if len(whole) <= len(before) or whole.endswith("\ufffd"):
            return ""
        self._start, self._read = self._read, len(tokens)
        self._held += whole[len(before) :]
        certain = len(self._held) - max((self._overlap(text) for text in self.stop), default=0)
        found, self._held = self._held[:certain], self._held[certain:]
        return found

    def _overlap(self, stop: str) -> int:
        """How many of the last held characters may be the beginning of ``stop``."""
        longest = min(len(stop), len(self._held))
        return next((n for n in range(longest, 0, -1) if self._held.endswith(stop[:n])), 0)
