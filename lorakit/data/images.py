"""Images of rows: where their bytes are, how many tokens they take, and what the vision tower is
given.

An image is one chunk of a Datum and as many tokens as its size makes. Until a batch is collated
only its header is read.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import io
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import numpy as np

from lorakit.errors import ConfigError, DataError
from lorakit.types import EncodedTextChunk, ImageChunk, ModelInput

_ORIENTATION, _TURNED = 0x0112, (5, 6, 7, 8)  # EXIF: rows and columns change places
_ENCODED_KEYS = ("base64", "bytes")  # text below these is base64, of whatever length
_PART_KEYS = ("image", "path", "url", "image_url", *_ENCODED_KEYS)
_BEGINNINGS = ("iVBORw0KGgo", "/9j/4", "R0lGOD", "UklGR")  # of PNG, JPEG, GIF and WebP in base64
# of PIL's those that run no other program
_FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM")
# in a file, before it is scaled: PIL's own bound, beyond which it suspects a decompression bomb
MAX_PIXELS = 89_478_485


@dataclass(frozen=True)
class StoredImage:
    """Where one image of a row is: a file, or bytes in the row itself."""

    path: Path | None = None
    content: bytes | None = None

    @property
    def name(self) -> str:
        return str(self.path) if self.path else "in the row"

    @property
    def num_bytes(self) -> int:
        """Its size in bytes; 0 where there is no such file, which `read_size` says."""
        if self.content is not None:
            return len(self.content)
        return self.path.stat().st_size if self.path and self.path.is_file() else 0

    def read(self) -> bytes:
        """Return its bytes. Raises DataError that names the file."""
        if self.content is not None:
            return self.content
        assert self.path is not None
        try:
            return self.path.read_bytes()
        except OSError as error:
            raise DataError(f"image {self.path}: {error.strerror or error}") from error

    def read_size(self) -> tuple[int, int]:
        """Return (height, width) in pixels, of its header alone. Raises DataError."""
        return _size_of(self.content if self.content is not None else self.path, self.name)


def is_image_part(part: dict[str, Any]) -> bool:
    """Whether a part of a message's content is an image."""
    return part.get("type") in ("image", "image_url") or (
        "type" not in part and any(key in part for key in _PART_KEYS)
    )


def find_image_problem(part: dict[str, Any]) -> str | None:
    """Return what is wrong with a part that is an image, as far as can be told without reading
    anything, or None.
    """
    known = ("type", *_PART_KEYS)
    if unread := [
        key for key, value in part.items() if key not in known and value not in (None, "")
    ]:
        if "text" in unread:
            return "has an image and `text`; write two parts"
        says_size = any("pixels" in key or "resized" in key for key in unread)
        hint = "; see data.min_pixels and data.max_pixels" if says_size else ""
        names = ", ".join(f"`{key}`" for key in unread)
        return f"has {names} beside an image, which nothing reads{hint}"
    problem = None if (given := _given(part)) is None else find_stored_problem(given)
    return f"cannot be used: {problem}" if problem else None


def find_text_problem(part: dict[str, Any]) -> str | None:
    """Return why a part of text would lose an image, or None."""
    return "has text and an image; write two parts" if _given(part) is not None else None


def find_stored_problem(given: Any) -> str | None:
    """The same for what is in a part, or in the column ``images``."""
    try:
        locate(given, None)
    except DataError as error:
        return str(error)
    return None


def images_of(
    messages: Sequence[Any], column: Sequence[Any] | None, folder: Path | None
) -> list[StoredImage]:
    """Return the images of a conversation in order: what parts name, or, where they name nothing,
    the next of the row's ``images``.

    Args:
        folder: of the file that the row is in: relative paths begin there.
    """
    rest = iter(column or ())
    return [
        locate(next(rest) if (given := _given(part)) is None else given, folder)
        for part in filter(is_image_part, parts_of(messages))
    ]


def parts_of(messages: Sequence[Any]) -> list[dict[str, Any]]:
    """The parts of all messages whose content is not a text alone, in order."""
    return [part for m in messages if isinstance(m.content, list) for part in m.content]


def has_no_name(part: dict[str, Any]) -> bool:
    """Whether a part stands for the next image of the row's ``images``."""
    return _given(part) is None


