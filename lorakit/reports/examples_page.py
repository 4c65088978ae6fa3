"""A data set as one page: its figures, and examples with every token in the colour of its
weight. Nothing is loaded from elsewhere.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from typing import Any

from lorakit.data.datamodule import LoRADataModule
from lorakit.data.display import decode
from lorakit.data.examples import DatasetReport
from lorakit.data.render.renderer import PlacedImage, Rendered

MAX_SIDE = 480  # pixels of an image in the page
_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem;
color: #1c2330; background: #fff }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: .95rem; margin: 0 0 .6rem; color: #475467 }
.soft { color: #667085 }
section { border-top: 1px solid #d0d5dd; padding: 1rem 0; margin-top: 1rem }
.example { display: flex; gap: 1.5rem; align-items: flex-start }
.images { flex: none; width: 260px } figure { margin: 0 0 1rem } figure img { max-width: 260px;
min-width: 96px; max-height: 320px;
image-rendering: pixelated; border: 1px solid #d0d5dd } figure.large img { image-rendering: auto }
figcaption { font-size: .8rem; color: #667085; overflow-wrap: anywhere } figure.hot img { outline:
3px solid #f79009 }
.tokens { flex: 1; min-width: 0; font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap;
overflow-wrap: anywhere }
.tokens span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 0 #fff } .w0 { color:
#667085; background: #f2f4f7 }
.w1 { background: #b7ebc6 } .tokens span.end { outline: 2px solid #067647; outline-offset: -1px }
.figures { display: flex; flex-wrap: wrap; gap: .4rem 2.2rem; margin: 1rem 0; font-variant-numeric:
tabular-nums }
.figures b { display: block; font-size: 1.25rem } .bars { display: flex; align-items: flex-end;
height: 120px; gap: 1px;
max-width: 720px } .bars div { flex: 1; background: #84adff } .bars div:hover { background: #2970ff
}
.scale { display: flex; max-width: 720px; justify-content: space-between; color: #667085; font-size:
.8rem }
table { border-collapse: collapse; margin-bottom: 1rem } td, th { padding: .2rem 1rem .2rem 0;
text-align: left }
td.number { text-align: right } .other { background: #fde68a } .negative { background: #fecaca }
.tokens span.image { background: #dbe8ff; color: #1d4ed8; padding: 1px 6px; cursor: default;
white-space: nowrap }
.error { color: #b42318 }
@media (max-width: 700px) { .example { flex-direction: column } }
"""
_SCRIPT = """
document.querySelectorAll('span.image').forEach(chip => { const picture =
document.getElementById(chip.dataset.image);
  for (const [name, on] of [['mouseenter', true], ['mouseleave', false]])
    chip.addEventListener(name, () => picture.classList.toggle('hot', on)); });
"""
_LEGEND = (
    '<span class="w1">trained</span> <span class="w0">read only, weight 0</span> '
    '<span class="other">another weight</span> <span class="negative">a negative weight</span> '
    '<span class="w1 end">ends an answer</span>'
)


def as_page(
    datamodule: LoRADataModule, tokenizer: Any, examples: list[tuple[str, Rendered | str]]
) -> str:
    """Return the page, as HTML that needs no other file.

    Args:
        datamodule: of the rows, its tokens checked.
        examples: where each stands, and its tokens, or why it was skipped.

    Raises:
        DataError: an image cannot be read.
    """
    title = html.escape(datamodule.spec.rows.title)
    encoder = datamodule.train_examples.renderer.encoder
    ends = {*encoder.special_ids, encoder.eos_token_id}
    parts = [
        _section(number, where, example, tokenizer, ends)
        for number, (where, example) in enumerate(examples)
    ]
    return (
        '<!doctype html><html lang="en"><meta charset="utf-8">'
        f"<title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>{_summary(datamodule)}"
        f'<p class="soft">{len(parts)} examples as a run trains them. Point at a token for its id'
        f' and weight.</p><p class="tokens">{_LEGEND}</p>{"".join(parts)}'
        f"<script>{_SCRIPT}</script></html>\n"
    )


