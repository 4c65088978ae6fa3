"""What a model reads, and the arrays beside it: cuts, equality and number formats."""

from __future__ import annotations

import pytest
import torch

from lorakit.model_input import EncodedTextChunk, ImageChunk, ModelInput, TensorData
from lorakit.types import Batch

IMAGE = ImageChunk(b"an image", expected_tokens=4)
INPUT = ModelInput((EncodedTextChunk((1, 2)), IMAGE, EncodedTextChunk((3, 4, 5))))


@pytest.mark.parametrize(
    ("num_positions", "chunks"),
    [
        (1, (EncodedTextChunk((1,)),)),
        (2, (EncodedTextChunk((1, 2)),)),
        (6, (EncodedTextChunk((1, 2)), IMAGE)),
        (7, (EncodedTextChunk((1, 2)), IMAGE, EncodedTextChunk((3,)))),
        (9, INPUT.chunks),
    ],
)
def test_the_first_positions_count_those_of_an_image(
    num_positions: int, chunks: tuple[object, ...]
) -> None:
    assert INPUT.first(num_positions).chunks == chunks


def test_no_cut_is_made_within_an_image() -> None:
    for num_positions in (3, 5):
        with pytest.raises(ValueError, match="end within an image"):
            INPUT.first(num_positions)


def test_images_are_equal_where_bytes_and_tokens_are() -> None:
    assert ImageChunk(b"an image", expected_tokens=4) == IMAGE
    assert len({IMAGE, ImageChunk(b"an image", expected_tokens=4)}) == 1
    assert ImageChunk(b"another", expected_tokens=4) != IMAGE
    assert ImageChunk(b"an image", expected_tokens=5) != IMAGE
    assert EncodedTextChunk((1,)) != IMAGE


@pytest.mark.parametrize(
    ("given", "kept"),
    [
        (torch.bfloat16, "float32"),
        (torch.float16, "float32"),
        (torch.float32, "float32"),
        (torch.float64, "float64"),
        (torch.int16, "int16"),
        (torch.int64, "int64"),
    ],
)
def test_a_tensor_keeps_its_format_where_numpy_has_it(given: torch.dtype, kept: str) -> None:
    found = TensorData(torch.tensor([1, 2, 3]).to(given))
    assert str(found.dtype) == kept and found.tolist() == [1, 2, 3]


def test_a_position_is_trained_where_any_of_its_targets_has_a_weight_of_either_sign() -> None:
    weights = torch.tensor([[[0.0, 0.0], [-1.0, 0.0], [0.0, 2.0], [-1.0, -3.0]]])
    tokens = torch.ones(1, 4, dtype=torch.int64)
    batch = Batch(tokens, tokens[..., None].expand(1, 4, 2), weights, None, ((0, 0, 4),))
    assert batch.trained_positions.tolist() == [1, 2, 3] and batch.weight == 7.0
