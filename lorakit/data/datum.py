"""Tokens and weights to a Datum: truncate, then shift. Nothing else in lorakit shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorakit.data.render import Rendered
from lorakit.errors import DataError
from lorakit.types import Datum, ModelInput


class OnLong(StrEnum):
    """What happens to an example of more than ``max_tokens`` tokens."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE_PROMPT = "truncate_prompt"  # cut the prompt's left; special tokens in front stay
    TRUNCATE_RIGHT = "truncate_right"


@dataclass
class Cuts:
    """What ``fit`` took away so far."""

    num_dropped: int = 0
    num_truncated: int = 0
    num_tokens_cut: int = 0

    def add(self, other: Cuts) -> None:
        """Count what ``other`` counted as well."""
        self.num_dropped += other.num_dropped
        self.num_truncated += other.num_truncated
        self.num_tokens_cut += other.num_tokens_cut


def make_datum(tokens: Sequence[int], weights: Sequence[float]) -> Datum:
    """Shift once: position i reads token i and is to predict token i+1 with that token's weight.

    >>> datum = make_datum([5, 6, 7], [0, 0, 1])
    >>> datum.model_input.to_ints(), datum.targets.tolist(), datum.weights.tolist()
    ([5, 6], [6, 7], [0.0, 1.0])
    """
    return Datum(
        ModelInput.from_ints(tokens[:-1]),
        {"target_tokens": list(tokens[1:]), "weights": list(weights[1:])},
    )


def fit(example: Rendered, max_tokens: int, policy: OnLong, cuts: Cuts) -> Rendered | None:
    """Return ``example`` within ``max_tokens`` tokens, or None where it is dropped; ``cuts`` counts what was taken.

    Raises:
        DataError: too long under ``error``, or nothing trained would be left of it.
    """
    excess = len(example.tokens) - max_tokens
    if excess <= 0:
        return example
    if policy is OnLong.ERROR:
        raise DataError(
            f"{len(example.tokens):,} tokens, but data.max_tokens={max_tokens:,} "
            "(raise it, or choose data.on_long=truncate_prompt, truncate_right or drop)"
        )
    if policy is OnLong.DROP:
        cuts.num_dropped += 1
        return None
    if policy is OnLong.TRUNCATE_RIGHT:
        kept = Rendered(example.tokens[:max_tokens], example.weights[:max_tokens], example.num_prefix)
    else:
        kept = _cut_prompt(example, excess)
    if not any(kept.weights[1:]):
        raise DataError(f"no trained token is left of {len(example.tokens):,} within data.max_tokens={max_tokens:,}")
    cuts.num_truncated += 1
    cuts.num_tokens_cut += excess
    return kept


def _cut_prompt(example: Rendered, excess: int) -> Rendered:
    start = example.num_prefix
    prompt_end = next(i for i, weight in enumerate(example.weights) if weight)
    to_cut = prompt_end - max(start, 1)  # something must stay for the first trained token to be predicted from
    if to_cut < excess:
        raise DataError(
            f"{excess:,} tokens too long, but the prompt has only {max(to_cut, 0):,} to cut "
            "(raise data.max_tokens, or choose data.on_long=truncate_right or drop)"
        )
    keep_from = start + excess
    return Rendered(
        example.tokens[:start] + example.tokens[keep_from:],
        example.weights[:start] + example.weights[keep_from:],
        start,
    )
