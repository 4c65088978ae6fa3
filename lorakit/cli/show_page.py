"""Examples as one page: every token in the colour of its weight, images beside them. Nothing is loaded from elsewhere."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Iterator
from typing import Any

from lorakit.cli.show import decode
from lorakit.data.render import PlacedImage, Rendered

MAX_SIDE = 480  # pixels of an image in the page
_STYLE = """
body { font: 15px/1.6 system-ui, sans-serif; margin: 2rem auto; max-width: 1180px; padding: 0 1rem; color: #1c2330; background: #fff }
h1 { font-size: 1.4rem; margin: 0 } h2 { font-size: .95rem; margin: 0 0 .6rem; color: #475467 } .soft { color: #667085 }
section { border-top: 1px solid #d0d5dd; padding: 1rem 0; margin-top: 1rem }
.example { display: flex; gap: 1.5rem; align-items: flex-start }
.images { flex: none; width: 260px } figure { margin: 0 0 1rem } figure img { max-width: 260px; min-width: 96px; max-height: 320px;
image-rendering: pixelated; border: 1px solid #d0d5dd } figure.large img { image-rendering: auto }
figcaption { font-size: .8rem; color: #667085; overflow-wrap: anywhere } figure.hot img { outline: 3px solid #f79009 }
.tokens { flex: 1; min-width: 0; font: 14px/1.9 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere }
.tokens span { border-radius: 3px; padding: 1px 0; box-shadow: inset -1px 0 0 #fff } .w0 { color: #667085; background: #f2f4f7 }
.w1 { background: #b7ebc6 } .other { background: #fde68a } .negative { background: #fecaca } .tokens span.image { background: #dbe8ff;
color: #1d4ed8; padding: 1px 6px; cursor: default; white-space: nowrap } .error { color: #b42318 }
@media (max-width: 700px) { .example { flex-direction: column } }
"""
_SCRIPT = """
document.querySelectorAll('span.image').forEach(chip => { const picture = document.getElementById(chip.dataset.image);
  for (const [name, on] of [['mouseenter', true], ['mouseleave', false]])
    chip.addEventListener(name, () => picture.classList.toggle('hot', on)); });
"""
_LEGEND = (
    '<span class="w1">trained</span> <span class="w0">read only, weight 0</span> <span class="other">another weight</span> '
    '<span class="negative">a negative weight</span>'
)


def as_page(name: str, tokenizer: Any, examples: list[tuple[str, Rendered | str]]) -> str:
    """Return the page, as HTML that needs no other file.

    Args:
        name: of the data.
        examples: where each stands, and its tokens, or why it was skipped.

    Raises:
        DataError: an image cannot be read.
    """
    title = html.escape(name)
    parts = [_section(number, where, example, tokenizer) for number, (where, example) in enumerate(examples)]
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>'
        f'<p class="soft">{len(parts)} examples as a run trains them. Point at a token for its id and weight.</p>'
        f'<p class="tokens">{_LEGEND}</p>{"".join(parts)}<script>{_SCRIPT}</script></html>\n'
    )


def _section(number: int, where: str, example: Rendered | str, tokenizer: Any) -> str:
    if isinstance(example, str):
        return f'<section><h2>{html.escape(where)}</h2><p class="error">skipped: {html.escape(example)}</p></section>'
    trained = sum(1 for weight in example.weights[1:] if weight)
    names = [f"image-{number}-{place}" for place in range(len(example.images))]
    figures = "".join(
        _figure(one, image, index) for index, (one, image) in enumerate(zip(names, example.images, strict=True), 1)
    )
    images = f'<div class="images">{figures}</div>' if figures else ""
    return (
        f"<section><h2>{html.escape(where)} · {len(example.tokens):,} tokens, {trained:,} trained</h2>"
        f'<div class="example">{images}<div class="tokens">{"".join(_spans(example, names, tokenizer))}</div></div></section>'
    )


def _spans(example: Rendered, names: list[str], tokenizer: Any) -> Iterator[str]:
    """A mark for each token, or for the few that are one character together; one for all tokens of an image."""
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
        yield f'<span class="{_kind(weights[start])}" title="{ids}, weight {weights[start]:g}">{html.escape(text)}</span>'
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
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")  # as processors do
    width, height = picture.size
    picture.thumbnail((MAX_SIDE, MAX_SIDE))
    file = io.BytesIO()
    picture.save(file, "PNG")
    source = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    caption = f"image {number}: {image.chunk.name}, {width:,} x {height:,} pixels, {image.chunk.length:,} tokens"
    kind = ' class="large"' if min(width, height) > 200 else ""
    return f'<figure id="{name}"{kind}><img src="{source}" alt=""><figcaption>{html.escape(caption)}</figcaption></figure>'
