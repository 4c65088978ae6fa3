"""A batch in smaller ones, for a model that has no room for all of it at a time. What is trained
stays the same.
"""

from __future__ import annotations

import bisect
from dataclasses import replace
from typing import TYPE_CHECKING

from lorakit.types import Batch, Images

if TYPE_CHECKING:
    import torch


def halve_batch(batch: Batch) -> list[Batch]:
    """Return two batches with the documents of ``batch``, of about as many positions each;
    ``[batch]`` where it is one document.

    Rows are kept whole where there are several. A pair of answers stays together. Weights, window
    and sources go along, so that the halves' losses add up to the whole's.
    """
    units = _units(batch)
    if len(units) < 2 or batch.position_range is not None:
        return [batch]
    rows = sorted({spans[0][0] for spans in units})
    if len(rows) > 1:
        first_rows = rows[: (len(rows) + 1) // 2]
        cut = sum(spans[0][0] in first_rows for spans in units)
    else:
        ends = [spans[-1][2] for spans in units]
        cut = min(max(bisect.bisect_left(ends, ends[-1] / 2) + 1, 1), len(units) - 1)
    return [_some(batch, 0, cut, units), _some(batch, cut, len(units), units)]


def split_batch(batch: Batch, max_positions: int | None) -> list[Batch]:
    """Return ``batch`` halved until each piece has ``max_positions`` at most, or one document."""
    if (
        max_positions is None
        or batch.input_ids.numel() <= max_positions
        or len(halves := halve_batch(batch)) == 1
    ):
        return [batch]
    return [piece for half in halves for piece in split_batch(half, max_positions)]


def _units(batch: Batch) -> list[tuple[tuple[int, int, int], ...]]:
    """What must stay together: a document, or a pair of them; two rows where each answer of a
    pair has its own.
    """
    size = 2 if batch.num_pairs else 1
    return [batch.spans[i : i + size] for i in range(0, len(batch.spans), size)]


def _some(
    batch: Batch, first: int, last: int, units: list[tuple[tuple[int, int, int], ...]]
) -> Batch:
    """The batch of ``units[first:last]``."""
    size = len(units[0])
    spans = [span for unit in units[first:last] for span in unit]
    top, bottom = spans[0][0], spans[-1][0] + 1
    begin = min(start for _, start, _ in spans) if bottom - top == 1 else 0
    end = max(stop for _, _, stop in spans)

    def cut(tensor: torch.Tensor) -> torch.Tensor:
        return tensor[top:bottom, begin:end].contiguous()

    positions = batch.position_ids
    return replace(
        batch,
        input_ids=cut(batch.input_ids),
        targets=cut(batch.targets),
        weights=cut(batch.weights),
        position_ids=None
        if positions is None
        else positions[..., top:bottom, begin:end].contiguous(),
        spans=tuple((row - top, start - begin, stop - begin) for row, start, stop in spans),
        extras={name: cut(tensor) for name, tensor in batch.extras.items()},
        images=_images_of(batch, first * size, last * size),
        num_images=batch.num_images[first * size : last * size],
        num_pairs=len(spans) // 2 if batch.num_pairs else 0,
        origins=batch.origins[first * size : last * size],
    )


def _images_of(batch: Batch, first: int, last: int) -> Images | None:
    """The images of the documents from ``first`` to ``last``."""
    if batch.images is None:
        return None
    begin, count = sum(batch.num_images[:first]), sum(batch.num_images[first:last])
    if not count:
        return None
    sizes = batch.images.grids_N3.prod(dim=1).tolist()
    patches = slice(sum(sizes[:begin]), sum(sizes[: begin + count]))
    return Images(batch.images.patches_PD[patches], batch.images.grids_N3[begin : begin + count])
