"""What a model reads: tokens and images in chunks, in Tinker's shapes; and the arrays that travel
beside them.

`lorakit/types.py` has these names too: that is where they are looked for.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from lorakit.errors import DataError

if TYPE_CHECKING:
    import torch

Given = Any  # lists of numbers, arrays of numpy, tensors of torch


class TensorData(np.ndarray):
    """An array of numpy that has the methods of Tinker's TensorData beside its own.

    >>> TensorData([1, 2], dtype="int64").tolist()
    [1, 2]
    """

    def __new__(
        cls, data: Given, dtype: Any = None, shape: Sequence[int] | None = None
    ) -> TensorData:
        # of torch, which numpy may not read: on a GPU, with a graph, or of 16 bit
        if hasattr(data, "detach"):
            data = data.detach().cpu().to_dense()
            data = (
                data.float() if data.is_floating_point() and data.dtype.itemsize == 2 else data
            ).numpy()
        array = np.array(data, dtype=dtype)
        return (array if shape is None else array.reshape(tuple(shape))).view(cls)

    @classmethod
    def from_numpy(cls, array: np.ndarray) -> TensorData:
        return cls(array)

    @classmethod
    def from_torch(cls, tensor: torch.Tensor) -> TensorData:
        return cls(tensor)

    def to_numpy(self) -> np.ndarray:
        return self.view(np.ndarray)

    def to_torch(self) -> torch.Tensor:
        """A copy as a tensor."""
        import torch

        return torch.from_numpy(np.array(self))


@dataclass(frozen=True)
class EncodedTextChunk:
    """A run of token ids."""

    tokens: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "tokens", tuple(map(int, self.tokens)))

    @property
    def length(self) -> int:
        return len(self.tokens)


class ImageChunk:
    """An encoded image, PNG or JPEG say, among the text.

    Args:
        data: its bytes, or what reads them when they are wanted.
        format: ``png``, ``jpeg``, …; the bytes themselves decide.
        expected_tokens: positions that it takes. Another number than the model's processor makes of
            it is an error.
        name: what errors call it.
    """

    __slots__ = ("_data", "expected_tokens", "format", "name")

    def __init__(
        self,
        data: bytes | Callable[[], bytes],
        format: str = "png",
        expected_tokens: int | None = None,
        *,
        name: str = "",
    ) -> None:
        self._data, self.format = data, format
        self.expected_tokens, self.name = expected_tokens, name

    @property
    def data(self) -> bytes:
        return self._data if isinstance(self._data, bytes) else self._data()

    @property
    def length(self) -> int:
        if self.expected_tokens is None:
            raise DataError(
                "an image without expected_tokens: how many positions it takes is not known here"
            )
        return self.expected_tokens

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ImageChunk) and (self.data, self.expected_tokens) == (
            other.data,
            other.expected_tokens,
        )

    def __hash__(self) -> int:
        return hash((self.data, self.expected_tokens))

    def __repr__(self) -> str:
        return f"ImageChunk({self.format}, {self.expected_tokens} tokens)"


Chunk = EncodedTextChunk | ImageChunk


@dataclass(frozen=True)
class ModelInput:
    """What the model reads, as chunks of tokens and images."""

    chunks: tuple[Chunk, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "chunks", tuple(self.chunks))

    @classmethod
    def empty(cls) -> ModelInput:
        """Return an input without positions."""
        return cls()

    def append(self, chunk: Chunk) -> ModelInput:
        """Return this input with ``chunk`` after it."""
        return ModelInput((*self.chunks, chunk))

    def append_int(self, token: int) -> ModelInput:
        """Return this input with one more token."""
        return self.append(EncodedTextChunk((token,)))

    @classmethod
    def from_ints(cls, tokens: Sequence[int]) -> ModelInput:
        """Return the input that holds ``tokens`` as one chunk."""
        return cls((EncodedTextChunk(tuple(tokens)),))

    def to_ints(self) -> list[int]:
        """Return the token ids of all chunks in order. Raises DataError where one is an image,
        which has none.
        """
        if self.images:
            raise DataError("this model_input has images: it is no list of tokens")
        return self.text_tokens()

    def text_tokens(self) -> list[int]:
        """Return the token ids of the chunks of text, in order."""
        return [
            token
            for chunk in self.chunks
            if isinstance(chunk, EncodedTextChunk)
            for token in chunk.tokens
        ]

    def first(self, num_positions: int) -> ModelInput:
        """Return the first positions. Raises ValueError where they end within an image."""
        chunks: list[Chunk] = []
        for chunk in self.chunks:
            if num_positions <= 0:
                break
            if isinstance(chunk, EncodedTextChunk):
                chunks.append(EncodedTextChunk(chunk.tokens[:num_positions]))
            elif chunk.length > num_positions:
                raise ValueError(f"{num_positions} positions end within an image")
            else:
                chunks.append(chunk)
            num_positions -= chunk.length
        return ModelInput(tuple(chunks))

    @property
    def images(self) -> list[ImageChunk]:
        """The images, in order."""
        return [chunk for chunk in self.chunks if isinstance(chunk, ImageChunk)]

    @property
    def length(self) -> int:
        """Number of positions."""
        return sum(chunk.length for chunk in self.chunks)
