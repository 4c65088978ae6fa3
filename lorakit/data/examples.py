"""Rows to Datums, on demand: render, fit, shift; and the figures of a whole data set."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from lorakit.data.datum import OnLong, TruncationStats, make_datum, truncate
from lorakit.data.images import ImageEncoder, images_of
from lorakit.data.read.rows import Chat, Conversations, Preference, Row, to_chat
from lorakit.data.read.sources import FIX_OR_SKIP, Source
from lorakit.data.render.renderer import Rendered, Renderer
from lorakit.errors import DataError, fold, report
from lorakit.types import Datum, ImageChunk

EMPTY_TOKENS = 4  # more are not looked at: an end of a turn, and white space


@dataclass
class Examples:
    """The examples of a source, made when asked for. Counts what is cut, dropped and skipped as
    rows stream by.
    """

    source: Source
    renderer: Renderer
    max_tokens: int
    on_long: OnLong = OnLong.ERROR
    on_error: str = "raise"
    images: ImageEncoder | None = None
    cuts: TruncationStats = field(default_factory=TruncationStats)
    num_skipped: int = 0
    num_image_bytes: int = 0  # of all images that were looked at

    def rendered(self, index: int) -> list[Rendered]:
        """Return the examples of row ``index`` before the shift. Raises DataError that names
        file and line.
        """
        try:
            row, cuts = _as_chat(self.source.row(index)), TruncationStats()
            examples = self.renderer.render(row, self._images(index, row))
            fitted = [
                truncate(example, self.max_tokens, self.on_long, cuts) for example in examples
            ]
        except DataError as error:
            raise DataError(str(error), self.source.where(index)) from error
        self.cuts.add(cuts)
        if isinstance(row, Preference) and not all(fitted):
            return []  # half a pair is none
        return [example for example in fitted if example]

    def _images(self, index: int, row: Row) -> list[ImageChunk]:
        """The images of a row, of which only sizes are read: their bytes stay where they are
        until a batch is made of them.
        """
        if not isinstance(row, Chat) or not (
            stored := images_of(row.messages, row.images, self.source.folder(index))
        ):
            return []
        if self.images is None:
            raise DataError(
                "the row has an image, and set_tokenizer was given nothing that encodes it"
            )
        chunks = []
        for number, image in enumerate(stored):
            name = f"{image.name} ({self.source.where(index)})"
            count = self.images.num_tokens(*image.read_size())
            self.num_image_bytes += image.num_bytes
            read = functools.partial(self._read_image, index, number)
            chunks.append(ImageChunk(read, expected_tokens=count, name=name))
        return chunks

    def _read_image(self, index: int, number: int) -> bytes:
        row = _as_chat(self.source.row(index))
        assert isinstance(row, Chat)
        return images_of(row.messages, row.images, self.source.folder(index))[number].read()

    def datums(self, index: int) -> list[Datum]:
        """Return the Datums of row ``index``; none where it is dropped or, under
        ``on_error=skip``, cannot be used.
        """
        try:
            examples = self.rendered(index)
            # else an image that is broken after its header would be found too late
            if self.on_error == "skip" and self.images is not None:
                self.images.encode(
                    [image.chunk for example in examples for image in example.images]
                )
        except DataError:
            if self.on_error == "raise":
                raise
            self.num_skipped += 1
            return []
        origin = int(self.source.origins_of(np.array([index]))[0]) if self.source.names else None
        return [
            make_datum(example.tokens, example.weights, example.images, origin=origin)
            for example in examples
        ]


def _as_chat(row: Row) -> Row:
    return to_chat(row) if isinstance(row, Conversations) else row


@dataclass
class SourceShare:
    """What one source gives, of the rows that were looked at."""

    weight: float  # how often its rows are seen in an epoch
    num_rows: int  # all of them
    num_rows_profiled: int = 0
    num_trained_tokens: int = 0

    @property
    def trained_per_epoch(self) -> float:
        """Trained tokens that an epoch has of it."""
        per_row = self.num_trained_tokens / max(self.num_rows_profiled, 1)
        return per_row * self.num_rows * self.weight


@dataclass(frozen=True)
class DatasetReport:
    """The figures of a data set, from the rows that were looked at (all, in a small set)."""

    num_rows: int
    num_rows_profiled: int
    num_rows_skipped: int
    first_skipped: str | None  # where, and why
    num_examples: int
    lengths: np.ndarray  # tokens per example
    num_trained_tokens: int
    num_without_stop: int  # examples whose last trained token ends nothing
    num_images: int
    num_image_tokens: int
    num_image_bytes: int
    largest_image: int  # tokens
    image_share: float  # of an example's tokens, the most of any
    cuts: TruncationStats
    formats: list[str]
    unused_columns: dict[str, str]  # with the format of their rows
    fingerprint: str
    num_empty_answers: int = 0  # trained parts in which nothing is said
    first_empty_answer: str | None = None  # where
    longest_row: int = 0  # the row of the longest example
    # how often each of the added tokens occurs in them
    num_new_tokens: dict[int, int] = field(default_factory=dict)
    shares: dict[str, SourceShare] = field(default_factory=dict)  # of several sources, by name
    # of each example, which of them it is from
    origins: np.ndarray = field(default_factory=lambda: np.zeros(0, int))

    @property
    def num_tokens(self) -> int:
        """Tokens of the rows that were looked at."""
        return int(self.lengths.sum())

    @property
    def longest(self) -> int | None:
        """Positions of the longest example (a token less than it has), or None where not all
        rows were looked at.
        """
        if self.num_rows_profiled < self.num_rows:
            return None
        return max(1, int(self.lengths.max()) - 1)

    @property
    def trained_share(self) -> float:
        """Share of tokens with a weight other than 0."""
        return self.num_trained_tokens / max(self.num_tokens, 1)

    @property
    def examples_per_row(self) -> float:
        """More than 1 where the chat template makes one example per assistant turn, less where
        rows are dropped.
        """
        return self.num_examples / max(self.num_rows_profiled, 1)

    def histogram(self, num_bins: int = 8) -> list[tuple[int, int, int]]:
        """Return (from, to, examples) over the lengths, bins of equal width."""
        counts, edges = np.histogram(
            self.lengths, bins=min(num_bins, max(int(np.ptp(self.lengths)), 1))
        )
        return [(int(edges[i]), int(edges[i + 1]), int(count)) for i, count in enumerate(counts)]


@dataclass
class _Figures:
    """What ``profile`` counts, by the names of ``DatasetReport``."""

    num_new_tokens: dict[int, int]
    longest_row: int = 0
    lengths: list[int] = field(default_factory=list)
    origins: list[int] = field(default_factory=list)
    num_trained_tokens: int = 0
    num_without_stop: int = 0
    num_empty_answers: int = 0
    first_empty_answer: str | None = None
    num_images: int = 0
    num_image_tokens: int = 0
    largest_image: int = 0
    image_share: float = 0.0

    def add(self, example: Rendered, renderer: Renderer, where: str) -> int:
        """Count an example of the row ``where``; return how many of its tokens are trained."""
        self.lengths.append(len(example.tokens))
        num_trained = sum(1 for weight in example.weights[1:] if weight)  # nothing predicts [0]
        self.num_trained_tokens += num_trained
        for token in self.num_new_tokens:
            self.num_new_tokens[token] += example.tokens.count(token)
        sizes = [image.chunk.length for image in example.images]
        self.num_images += len(sizes)
        self.num_image_tokens += sum(sizes)
        self.largest_image = max(self.largest_image, *sizes, 0)
        self.image_share = max(self.image_share, sum(sizes) / len(example.tokens))
        self.num_without_stop += not _ends_with_stop(example, renderer)
        if empty := _num_empty_answers(example, renderer):
            self.num_empty_answers += empty
            self.first_empty_answer = self.first_empty_answer or where
        return num_trained


def profile(
    examples: Examples,
    indices: Sequence[int] | np.ndarray,
    max_rows: int,
    new_tokens: Sequence[int] = (),
) -> DatasetReport:
    """Render the first ``max_rows`` of ``indices`` and return their figures; the rest is checked as
    it streams.

    Args:
        new_tokens: are counted.

    Raises:
        DataError: under ``on_error=raise``, one report of all rows that give no usable example.
    """
    indices, source = np.asarray(indices), examples.source
    origins = source.origins_of(indices)
    chosen = _first_of_each(indices, origins, max_rows)
    counts = np.bincount(origins, minlength=len(source.names))
    shares = {
        name: SourceShare(source.weights[i], int(counts[i])) for i, name in enumerate(source.names)
    }
    counted = replace(examples, cuts=TruncationStats(), num_image_bytes=0)
    figures = _Figures(dict.fromkeys(new_tokens, 0))
    problems: list[DataError] = []
    longest = 0
    for row, origin in zip(map(int, chosen), source.origins_of(chosen), strict=True):
        share = shares[source.names[origin]] if shares else SourceShare(1.0, 0)
        share.num_rows_profiled += 1
        try:
            rendered = counted.rendered(row)
        except DataError as error:
            problems.append(error)
            continue
        for example in rendered:
            if len(example.tokens) > longest:
                longest, figures.longest_row = len(example.tokens), row
            figures.origins.append(int(origin))
            share.num_trained_tokens += figures.add(example, examples.renderer, source.where(row))
    if problems and examples.on_error == "raise":
        title = f"{len(problems):,} of {len(chosen):,} rows cannot be trained on:"
        equal = fold((error.where, error.text) for error in problems)
        raise DataError(report(title, equal, remedy=FIX_OR_SKIP))
    if not figures.lengths:
        raise DataError(
            f"none of the {len(chosen):,} rows looked at gives an example; see data.on_long and"
            " data.train_on"
        )
    arrays = {"lengths": np.array(figures.lengths), "origins": np.array(figures.origins)}
    return DatasetReport(
        num_rows=len(indices),
        num_rows_profiled=len(chosen),
        num_rows_skipped=source.num_skipped + len(problems),
        first_skipped=str(problems[0]) if problems else source.first_skipped,
        num_examples=len(figures.lengths),
        num_image_bytes=counted.num_image_bytes,
        cuts=counted.cuts,
        formats=source.formats,
        unused_columns=source.unused_columns,
        fingerprint=source.fingerprint,
        shares=shares,
        **vars(figures) | arrays,
    )


def _first_of_each(indices: np.ndarray, origins: np.ndarray, max_rows: int) -> np.ndarray:
    """The first ``max_rows`` of ``indices``, the same number from each source that has them."""
    found = np.unique(origins)
    if len(indices) <= max_rows or len(found) < 2:
        return indices[:max_rows]
    each = max(1, max_rows // len(found))
    return np.sort(np.concatenate([indices[origins == origin][:each] for origin in found]))


def _num_empty_answers(example: Rendered, renderer: Renderer) -> int:
    """Trained parts of ``example`` of which nothing is left without what ends a turn."""
    encoder, count = renderer.encoder, 0
    special, eos = encoder.special_ids, encoder.eos_token_id
    pairs = zip(example.tokens, example.weights, strict=True)
    for is_trained, part in itertools.groupby(pairs, key=lambda pair: pair[1] > 0):
        tokens = [token for token, _ in part]
        if is_trained and len(tokens) <= EMPTY_TOKENS:
            said = [token for token in tokens if token not in special and token != eos]
            count += not encoder.decode(said).strip()
    return count


def _ends_with_stop(example: Rendered, renderer: Renderer) -> bool:
    last = next(i for i in range(len(example.weights) - 1, -1, -1) if example.weights[i])
    token = example.tokens[last]
    if token == renderer.encoder.eos_token_id or token in renderer.encoder.special_ids:
        return True
    if not renderer.stop:
        return False
    end = renderer.encoder.decode(example.tokens[max(0, last - 15) : last + 1])
    return end.endswith(renderer.stop)
