"""A random vision-language model of the tiny one's shapes, with its real processor, for tests."""

from __future__ import annotations

import copy
import functools
import io
import random
from typing import Any

import make_tiny_model
import scenes
import tiny_vl
import torch
from PIL import Image
from transformers import Qwen3VLMoeForConditionalGeneration
from transformers.models.qwen3_vl import Qwen3VLProcessor

from lorakit.data.batch.collate import collate
from lorakit.data.images import ImageEncoder
from lorakit.model.attention import packed_documents
from lorakit.types import Datum


@functools.cache
def make_tokenizer() -> Any:
    tokenizer = make_tiny_model.make_tokenizer()
    tokenizer.chat_template = tiny_vl.CHAT_TEMPLATE
    return tokenizer


@functools.cache
def _built() -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Qwen3VLMoeForConditionalGeneration(tiny_vl.make_config(make_tokenizer()))
        for parameter in model.parameters():
            if parameter.ndim > 1:  # large enough that images and neighbours would move logits
                torch.nn.init.normal_(parameter, std=0.15)
    return model.requires_grad_(False).eval()


def make_vl_model() -> Any:
    return copy.deepcopy(_built())


def make_encoder(**bounds: Any) -> ImageEncoder:
    return ImageEncoder(
        tiny_vl.make_image_processor(), tiny_vl.make_config(make_tokenizer()), **bounds
    )


class ReferenceProcessor(Qwen3VLProcessor):
    """transformers' own processor; without torchvision it refuses to be made, for the sake of
    videos.
    """

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> Any:
        return type(argument)


def make_reference() -> Any:
    tokenizer = make_tokenizer()
    return ReferenceProcessor(
        tiny_vl.make_image_processor(), tokenizer, None, chat_template=tokenizer.chat_template
    )


def draw_image(seed: int, size: tuple[int, int] | None = None) -> Image.Image:
    """A scene; of ``size`` (width, height) it is stretched."""
    image = scenes.draw_question(random.Random(seed)).images[0]
    return image.resize(size) if size else image


def png(image: Image.Image, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG", **options)
    return file.getvalue()


def save_vl_model(folder: Any) -> str:
    """Write the model with its tokenizer and image processor as the hub has them, and return the
    folder.
    """
    tiny_vl.save(make_vl_model(), make_tokenizer(), folder)
    return str(folder)


def logits_of(model: Any, encoder: ImageEncoder, rows: list[list[Datum]]) -> list[torch.Tensor]:
    """The logits of each Datum of ``rows``, several to a packed row."""
    batch = collate(rows, 0, encoder)
    assert batch.images is not None
    with torch.no_grad(), packed_documents(batch.spans):
        logits = model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            pixel_values=batch.images.patches_PD,
            image_grid_thw=batch.images.grids_N3,
            use_cache=False,
        ).logits
    return [logits[row, first:last] for row, first, last in batch.spans]
