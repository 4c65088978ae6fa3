"""Images in rows: found wherever they are, as many tokens as transformers' processor makes,
never cut, never trained.
"""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from vision import (
    draw_image,
    logits_of,
    make_encoder,
    make_reference,
    make_tokenizer,
    make_vl_model,
    png,
)

from lorakit.data.batch.collate import collate
from lorakit.data.datamodule import LoRADataModule
from lorakit.data.datum import OnLong, TruncationStats, make_datum, truncate
from lorakit.data.render.renderer import Rendered, Renderer
from lorakit.errors import ConfigError, DataError
from lorakit.types import Datum, EncodedTextChunk, ImageChunk, ModelInput

PAD = make_tokenizer().convert_tokens_to_ids("<|image_pad|>")
QUESTION = "How many shapes are there?"


def row(*images: Any, answer: str = "two", question: str = QUESTION, **more: Any) -> dict[str, Any]:
    parts = [{"type": "image", **({} if image is None else {"image": image})} for image in images]
    user = {"role": "user", "content": [*parts, {"type": "text", "text": question}]}
    return {"messages": [user, {"role": "assistant", "content": answer}], **more}


def asked(*parts: dict[str, Any]) -> dict[str, Any]:
    return {
        "messages": [
            {"role": "user", "content": list(parts)},
            {"role": "assistant", "content": "two"},
        ]
    }


def llava(text: str, **more: Any) -> dict[str, Any]:
    return {
        "conversations": [{"from": "human", "value": text}, {"from": "gpt", "value": "two"}],
        **more,
    }


def module(folder: Path, rows: list[dict[str, Any]], **settings: Any) -> LoRADataModule:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(one) + "\n" for one in rows))
    found = LoRADataModule(path=str(path), **settings)
    found.set_tokenizer(make_tokenizer(), make_encoder())
    return found


def datums(found: LoRADataModule) -> list[Datum]:
    return [
        datum for index in range(len(found.source)) for datum in found.train_examples.datums(index)
    ]


def test_tokens_patches_and_positions_are_those_of_transformers(tmp_path: Path) -> None:
    sizes = [(48, 32), (20, 70), (33, 33), (400, 300)]
    rows = []
    for number, size in enumerate(sizes):
        draw_image(number, size).save(tmp_path / f"{number}.png")
        rows.append(row(f"{number}.png", f"{(number + 1) % 4}.png"))
    found = datums(module(tmp_path, rows))
    reference, model = make_reference(), make_vl_model()
    for number, datum in enumerate(found):
        messages = [dict(message) for message in rows[number]["messages"]]
        text = reference.apply_chat_template(messages, tokenize=False)
        images = [Image.open(tmp_path / f"{(number + n) % 4}.png") for n in (0, 1)]
        expected = reference(text=[text], images=[images], return_tensors="pt")
        batch = collate([[datum]], 0, make_encoder())
        length = batch.input_ids.shape[1]
        assert batch.input_ids[0].tolist() == expected["input_ids"][0, :length].tolist()
        assert expected["input_ids"].shape[1] == length + 1
        assert batch.images is not None and batch.position_ids is not None
        assert torch.equal(batch.images.patches_PD, expected["pixel_values"])
        assert torch.equal(batch.images.grids_N3, expected["image_grid_thw"])
        theirs, _ = model.model.get_rope_index(
            expected["input_ids"],
            expected["mm_token_type_ids"],
            image_grid_thw=expected["image_grid_thw"],
        )
        assert torch.equal(batch.position_ids[1:], theirs[:, :, :length])
        assert batch.position_ids[0].tolist() == [list(range(length))]