def locate(given: Any, folder: Path | None) -> StoredImage:
    """Return where an image is: a path, a ``file:`` or ``data:`` URL, base64, bytes, or a record of
    bytes and path (of a parquet file).

    Raises:
        DataError: it is something else, or would have to be fetched.
    """
    if isinstance(given, dict):
        encoded = next((given[key] for key in _ENCODED_KEYS if given.get(key) is not None), None)
        if isinstance(encoded, str):
            return StoredImage(content=_from_base64(encoded))
        given = encoded or next(
            (given[key] for key in ("path", "url", "image") if given.get(key) is not None), None
        )
    if isinstance(given, (bytes, bytearray, memoryview)):
        return StoredImage(content=bytes(given))
    if not isinstance(given, str) or not given:
        raise DataError(
            f"an image must be a path, a data: URL, base64 or bytes, not {type(given).__name__}"
        )
    if given.startswith("data:"):
        return StoredImage(content=_from_base64(given.partition(",")[2]))
    if given.startswith(("http://", "https://")):
        raise DataError(
            f"image {given[:80]}: lorakit fetches nothing while it trains; download it, and give"
            " its path"
        )
    is_long = len(given) > 255 and not given.startswith("file:")  # for a name
    if (is_long or given.startswith(_BEGINNINGS)) and "." not in given[-8:]:
        return StoredImage(content=_from_base64(given))
    try:
        path = Path(
            unquote(urlsplit(given).path) if given.startswith("file:") else given
        ).expanduser()
    except (ValueError, RuntimeError) as error:  # no such user's home, or no URL
        raise DataError(f"image {given[:80]}: {error}") from error
    return StoredImage(path=path if path.is_absolute() or folder is None else folder / path)


def _given(part: dict[str, Any]) -> Any:
    key = next((key for key in _PART_KEYS if part.get(key) is not None), None)
    found = part[key] if key else None
    if key in _ENCODED_KEYS:
        return {key: found}
    return found.get("url") if key == "image_url" and isinstance(found, dict) else found


