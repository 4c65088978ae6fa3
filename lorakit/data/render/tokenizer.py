"""Text to token ids, the same in training as in sampling: prompts with the tokenizer's special
tokens, what follows without.
"""

from __future__ import annotations

from typing import Any

from lorakit.errors import DataError

# texts to put before a continuation; the first that merges with nothing of it serves
_ANCHORS = ("\n", "a", ":", ".")


class Encoder:
    """Wraps a tokenizer. ``encode_prompt(a) + encode_continuation(b)`` are the tokens of ``a``
    followed by ``b``.

    A special token that the tokenizer would put after a prompt (some append EOS) is left away: the
    text continues there.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self._backend = (
            tokenizer.backend_tokenizer if getattr(tokenizer, "is_fast", False) else None
        )
        # called without transformers around it, which is ten times slower for short texts
        if self._backend is not None:
            self._backend.no_truncation()
            self._backend.no_padding()
        bare = self.encode_rendered("a")
        full = list(tokenizer("a", add_special_tokens=True)["input_ids"])
        self.prefix: list[int] = full[: _find(full, bare)]
        # Tokenizers in SentencePiece's manner put a space before any text; in the middle of a text
        # that is one too many.
        self._has_dummy_prefix = self.encode_rendered("\na") != self.encode_rendered("\n") + bare
        self.eos_token_id: int | None = tokenizer.eos_token_id
        added = getattr(tokenizer, "added_tokens_decoder", {})
        # A template's end of turn may be special without having one of the names that
        # `all_special_ids` knows.
        self.special_ids = {
            *tokenizer.all_special_ids,
            *(index for index, token in added.items() if token.special),
        }

    def encode_prompt(self, text: str) -> list[int]:
        """Token ids of ``text`` with special tokens in front, and never a second BOS where the
        text brings its own.
        """
        ids = self.encode_rendered(text)
        return ids if self.prefix and ids[: len(self.prefix)] == self.prefix else self.prefix + ids

    def encode_continuation(self, text: str) -> list[int]:
        """Token ids of ``text`` as it reads after other text: no special tokens, no leading
        space that is not there.
        """
        if not text:
            return []
        if not self._has_dummy_prefix:
            return self.encode_rendered(text)
        for anchor in _ANCHORS:
            before, anchored = self.encode_rendered(anchor), self.encode_rendered(anchor + text)
            if anchored[: len(before)] == before:
                return anchored[len(before) :]
        return self.encode_rendered(text)

    def encode_rendered(self, text: str) -> list[int]:
        """Token ids of the beginning of a chat template's text, with special tokens."""
        if self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return list(self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])

    def encode_chat(self, messages: list[dict[str, str]]) -> list[int]:
        """Token ids of a conversation by the model's template, up to where the assistant begins to
        write.

        Raises:
            DataError: the template refuses it.
        """
        try:
            rendered = str(
                self.tokenizer.apply_chat_template(
                    messages, tokenize=False, add_generation_prompt=True
                )
            )
        except Exception as error:  # templates raise whatever jinja or their author likes
            raise DataError(f"the chat template refuses the conversation: {error}") from error
        return self.encode_rendered(rendered)

    def decode(self, tokens: list[int]) -> str:
        """The text of ``tokens``, special tokens included."""
        return str(
            self.tokenizer.decode(
                tokens, skip_special_tokens=False, clean_up_tokenization_spaces=False
            )
        )


def _find(full: list[int], bare: list[int]) -> int:
    for start in range(len(full) - len(bare) + 1):
        if full[start : start + len(bare)] == bare:
            return start
    return 0