def _summary(datamodule: LoRADataModule) -> str:
    """The figures of the whole set: how much there is, how long, what is cut, how full batches
    are, what each source gives.
    """
    report = datamodule.report
    assert report is not None
    looked = f" of {report.num_rows:,}" if report.num_rows_profiled < report.num_rows else ""
    how = "packed rows" if datamodule.is_packed else "batches"
    figures = [
        (f"{report.num_rows_profiled:,}{looked}", "rows"),
        (f"{report.num_examples:,}", "examples"),
        (f"{report.num_tokens:,}", "tokens"),
        (f"{report.trained_share:.1%}", "of them trained"),
        (
            f"{int(report.lengths.max()):,}",
            f"longest; data.max_tokens is {datamodule.spec.rendering.max_tokens:,}",
        ),
        (f"{report.cuts.num_truncated:,}", f"truncated, by {report.cuts.num_tokens_cut:,} tokens"),
        (f"{report.cuts.num_dropped:,}", "dropped as too long"),
        (f"{report.num_rows_skipped:,}", "rows skipped"),
        (f"{datamodule.estimate_padding():.1%}", f"padding in {how}, about"),
        (f"{report.num_without_stop:,}", "examples without a trained end"),
    ]
    cells = "".join(f"<div><b>{value}</b>{html.escape(label)}</div>" for value, label in figures)
    return f'<div class="figures">{cells}</div>{_histogram(report)}{_sources(report)}'


def _histogram(report: DatasetReport) -> str:
    bins = report.histogram(40)
    most = max(count for *_, count in bins)
    bars = ""
    for first, last, count in bins:
        height = max(100 * count / most, 1) if count else 0
        bars += (
            f'<div style="height:{height:.1f}%" title="{first:,} to {last:,} tokens: {count:,}'
            ' examples"></div>'
        )
    scale = f"<span>{bins[0][0]:,} tokens</span><span>{bins[-1][1]:,}</span>"
    return (
        f'<h2>Tokens per example</h2><div class="bars">{bars}</div><div class="scale">{scale}</div>'
    )


def _sources(report: DatasetReport) -> str:
    total = sum(share.trained_per_epoch for share in report.shares.values()) or 1.0
    lines = "".join(
        f'<tr><td>{html.escape(name)}</td><td class="number">{share.num_rows:,}</td>'
        f'<td class="number">{share.weight:g}</td>'
        f'<td class="number">{share.trained_per_epoch / total:.1%}</td></tr>'
        for name, share in report.shares.items()
    )
    head = (
        "<tr><th>source</th><th>rows</th><th>times an epoch</th><th>of the trained tokens</th></tr>"
    )
    return f"<h2>Sources</h2><table>{head}{lines}</table>" if lines else ""


def _section(
    number: int, where: str, example: Rendered | str, tokenizer: Any, ends: set[int | None]
) -> str:
    if isinstance(example, str):
        return (
            f'<section><h2>{html.escape(where)}</h2><p class="error">skipped:'
            f" {html.escape(example)}</p></section>"
        )
    trained = sum(1 for weight in example.weights[1:] if weight)
    names = [f"image-{number}-{place}" for place in range(len(example.images))]
    figures = "".join(
        _figure(one, image, index)
        for index, (one, image) in enumerate(zip(names, example.images, strict=True), 1)
    )
    images = f'<div class="images">{figures}</div>' if figures else ""
    return (
        f"<section><h2>{html.escape(where)} · {len(example.tokens):,} tokens, {trained:,}"
        " trained</h2>"
        f'<div class="example">{images}<div class="tokens">'
        f"{''.join(_spans(example, names, tokenizer, ends))}</div></div></section>"
    )


def _spans(
    example: Rendered, names: list[str], tokenizer: Any, ends: set[int | None]
) -> Iterator[str]:
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
            yield f'<span class="image" data-image="{names[index]}">{said}</span>'
            start += length
            continue
        end, text = start + 1, decode(tokenizer, tokens[start : start + 1])
        last = min(start + 4, len(tokens), *(place for place in images if place > start))
        while "\ufffd" in text and end < last and weights[end] == weights[start]:
            end += 1
            text = decode(tokenizer, tokens[start:end])
        ids = ", ".join(map(str, tokens[start:end]))
        kind = _kind(weights[start]) + (" end" if weights[start] and tokens[start] in ends else "")
        yield (
            f'<span class="{kind}" title="{ids}, weight'
            f' {weights[start]:g}">{html.escape(text)}</span>'
        )
        start = end


def _kind(weight: float) -> str:
    if weight == 0:
        return "w0"
    return "negative" if weight < 0 else "w1" if weight == 1 else "other"


def _figure(name: str, image: PlacedImage, number: int) -> str:
    from PIL import Image, ImageOps

    from lorakit.data.images import open_image

    with open_image(image.chunk.data, image.chunk.name) as opened:
        picture = ImageOps.exif_transpose(opened).convert("RGBA")
    # as processors do
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert(
        "RGB"
    )
    width, height = picture.size
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    caption = (
        f"image {number}: {image.chunk.name}, {width:,} x {height:,} pixels, {image.chunk.length:,}"
        " tokens"
    )
    kind = ' class="large"' if min(width, height) > 200 else ""
    return (
        f'<figure id="{name}"{kind}><img src="{source}"'
        f' alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
    )