def _from_base64(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise DataError(f"an image in base64 cannot be decoded: {error}") from error


def _size_of(source: bytes | Path | None, name: str) -> tuple[int, int]:
    assert source is not None
    with open_image(source, name) as image:
        width, height = image.size
        # Asked for the metadata of a PNG that says nothing of it in front, PIL decodes all of it.
        says = image.getexif() if image.format != "PNG" or "exif" in image.info else {}
        return (width, height) if says.get(_ORIENTATION) in _TURNED else (height, width)


@contextlib.contextmanager
def open_image(source: bytes | Path, name: str) -> Iterator[Any]:
    """Open an image with PIL, of which nothing but the header is read by that.

    Raises:
        DataError: it cannot be read, or would be cut off or blown up; the message names it.
    """
    from PIL import Image

    file = io.BytesIO(source) if isinstance(source, bytes) else source
    with _explained(name), Image.open(file, formats=_FORMATS) as image:
        width, height = image.size
        if width * height > MAX_PIXELS:
            raise DataError(
                f"image {name} has {width:,} x {height:,} pixels, and no more than {MAX_PIXELS:,}"
                " are read: scale it"
            )
        if image.mode.startswith("I") or image.mode == "F":
            raise DataError(
                f"image {name} has numbers of more than 8 bits (mode {image.mode}), most of which"
                " would become white: convert it to 8 bits"
            )
        yield image


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """Turn what PIL raises, which is anything, into an error that names the image."""
    try:
        yield
    except DataError:
        raise
    except FileNotFoundError as error:
        raise DataError(f"image {name}: there is no such file") from error
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise DataError(f"image {name} cannot be read: {reason}") from error


@dataclass(frozen=True)
class EncodedImage:
    """What the vision tower is given of one image."""

    patches_PD: np.ndarray
    grid: tuple[int, int, int]  # frames, and patches down and across


class ImageEncoder:
    """Wraps a model's image processor, of the family of Qwen's vision-language models.

    Args:
        config: of the model: which token stands for an image, how positions are counted.
        min_pixels, max_pixels: images are scaled to between these, at the same ratio; None: as the
            processor has it.

    Raises:
        ConfigError: the processor is of another family.
    """

    def __init__(
        self,
        processor: Any,
        config: Any,
        *,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
    ) -> None:
        self.processor, self.config = processor, config
        token_id: int | None = getattr(config, "image_token_id", None)
        rope = getattr(config.get_text_config(), "rope_parameters", None) or {}
        if token_id is None or not hasattr(processor, "merge_size") or "mrope_section" not in rope:
            raise ConfigError(
                f"images of {config.model_type} ({type(processor).__name__}) are not known to"
                " lorakit, which reads those of Qwen2-VL, Qwen2.5-VL, Qwen3-VL and Qwen3-VL-MoE;"
                " train it on rows of text"
            )
        self.token_id, self.merge = token_id, int(processor.merge_size)
        size = dict(processor.size)
        self.min_pixels = min_pixels or size["shortest_edge"]
        self.max_pixels = max_pixels or size["longest_edge"]
        if self.min_pixels > self.max_pixels:
            raise ConfigError(
                f"data.min_pixels={self.min_pixels:,} is more than"
                f" data.max_pixels={self.max_pixels:,}"
            )

    def within(self, min_pixels: int | None, max_pixels: int | None) -> ImageEncoder:
        """Return the encoder with other bounds."""
        if min_pixels is None and max_pixels is None:
            return self
        return ImageEncoder(
            self.processor, self.config, min_pixels=min_pixels, max_pixels=max_pixels
        )

    def num_tokens(self, height: int, width: int) -> int:
        """Return how many positions an image of this size in pixels takes. Raises DataError for one
        that is too narrow.
        """
        try:
            bounds = {"min_pixels": self.min_pixels, "max_pixels": self.max_pixels}
            patches = self.processor.get_number_of_image_patches(height, width, bounds)
            return int(patches) // self.merge**2
        except (ValueError, ZeroDivisionError) as error:
            raise DataError(f"an image of {width} x {height} pixels: {error}") from error

    def count_tokens(self, chunk: ImageChunk) -> int:
        """Return how many positions ``chunk`` takes. Raises DataError where it is no image."""
        return self.num_tokens(*_size_of(chunk.data, chunk.name))

    def check(self, model_input: ModelInput) -> list[EncodedImage]:
        """Return the images of ``model_input``, encoded.

        Raises:
            DataError: a text has the token that stands for an image, or an image cannot be used as
                its chunk says.
        """
        named = []
        for number, chunk in enumerate(model_input.chunks):
            if isinstance(chunk, EncodedTextChunk) and self.token_id in chunk.tokens:
                raise DataError(
                    f"chunks[{number}] has token {self.token_id}, which stands for an image; give"
                    " an ImageChunk"
                )
            if isinstance(chunk, ImageChunk):
                name = chunk.name or f"chunks[{number}]"
                named.append(ImageChunk(chunk.data, chunk.format, chunk.expected_tokens, name=name))
        return self.encode(named)

    def tokens(self, model_input: ModelInput) -> list[int]:
        """Return the token ids of ``model_input``, images as placeholders."""
        found: list[int] = []
        for chunk in model_input.chunks:
            found += (
                [self.token_id] * chunk.length if isinstance(chunk, ImageChunk) else chunk.tokens
            )
        return found

    def place(self, tokens: Sequence[int], images: Sequence[ImageChunk]) -> ModelInput:
        """Return a rendered conversation with its images in the places of their placeholders, one
        token each.

        Raises:
            DataError: there are more or fewer of the one than of the other.
        """
        if (count := list(tokens).count(self.token_id)) != len(images):
            raise DataError(
                f"{len(images)} images, and the chat template writes {count} placeholders"
            )
        chunks: list[EncodedTextChunk | ImageChunk] = []
        rest, start = iter(images), 0
        for place, token in enumerate([*tokens, self.token_id]):  # one more ends the last text
            if token != self.token_id:
                continue
            if start < place:
                chunks.append(EncodedTextChunk(tuple(tokens[start:place])))
            if place < len(tokens):
                chunks.append(next(rest))
            start = place + 1
        return ModelInput(tuple(chunks))

    def encode(self, chunks: Sequence[ImageChunk]) -> list[EncodedImage]:
        """Decode images and cut them into patches, several at once.

        Raises:
            DataError: one cannot be decoded, or takes another number of positions than it says.
        """
        if len(chunks) < 2:
            return [self._encode(chunk) for chunk in chunks]
        with ThreadPoolExecutor(min(len(chunks), os.cpu_count() or 1, 8)) as pool:
            return list(pool.map(self._encode, chunks))

    def _encode(self, chunk: ImageChunk) -> EncodedImage:
        from PIL import ImageOps

        size = {"shortest_edge": self.min_pixels, "longest_edge": self.max_pixels}
        with open_image(chunk.data, chunk.name) as opened:
            found = self.processor(
                images=[ImageOps.exif_transpose(opened)], size=size, return_tensors="np"
            )
        frames, down, across = map(int, found["image_grid_thw"][0])
        count = frames * down * across // self.merge**2
        if chunk.expected_tokens not in (None, count):
            raise DataError(
                f"image {chunk.name}: expected_tokens={chunk.expected_tokens}, but it takes {count}"
                " positions here"
            )
        return EncodedImage(np.asarray(found["pixel_values"], np.float32), (frames, down, across))

    def positions(self, model_input: ModelInput, images: Sequence[EncodedImage]) -> np.ndarray:
        """Return time, height and width of each position, (3, L) (M-RoPE, Qwen2-VL, arXiv
        2409.12191, section 2.1).

        Text counts up in all three. An image's positions have the time at which it begins, and its
        rows and columns from there on; what follows continues after the larger of both.
        """
        rest, start = iter(images), 0
        parts: list[np.ndarray] = []
        for chunk in model_input.chunks:
            if isinstance(chunk, EncodedTextChunk):
                parts.append(np.broadcast_to(np.arange(chunk.length) + start, (3, chunk.length)))
                start += chunk.length
                continue
            frames, down, across = next(rest).grid
            down, across = down // self.merge, across // self.merge
            parts.append(np.indices((frames, down, across)).reshape(3, -1) + start)
            start += max(down, across)
        return np.concatenate(parts, axis=1) if parts else np.zeros((3, 0), np.int64)
