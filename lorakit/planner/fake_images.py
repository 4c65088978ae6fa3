"""Images in a step without values: which positions they take, and how large each is, must be known
without reading a tensor.

transformers' towers compute what depends on sizes in a few functions that take their answer as an
argument where it is given (`transformers.vision_utils`); the sizes themselves are given as NumPy
arrays, which have values.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lorakit.model.vision import find_tower
from lorakit.types import Images

aten = torch.ops.aten


@dataclass(frozen=True)
class SampleShapes:
    """How large a set's rows are at most."""

    longest: int | None = None  # positions of an example, where that is known
    largest_image: int = 0  # positions of an image; 0: there are none
    image_share: float = 1.0  # of an example's positions
    count: int | None = None  # of examples, where that is known

    def images_in(self, num_rows: int, num_positions: int) -> tuple[int, ...]:
        """Return the positions of each image of the micro-batch that is fullest of images."""
        if not self.largest_image:
            return ()
        each = min(self.largest_image, num_positions)
        whole, rest = divmod(
            max(each, min(num_positions, math.ceil(self.image_share * num_positions))), each
        )
        return (*(each,) * whole, *((rest,) if rest else ())) * num_rows


_NO_CHECK = "TRANSFORMERS_DISABLE_TORCH_CHECK"  # of the number of placeholders, which is a value


def images_without_values(vision_config: Any, image_tokens: tuple[int, ...]) -> Images:
    """Return images of these sizes in tokens, one token high, where tensors have no values."""
    merge = vision_config.spatial_merge_size
    channels = getattr(vision_config, "in_channels", None) or vision_config.in_chans
    width = channels * vision_config.temporal_patch_size * vision_config.patch_size**2
    grids: Any = np.array([[1, merge, merge * count] for count in image_tokens])
    return Images(torch.zeros(sum(image_tokens) * merge**2, width), grids)


@contextlib.contextmanager
def sizes_known(model: Any, mode: Any) -> Iterator[None]:
    """Give the tower of ``model`` what it would read from the sizes of its images."""
    tower = find_tower(model)
    if tower is None:
        yield
        return

    def add_sizes(
        module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        grids = kwargs["grid_thw"]
        ends = np.cumsum(np.prod(grids, axis=1))
        num_patches = int(ends[-1])
        with mode:
            given = {
                "cu_seqlens": np.concatenate([[0], ends]),
                "position_ids": torch.zeros(num_patches, 2, dtype=torch.long),
                "interp_indices": torch.zeros(num_patches, 4, dtype=torch.long),
                "interp_weights": torch.zeros(num_patches, 4),
            }
        return args, kwargs | given

    before = os.environ.get(_NO_CHECK)
    os.environ[_NO_CHECK] = "1"
    handle = tower.register_forward_pre_hook(add_sizes, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
        os.environ.pop(_NO_CHECK) if before is None else os.environ.update({_NO_CHECK: before})


def pick_of_images(func: Any, args: tuple[Any, ...], num_positions: int) -> torch.Tensor | None:
    """What indexing by the mask of the images' positions gives, of which ``num_positions`` are
    True; None for anything else.
    """
    if func not in (
        aten.index.Tensor,
        aten.index_put_.default,
        aten.index_put.default,
        aten._index_put_impl_.default,
    ):
        return None
    tensor: torch.Tensor = args[0]
    indices = args[1]
    if len(indices) == 0 or indices[0] is None or indices[0].dtype != torch.bool:
        return None
    if func is not aten.index.Tensor:
        return tensor.clone() if func is aten.index_put.default else tensor
    return tensor.new_empty((num_positions, *tensor.shape[indices[0].dim() :]))
