"""A data set as a page: figures, and examples with every token in the colour of its weight."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterator
from typing import Any

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.display import decode
from lorakit.data.examples import DatasetReport
from lorakit.data.render.renderer import PlacedImage, Rendered
from lorakit.reports.page import render

MAX_SIDE = 480  # pixels of an image in the page


def as_page(
    datamodule: LoRADataModule, tokenizer: Any, examples: list[tuple[str, Rendered | str]]
) -> str:
    """Return the page, as HTML that needs no other file.

    Args:
        datamodule: of the rows, its tokens checked.
        examples: where each is, and its tokens, or why it was skipped.

    Raises:
        DataError: an image cannot be read.
    """
    report = datamodule.report
    assert report is not None
    encoder = datamodule.train_examples.renderer.encoder
    ends = {*encoder.special_ids, encoder.eos_token_id}
    bins = report.histogram(40)
    return render(
        "examples",
        title=datamodule.spec.rows.title,
        figures=_figures(datamodule, report),
        bars=_bars(bins),
        scale=(f"{bins[0][0]:,}", f"{bins[-1][1]:,}"),
        sources=_sources(report),
        examples=[
            _example(number, where, example, tokenizer, ends)
            for number, (where, example) in enumerate(examples)
        ],
    )


def _figures(datamodule: LoRADataModule, report: DatasetReport) -> list[tuple[str, str]]:
    """The figures of the whole set: number, lengths, what is cut, how full batches are."""
    looked = f" of {report.num_rows:,}" if report.num_rows_profiled < report.num_rows else ""
    how = "packed rows" if datamodule.is_packed else "batches"
    longest = f"longest; data.max_tokens is {datamodule.spec.rendering.max_tokens:,}"
    return [
        (f"{report.num_rows_profiled:,}{looked}", "rows"),
        (f"{report.num_examples:,}", "examples"),
        (f"{report.num_tokens:,}", "tokens"),
        (f"{report.trained_share:.1%}", "of them trained"),
        (f"{int(report.lengths.max()):,}", longest),
        (f"{report.cuts.num_truncated:,}", f"truncated, by {report.cuts.num_tokens_cut:,} tokens"),
        (f"{report.cuts.num_dropped:,}", "dropped as too long"),
        (f"{report.num_rows_skipped:,}", "rows skipped"),
        (f"{datamodule.estimate_padding():.1%}", f"padding in {how}, about"),
        (f"{report.num_without_stop:,}", "examples without a trained end"),
    ]


def _bars(bins: list[tuple[int, int, int]]) -> list[dict[str, Any]]:
    most = max(count for *_, count in bins)
    return [
        {
            "height": max(100 * count / most, 1) if count else 0,
            "title": f"{first:,} to {last:,} tokens: {count:,} examples",
        }
        for first, last, count in bins
    ]


def _sources(report: DatasetReport) -> list[tuple[str, tuple[str, str, str]]]:
    """What each source gives to training."""
    total = sum(share.trained_per_epoch for share in report.shares.values()) or 1.0
    sources = []
    for name, share in report.shares.items():
        trained = f"{share.trained_per_epoch / total:.1%}"
        sources.append((name, (f"{share.num_rows:,}", f"{share.weight:g}", trained)))
    return sources


def _example(
    number: int, where: str, example: Rendered | str, tokenizer: Any, ends: set[int | None]
) -> dict[str, Any]:
    if isinstance(example, str):
        return {"where": where, "skipped": example}
    trained = sum(1 for weight in example.weights[1:] if weight)
    names = [f"image-{number}-{place}" for place in range(len(example.images))]
    return {
        "where": where,
        "skipped": None,
        "count": f"{len(example.tokens):,} tokens, {trained:,} trained",
        "images": [
            _image(name, image, index)
            for index, (name, image) in enumerate(zip(names, example.images, strict=True), 1)
        ],
        "spans": list(_spans(example, names, tokenizer, ends)),
    }


def _spans(
    example: Rendered, names: list[str], tokenizer: Any, ends: set[int | None]
) -> Iterator[dict[str, Any]]:
    """A mark for each token, or for the few that are one character together; one for all tokens
    of an image.
    """
    tokens, weights = example.tokens, example.weights
    images = {image.start: index for index, image in enumerate(example.images)}
    start = 0
    while start < len(tokens):
        if (index := images.get(start)) is not None:
            length = example.images[index].chunk.length
            said = f"image {index + 1}: {length:,} tokens, weight {weights[start]:g}"
            yield {"image": names[index], "text": said}
            start += length
            continue
        end, text = start + 1, decode(tokenizer, tokens[start : start + 1])
        last = min(start + 4, len(tokens), *(place for place in images if place > start))
        while "\ufffd" in text and end < last and weights[end] == weights[start]:
            end += 1
            text = decode(tokenizer, tokens[start:end])
        ids = ", ".join(map(str, tokens[start:end]))
        kind = _kind(weights[start]) + (" end" if weights[start] and tokens[start] in ends else "")
        title = f"{ids}, weight {weights[start]:g}"
        yield {"image": None, "kind": kind, "title": title, "text": text}
        start = end


def _kind(weight: float) -> str:
    if weight == 0:
        return "w0"
    return "negative" if weight < 0 else "w1" if weight == 1 else "other"


def _image(name: str, image: PlacedImage, number: int) -> dict[str, Any]:
    from PIL import Image, ImageOps

    from lorakit.data.images import open_image

    with open_image(image.chunk.data, image.chunk.name) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    # as processors do
    white = Image.new("RGBA", picture.size, "white")
    picture = Image.alpha_composite(white, picture).convert("RGB")
    width, height = picture.size
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    return {
        "name": name,
        "source": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}",
        "is_large": min(width, height) > 200,
        "caption": f"image {number}: {image.chunk.name}, {width:,} x {height:,} pixels,"
        f" {image.chunk.length:,} tokens",
    }
