"""Tokens and weights to a Datum: truncate, then shift. Nothing else in lorakit shifts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from lorakit.data.render.renderer import PlacedImage, Rendered
from lorakit.errors import DataError
from lorakit.types import Chunk, Datum, EncodedTextChunk, ModelInput


class OnLong(StrEnum):
    """What happens to an example of more than ``max_tokens`` tokens."""

    ERROR = "error"
    DROP = "drop"
    TRUNCATE_PROMPT = "truncate_prompt"  # cut the prompt's left; special tokens in front stay
    TRUNCATE_RIGHT = "truncate_right"


@dataclass
class TruncationStats:
    """What ``truncate`` took away so far."""

    num_dropped: int = 0
    num_truncated: int = 0
    num_tokens_cut: int = 0

    def add(self, other: TruncationStats) -> None:
        """Count what ``other`` counted as well."""
        self.num_dropped += other.num_dropped
        self.num_truncated += other.num_truncated
        self.num_tokens_cut += other.num_tokens_cut


def make_datum(
    tokens: Sequence[int],
    weights: Sequence[float],
    images: Sequence[PlacedImage] = (),
    *,
    origin: int | None = None,
) -> Datum:
    """Shift once: position i reads token i and is to predict token i+1 with that token's weight.

    Each of ``images`` becomes a chunk instead of its placeholders. ``origin`` is which of
    several sources it is from.

    >>> datum = make_datum([5, 6, 7], [0, 0, 1])
    >>> datum.model_input.to_ints(), datum.targets.tolist(), datum.weights.tolist()
    ([5, 6], [6, 7], [0.0, 1.0])
    """
    # the shift would take its last token away
    if images and images[-1].start + images[-1].chunk.length == len(tokens):
        end = images[-1].first
        tokens, weights, images = tokens[:end], weights[:end], images[:-1]
    chunks: list[Chunk] = []
    end = 0
    for image in images:
        chunks += [*_text(tokens[end : image.start]), image.chunk]
        end = image.start + image.chunk.length
    model_input = ModelInput((*chunks, *_text(tokens[end:-1])))
    return Datum(
        model_input,
        {"target_tokens": list(tokens[1:]), "weights": list(weights[1:])},
        origin=origin,
    )


def _text(tokens: Sequence[int]) -> list[EncodedTextChunk]:
    return [EncodedTextChunk(tuple(tokens))] if len(tokens) else []


def truncate(
    example: Rendered, max_tokens: int, policy: OnLong, cuts: TruncationStats
) -> Rendered | None:
    """Return ``example`` within ``max_tokens`` tokens, or None where it is dropped; ``cuts`` counts
    what was taken.

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
        kept = _cut_right(example, max_tokens)
    else:
        kept = _cut_prompt(example, excess)
    if not any(kept.weights[1:]):
        raise DataError(
            f"no trained token is left of {len(example.tokens):,} within"
            f" data.max_tokens={max_tokens:,}"
        )
    cuts.num_truncated += 1
    cuts.num_tokens_cut += len(example.tokens) - len(kept.tokens)
    return kept


def _cut_right(example: Rendered, end: int) -> Rendered:
    """Keep what comes before ``end``, and no part of an image."""
    end = next((image.first for image in example.images if image.first < end < image.end), end)
    images = tuple(image for image in example.images if image.end <= end)
    return Rendered(example.tokens[:end], example.weights[:end], example.num_prefix, images)


def _cut_prompt(example: Rendered, excess: int) -> Rendered:
    start = example.num_prefix
    prompt_end = next(i for i, weight in enumerate(example.weights) if weight)
    # something must stay for the first trained token to be predicted from
    to_cut = prompt_end - max(start, 1)
    keep_from = start + excess
    # all of it
    keep_from = next(
        (image.end for image in example.images if image.first < keep_from < image.end), keep_from
    )
    if to_cut < keep_from - start:
        raise DataError(
            f"{excess:,} tokens too long, but the prompt has only {max(to_cut, 0):,} to cut "
            "(raise data.max_tokens, or choose data.on_long=truncate_right or drop)"
        )
    return Rendered(
        example.tokens[:start] + example.tokens[keep_from:],
        example.weights[:start] + example.weights[keep_from:],
        start,
        tuple(
            image.moved(start - keep_from) for image in example.images if image.first >= keep_from
        ),
    )