def test_images_are_found_in_files_urls_base64_bytes_and_tables(tmp_path: Path) -> None:
    image = draw_image(1)
    (tmp_path / "deep").mkdir()
    image.save(tmp_path / "deep" / "a b.png")
    content = png(image)
    encoded = base64.b64encode(content).decode()
    given = [
        "deep/a b.png",
        str(tmp_path / "deep" / "a b.png"),
        f"file://{tmp_path}/deep/a%20b.png",
        f"data:image/png;base64,{encoded}",
        encoded,
        {"path": "deep/a b.png"},
    ]
    rows = [row(one) for one in given]
    rows += [row(None, images=["deep/a b.png"]), row(None, images=[{"path": "deep/a b.png"}])]
    url = {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{encoded}"}}
    rows.append(
        {
            "messages": [
                {"role": "user", "content": [url, {"type": "text", "text": QUESTION}]},
                rows[0]["messages"][1],
            ]
        }
    )
    found = datums(module(tmp_path, rows))
    text = datasets.Value("string")
    message = {"role": text, "content": datasets.List({"type": text, "text": text})}
    features = datasets.Features(
        {"messages": datasets.List(message), "images": datasets.List(datasets.Image())}
    )
    plain = row(None)
    for message in plain["messages"]:
        parts = (
            message["content"]
            if isinstance(message["content"], list)
            else [{"type": "text", "text": message["content"]}]
        )
        message["content"] = [{"type": part["type"], "text": part.get("text")} for part in parts]
    tables = [{**plain, "images": [image]}, {**plain, "images": [{"bytes": content, "path": None}]}]
    datasets.Dataset.from_list(tables, features=features).to_parquet(tmp_path / "t.parquet")
    table = LoRADataModule(path=str(tmp_path / "t.parquet"))
    table.set_tokenizer(make_tokenizer(), make_encoder())
    assert table.has_images
    found += datums(table)
    batches = [collate([[datum]], 0, make_encoder()) for datum in found]
    assert len(batches) == len(given) + 3 + 2
    for batch in batches[1:]:
        assert all(
            torch.equal(batch.tensors()[name], tensor)
            for name, tensor in batches[0].tensors().items()
        )


def test_marks_in_conversations_stand_for_the_images_beside_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        draw_image(ord(name)).save(tmp_path / f"{name}.png")

    def read(found: LoRADataModule) -> list[tuple[list[int], list[bytes]]]:
        inputs = [datum.model_input for datum in datums(found)]
        return [
            (make_encoder().tokens(one), [chunk.data for chunk in one.images]) for one in inputs
        ]

    wanted = read(module(tmp_path, [row("a.png"), row("a.png", "b.png", question=" and?")]))
    marked = [
        llava(f"<image>{QUESTION}", image="a.png"),
        llava("<image><image> and?", images=["a.png", "b.png"]),
    ]
    found = module(tmp_path, [*marked, llava("an <image> tag")])
    assert found.has_images and found.check_tokens().unused_columns == {}
    assert read(found)[:2] == wanted
    assert "an <image> tag" in make_tokenizer().decode(datums(found)[2].model_input.to_ints())


def test_a_small_image_in_base64_is_not_taken_for_a_path(tmp_path: Path) -> None:
    content = png(Image.new("L", (8, 8), 90))
    text = base64.b64encode(content).decode()
    assert len(text) < 255
    found = module(
        tmp_path,
        [asked({"type": "image", key: text}, {"text": "?"}) for key in ("base64", "bytes")],
    )
    assert [datum.model_input.images[0].data for datum in datums(found)] == [content, content]


def test_only_headers_are_read_before_a_batch_is_made(tmp_path: Path) -> None:
    draw_image(1).save(tmp_path / "a.png")
    (datum,) = datums(module(tmp_path, [row("a.png")]))
    (tmp_path / "a.png").unlink()
    with pytest.raises(DataError, match=r"a.png"):
        collate([[datum]], 0, make_encoder())


def test_another_image_in_the_place_of_one_makes_another_fingerprint(tmp_path: Path) -> None:
    draw_image(1).save(tmp_path / "a.png")
    prints = []
    for content in ((tmp_path / "a.png").read_bytes(), png(draw_image(2)), png(draw_image(1))):
        (tmp_path / "a.png").write_bytes(content)
        found = module(tmp_path, [row("a.png"), row()])
        found.check_tokens()
        prints.append(found.fingerprint)
    assert prints[0] == prints[2] != prints[1]


def test_a_photo_that_was_turned_is_turned_back(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    draw_image(1, (64, 32)).save(tmp_path / "turned.jpg", exif=exif)
    (datum,) = datums(module(tmp_path, [row("turned.jpg")]))
    batch = collate([[datum]], 0, make_encoder())
    assert batch.images is not None and batch.images.grids_N3.tolist() == [[1, 16, 8]]


def test_rows_of_text_stand_beside_rows_with_images(tmp_path: Path) -> None:
    draw_image(1).save(tmp_path / "a.png")
    found = datums(module(tmp_path, [row("a.png"), row(), row("a.png", "a.png")]))
    batch = collate([[datum] for datum in found], 0, make_encoder())
    assert batch.images is not None and len(batch.images.grids_N3) == 3
    assert (batch.input_ids == PAD).sum() == int(batch.images.grids_N3.prod(1).sum()) // 4
    alone = collate([[found[1]]], 0, make_encoder())
    assert alone.images is None and alone.position_ids is None


def test_images_and_their_brackets_are_never_trained(tmp_path: Path) -> None:
    draw_image(1).save(tmp_path / "a.png")
    for train_on in ("all_assistant_messages", "all_messages", "all_tokens"):
        found = module(tmp_path, [row("a.png")], train_on=train_on)
        (example,) = found.train_examples.rendered(0)
        (image,) = example.images
        assert (
            example.tokens[image.start : image.start + image.chunk.length]
            == [PAD] * image.chunk.length
        )
        assert (image.first, image.end) == (image.start - 1, image.start + image.chunk.length + 1)
        assert not any(example.weights[image.first : image.end]) and any(example.weights)


PROBLEMS = [
    (row("none.png"), r"rows.jsonl:2: image .*none.png: there is no such file"),
    (row("text.png"), r"rows.jsonl:2: image .*text.png cannot be read: cannot identify"),
    (row("empty.png"), r"rows.jsonl:2: image .*empty.png cannot be read"),
    (row("https://example.com/a.png"), r"rows.jsonl:2: .*download it"),
    (row("data:image/png;base64,%%%"), r"rows.jsonl:2: .*base64 cannot be decoded"),
    (row(5), r"rows.jsonl:2: .*must be a path"),
    (row(None), r"rows.jsonl:2: 1 image parts name no image, but `images` holds 0"),
    (
        row("a.png", images=["a.png"]),
        r"rows.jsonl:2: 0 image parts name no image, but `images` holds 1",
    ),
    (
        row("a.png", question="<|image_pad|>?"),
        r"rows.jsonl:2: message 0 has the text <\|image_pad\|>",
    ),
    (row("thin.png"), r"rows.jsonl:2: an image of 900 x 1 pixels"),
    (
        row("deep.png"),
        r"rows.jsonl:2: image .*deep.png has numbers of more than 8 bits \(mode I;16\)",
    ),
    (
        row("float.tiff"),
        r"rows.jsonl:2: image .*float.tiff has numbers of more than 8 bits \(mode F\)",
    ),
    (row("vast.png"), r"rows.jsonl:2: image .*vast.png has 20,000 x 5,000 pixels"),
    (row("drawing.eps"), r"rows.jsonl:2: image .*drawing.eps cannot be read: cannot identify"),
    (row("~nobody-here/a.png"), r"rows.jsonl:2: .*image ~nobody-here/a.png"),
    (row("file://[x/a.png"), r"rows.jsonl:2: .*Invalid IPv6"),
    (
        asked({"type": "text", "text": "what?", "image": "a.png"}),
        r"content part 0 has text and an image; write two parts",
    ),
    (
        asked({"type": "image", "image": "a.png", "text": "what?"}),
        r"content part 0 has an image and `text`; write two parts",
    ),
    (
        asked({"image": "a.png", "max_pixels": 9}),
        r"content part 0 has `max_pixels` beside an image.*data.max_pixels",
    ),
]


@pytest.mark.parametrize(("bad", "message"), PROBLEMS)
def test_what_is_wrong_with_an_image_names_row_and_file(
    tmp_path: Path, bad: dict[str, Any], message: str
) -> None:
    draw_image(1).save(tmp_path / "a.png")
    draw_image(1, (900, 1)).save(tmp_path / "thin.png")
    (tmp_path / "text.png").write_text("not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    Image.new("I;16", (32, 32), 40_000).save(tmp_path / "deep.png")
    Image.new("F", (32, 32), 0.5).save(tmp_path / "float.tiff")
    Image.new("L", (20_000, 5_000)).save(tmp_path / "vast.png")
    draw_image(1).save(tmp_path / "drawing.eps")
    found = module(tmp_path, [row("a.png"), bad])
    with pytest.raises(DataError, match=message):
        found.check_tokens()
    skipping = module(tmp_path, [row("a.png"), bad], on_error="skip")
    assert skipping.check_tokens().num_rows_skipped == 1 and len(datums(skipping)) == 1


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (
            {"text": "so <|image_pad|> says"},
            r"other.jsonl:1: the text has <\|image_pad\|>, which stands for an image",
        ),
        (
            {"tokens": [5, PAD, 6], "weights": [0, 0, 1]},
            r"other.jsonl:1: the text has <\|image_pad\|>",
        ),
        (
            {"prompt": "<|image_pad|>", "completion": "x"},
            r"other.jsonl:1: the text has <\|image_pad\|>",
        ),
        (
            llava("<image>\nwhat?", image=["a.png", "a.png"]),
            r"`conversations` have 1 <image>, but the row has 2 images",
        ),
    ],
)
@pytest.mark.parametrize("has_images", [False, True])
def test_a_text_that_a_model_would_take_for_an_image_is_an_error(
    tmp_path: Path, other: dict[str, Any], message: str, has_images: bool
) -> None:
    draw_image(1).save(tmp_path / "a.png")
    module(tmp_path, [row("a.png") if has_images else row()])
    (tmp_path / "other.jsonl").write_text(json.dumps(other) + "\n")
    found = LoRADataModule(path=str(tmp_path / "*.jsonl"))
    with pytest.raises(DataError, match=message):
        found.set_tokenizer(
            make_tokenizer(), make_encoder() if has_images else None, image_token_id=PAD
        )
        found.check_tokens()


def test_an_image_that_is_broken_behind_its_header_is_an_error_of_its_batch_or_skipped(
    tmp_path: Path,
) -> None:
    draw_image(1).save(tmp_path / "a.png")
    torn = png(Image.effect_noise((64, 64), 80))
    (tmp_path / "torn.png").write_bytes(torn[: len(torn) // 2])  # its header is whole
    first, second = datums(module(tmp_path, [row("a.png"), row("torn.png")]))
    collate([[first]], 0, make_encoder())
    with pytest.raises(DataError, match=r"torn.png \(.*rows.jsonl:2\) cannot be read"):
        collate([[first], [second]], 0, make_encoder())
    assert len(datums(module(tmp_path, [row("a.png"), row("torn.png")], on_error="skip"))) == 1


def test_images_of_a_model_without_a_tower_are_an_error(tmp_path: Path) -> None:
    draw_image(1).save(tmp_path / "a.png")
    found = module(tmp_path, [row("a.png")])
    found.set_tokenizer(make_tokenizer())
    with pytest.raises(DataError, match=r"the row has an image"):
        found.check_tokens()


def test_bounds_on_pixels_decide_how_many_tokens_an_image_takes(tmp_path: Path) -> None:
    draw_image(1, (96, 64)).save(tmp_path / "a.png")
    lengths = []
    for bounds in ({}, {"max_pixels": 1024}, {"min_pixels": 128 * 128}):
        (datum,) = datums(module(tmp_path, [row("a.png")], **bounds))
        (image,) = datum.model_input.images
        lengths.append(image.length)
    assert lengths[1] <= 16 < lengths[0] == 96 < 256 <= lengths[2]
    with pytest.raises(ConfigError, match=r"more than data\.max_pixels"):
        make_encoder(min_pixels=2000, max_pixels=1000)


def example_of(*parts: int | ImageChunk, trained_from: int) -> Rendered:
    """A rendered example: numbers are tokens, images stand in brackets 1 and 2."""
    tokens: list[int] = []
    for part in parts:
        tokens += [1, PAD, 2] if isinstance(part, ImageChunk) else [part]
    renderer = Renderer(make_tokenizer(), image_token_id=PAD)
    renderer.encoder.special_ids = {1, 2, PAD}
    bare = Rendered(tokens, [float(place >= trained_from) for place in range(len(tokens))])
    return renderer._with_images(bare, [part for part in parts if isinstance(part, ImageChunk)])


@pytest.mark.parametrize("policy", [OnLong.TRUNCATE_PROMPT, OnLong.TRUNCATE_RIGHT])
@pytest.mark.parametrize("max_tokens", range(2, 24))
def test_no_length_cuts_an_image_in_two(policy: OnLong, max_tokens: int) -> None:
    image = ImageChunk(b"", expected_tokens=4)
    whole = example_of(10, image, 11, 12, image, 13, 14, 15, trained_from=10)
    long = example_of(20, 21, image, 22, trained_from=0)  # trained everywhere but in the image
    for example in (whole, long):
        try:
            kept = truncate(example, max_tokens, policy, TruncationStats())
        except DataError:
            continue
        assert kept is not None and len(kept.tokens) <= max_tokens
        assert kept.tokens.count(PAD) == 4 * len(kept.images)
        for placed in kept.images:
            assert kept.tokens[placed.first : placed.end] == [1, *[PAD] * 4, 2]
            assert not any(kept.weights[placed.first : placed.end])
        datum = make_datum(kept.tokens, kept.weights, kept.images)
        assert len(datum) == len(datum.targets)
        text = [
            token
            for chunk in datum.model_input.chunks
            if isinstance(chunk, EncodedTextChunk)
            for token in chunk.tokens
        ]
        assert PAD not in text
    assert whole.tokens.count(PAD) == 8


def test_an_image_at_the_end_is_not_cut_by_the_shift() -> None:
    image = ImageChunk(b"", expected_tokens=3)
    tokens, weights = [5, 6, 1, PAD, PAD, PAD], [0.0, 1.0, 0.0, 0.0, 0.0, 0.0]
    from lorakit.data.render.renderer import PlacedImage

    datum = make_datum(tokens, weights, [PlacedImage(image, 3, 2, 6)])
    assert datum.model_input.to_ints() == [5] and datum.targets.tolist() == [6]


@pytest.mark.parametrize("by_document", [False, True])
def test_packed_rows_with_images_equal_rows_by_themselves_and_do_not_see_their_neighbours(
    tmp_path: Path, by_document: bool
) -> None:
    from lorakit.model.attention import attend_by_document

    for number in range(6):
        draw_image(number, ((24, 32), (48, 40), (32, 32))[number % 3]).save(
            tmp_path / f"{number}.png"
        )
    rows = [
        row("0.png"),
        row("1.png", "2.png", question="Which is larger?"),
        row(),
        row("4.png", answer="one"),
    ]
    found = datums(module(tmp_path, rows))
    (tmp_path / "other").mkdir()
    other = datums(
        module(
            tmp_path / "other", [row(str(tmp_path / "3.png"), question="Other?", answer="four" * 5)]
        )
    )
    model = make_vl_model()
    if by_document:
        assert attend_by_document(model) is None
    alone = [logits_of(model, make_encoder(), [[datum], [found[0]]])[0] for datum in found]
    together = logits_of(model, make_encoder(), [found])
    for one, same in zip(together, alone, strict=True):
        assert torch.allclose(one, same, atol=1e-5)
    neighbour = logits_of(model, make_encoder(), [[other[0], *found[1:]]])[1:]
    for one, same in zip(neighbour, together[1:], strict=True):
        assert torch.allclose(one, same, atol=1e-5)
    # The control: positions that do not restart, which is what others do to packed rows, let
    # documents see one another.
    batch = collate([found], 0, make_encoder())
    assert batch.images is not None and batch.position_ids is not None
    with torch.no_grad():
        leaking = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids[1:],
            pixel_values=batch.images.patches_PD,
            image_grid_thw=batch.images.grids_N3,
            use_cache=False,
        ).logits
    assert (
        float((leaking[0, batch.spans[1][1] : batch.spans[1][2]] - together[1]).abs().max()) > 0.1
    )


def test_chunks_say_how_many_positions_they_take() -> None:
    content = png(draw_image(1, (32, 32)))
    encoder = make_encoder()
    right, wrong = (
        ModelInput((EncodedTextChunk((5,)), ImageChunk(content, expected_tokens=n)))
        for n in (16, 15)
    )
    assert encoder.count_tokens(right.images[0]) == 16 and right.length == 17
    assert encoder.tokens(right) == [5] + [PAD] * 16
    with pytest.raises(DataError, match="expected_tokens=15, but it takes 16"):
        encoder.encode(wrong.images)
    with pytest.raises(DataError, match="it is no list of tokens"):
        right.to_ints()
    with pytest.raises(DataError, match="without expected_tokens"):
        _ = ImageChunk(content).length
    assert np.array_equal(
        encoder.encode([right.images[0]])[0].patches_PD,
        encoder.encode([ImageChunk(content)] * 2)[1].patches_PD,
    )
    assert io.BytesIO(right.images[0].data).read() == content
