"""`lorakit show`: what is trained can be told with and without colour, and nothing invisible
stays so.
"""

from __future__ import annotations

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from vision import draw_image, png, save_vl_model

from lorakit.data.display import colour
from lorakit.data.render.renderer import Rendered
from lorakit.model.load import load_tokenizer

Call = Callable[..., tuple[int, str, str]]


def test_trained_text_stands_in_brackets_where_there_is_no_colour(
    workplace: Path, lorakit: Call
) -> None:
    (workplace / "rows.jsonl").write_text('{"prompt": "a\\u0007b", "completion": "c\\n\\n"}\n')
    code, out, err = lorakit("show", "data.path=rows.jsonl", "data.stop=\\n\\n")
    assert code == 0, err
    assert "a␇b⟦c↵\n↵\n⟧" in out
    assert "1 rows (prompt_completion)" in out and "tokens per example" in out


def test_weights_other_than_one_are_named() -> None:
    tokenizer = load_tokenizer("tiny")
    tokens, weights = tokenizer("abcd")["input_ids"], [0.0, 1.0, 0.5, -1.0]
    assert (
        colour(tokenizer, Rendered(tokens, weights), has_colour=False).plain
        == "a⟦b⟧⟦0.5: c⟧⟦-1: d⟧"
    )
    text = colour(tokenizer, Rendered(tokens, weights))
    assert (
        text.plain == "abcd"
        and colour(tokenizer, Rendered(tokenizer("\t\x00")["input_ids"], [0.0, 0.0])).plain
        == "→\t␀"
    )
    assert [str(span.style) for span in text.spans] == ["bright_black", "green", "yellow", "red"]


@pytest.fixture
def image_rows(workplace: Path) -> list[str]:
    """Three rows of which two have images, in files and in the row; settings that name them and
    a model that takes images.
    """
    (workplace / "bild ä.png").write_bytes(png(draw_image(1, (48, 32))))
    url = f"data:image/png;base64,{base64.b64encode(png(draw_image(2, (32, 32)))).decode()}"
    asked = [
        {"type": "image", "image": "bild ä.png"},
        {"type": "image", "image": url},
        {"type": "text", "text": "<b>which</b>?"},
    ]
    rows = [
        [{"role": "user", "content": asked}, {"role": "assistant", "content": "beide ✓"}],
        [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}],
        [{"role": "user", "content": asked[1:]}, {"role": "assistant", "content": "the second"}],
    ]
    (workplace / "rows.jsonl").write_text(
        "".join(json.dumps({"messages": row}) + "\n" for row in rows), encoding="utf-8"
    )
    return [
        f"model.path={save_vl_model(workplace / 'model')}",
        "data.path=rows.jsonl",
        "data.max_pixels=4096",
    ]


def test_images_are_named_in_the_terminal_with_their_tokens(
    lorakit: Call, image_rows: list[str]
) -> None:
    code, out, err = lorakit("show", *image_rows)
    assert code == 0, err
    assert (
        "<|vision_start|><|image_pad|> x 24<|vision_end|><|vision_start|><|image_pad|> x"
        " 16<|vision_end|>" in out
    )
    assert (
        "image 1: bild ä.png (rows.jsonl:1), 24 tokens" in out
        and "image 1: in the row (rows.jsonl:3), 16 tokens" in out
    )
    assert "⟦beide ✓<|im_end|>⟧" in out and out.count("<|image_pad|>") == 3


def test_a_page_shows_images_beside_the_colour_of_every_token(
    workplace: Path, lorakit: Call, image_rows: list[str]
) -> None:
    from PIL import Image

    code, out, err = lorakit("show", "--html", "pages/rows.html", "-n", "2", *image_rows)
    assert code == 0, err
    assert "pages/rows.html" in out and ", 3 images of 56 tokens" in out
    page = (workplace / "pages/rows.html").read_text(encoding="utf-8")
    pictures = [
        base64.b64decode(found)
        for found in re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    ]
    assert [Image.open(io.BytesIO(one)).size for one in pictures] == [(48, 32), (32, 32)]
    assert list(Image.open(io.BytesIO(pictures[0])).getdata()) == list(
        draw_image(1, (48, 32)).getdata()
    )
    assert (
        "bild ä.png (rows.jsonl:1), 48 x 32 pixels, 24 tokens" in page
        and "image 2: 16 tokens, weight 0" in page
    )
    # three bytes, three tokens
    assert re.search(r'<span class="w1(?: end)?" title="\d+, \d+, \d+, weight 1">✓</span>', page)
    assert "<b>which" not in page and '<span class="w0" title="27, weight 0">&lt;</span>' in page
    trained = re.findall(r'class="w1(?: end)?" title="[^"]*">([^<]*)<', page)
    assert "".join(trained) == "beide ✓&lt;|im_end|&gt;good day&lt;|im_end|&gt;"
    assert "http" not in page.replace("https://", "")


def test_a_page_that_cannot_be_written_and_a_torn_image_are_errors(
    workplace: Path, lorakit: Call, image_rows: list[str]
) -> None:
    code, _, err = lorakit("show", "--html", "model/config.json/x.html", *image_rows)
    assert code == 2 and "--html model/config.json/x.html" in err
    code, _, err = lorakit("show", *image_rows, "--html")
    assert code == 2 and "--html: give the file to write" in err
    (workplace / "bild ä.png").write_bytes((workplace / "bild ä.png").read_bytes()[:120])
    code, _, err = lorakit("show", "--html", "x.html", *image_rows)
    assert (
        code == 2
        and "bild ä.png (rows.jsonl:1) cannot be read" in err
        and not (workplace / "x.html").exists()
    )
