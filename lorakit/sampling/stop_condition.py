"""Where a text ends: tokens and strings that stop it, and what is then kept."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lorakit.data.render.tokenizer import Encoder
from lorakit.types import SamplingParams


class StopCondition:
    """What ends the samples of one request."""

    def __init__(self, params: SamplingParams, tokenizer: Any, end_ids: list[int]) -> None:
        self.tokenizer = tokenizer
        self.strings = stop_strings(params)
        given: Any = [params.stop] if isinstance(params.stop, str) else params.stop
        tokens = [stop for stop in given or () if not isinstance(stop, str)]
        is_open_ended = given is not None and len(given) == 0
        self.tokens: frozenset[int] = frozenset(() if is_open_ended else tokens or end_ids)
        self._num_tail = max((len(text.encode()) for text in self.strings), default=0) + 4

    def is_reached(self, tokens: list[int]) -> bool:
        """Whether the last of ``tokens`` ends them. Only the tail is decoded."""
        if tokens[-1] in self.tokens:
            return True
        if not self.strings:
            return False
        tail = self.tokenizer.decode(tokens[-self._num_tail :])
        return any(text in tail for text in self.strings)

    def text(self, tokens: list[int], *, is_stopped: bool) -> str:
        """The text of ``tokens``, without what ended it."""
        ends = is_stopped and tokens and tokens[-1] in self.tokens
        kept = tokens[:-1] if ends else tokens
        text = str(self.tokenizer.decode(kept, skip_special_tokens=False))
        return before_stop(text, self.strings)


def stop_strings(params: SamplingParams) -> tuple[str, ...]:
    """The strings of ``params.stop``."""
    stop = (params.stop,) if isinstance(params.stop, str) else tuple(params.stop or ())
    return tuple(text for text in stop if isinstance(text, str) and text)


def before_stop(text: str, strings: Sequence[str]) -> str:
    """``text`` up to the first place where one of ``strings`` begins."""
    cut = min((place for place in map(text.find, strings) if place >= 0), default=-1)
    return text if cut < 0 else text[:cut]


def end_token_ids(model: Any, tokenizer: Any) -> list[int]:
    """The tokens that end a text: the tokenizer's EOS, those of the model's generation config,
    the template's end of turn.
    """
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ids = configured if isinstance(configured, list) else [configured]
    found = (tokenizer.eos_token_id, *ids, end_of_turn(tokenizer))
    return list(dict.fromkeys(token for token in found if token is not None))


def end_of_turn(tokenizer: Any) -> int | None:
    """The special token that the chat template writes after an assistant turn, which chat
    training trains; None without one.
    """
    if not getattr(tokenizer, "chat_template", None):
        return None
    try:
        messages = [{"role": "user", "content": "A"}, {"role": "assistant", "content": "B"}]
        text = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # a template that needs more than two messages says nothing about its end
        return None
    encoder = Encoder(tokenizer)
    tail = encoder.encode_rendered(text[text.rfind("B") + 1 :])
    return next((token for token in tail if token in encoder.special_ids), None)
