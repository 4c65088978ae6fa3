"""Datums to a Batch of tensors. Nothing else in lorakit pads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorakit.data.images import EncodedImage, ImageEncoder
from lorakit.errors import ConfigError
from lorakit.types import Batch, Datum, Images, ModelInput

if TYPE_CHECKING:
    import torch


def collate(
    rows: Sequence[Sequence[Datum]],
    pad_token_id: int,
    images: ImageEncoder | None = None,
    *,
    are_pairs: bool = False,
) -> Batch:
    """Return the Batch of ``rows``, each a list of Datums laid end to end and padded on the right.

    Raises:
        DataError: an image cannot be decoded, or takes another number of positions than its chunk
            says.

    Args:
        are_pairs: each two Datums are a pair, the better answer first.

    Padding has weight 0 and can change nothing: attention is causal, so no token sees what is
    to its right. Rows with several Datums get ``position_ids`` that restart with each; the padding
    counts as a document of its own.
    """
    import torch

    length = max(sum(len(datum) for datum in row) for row in rows)
    shape = (len(rows), length)
    kinds = {tuple(sorted(datum.loss_fn_inputs)) for row in rows for datum in row}
    if len(kinds) > 1:
        raise ValueError(f"the Datums of a batch have different loss_fn_inputs: {sorted(kinds)}")
    names = [name for name in rows[0][0].loss_fn_inputs if name not in ("target_tokens", "weights")]
    # Several targets per position: a Datum with fewer than another has further ones of weight 0.
    widths = {datum.targets.shape[1:] for row in rows for datum in row}
    target_shape = (*shape, *max(widths))
    inputs = np.full(shape, pad_token_id, np.int64)
    targets = np.full((*shape, *(max(widths) or (1,))), pad_token_id, np.int64)
    weights = np.zeros(targets.shape, np.float32)
    extras = {name: np.zeros(shape, np.float32) for name in names}
    positions = np.zeros(shape, np.int64)
    spans: list[tuple[int, int, int]] = []
    for number, row in enumerate(rows):
        start = 0
        for datum in row:
            end = start + len(datum)
            inputs[number, start:end] = (
                images.tokens(datum.model_input) if images else datum.model_input.to_ints()
            )
            for array, values in ((targets, datum.targets), (weights, datum.weights)):
                columns = values if values.ndim > 1 else values[:, None]
                array[number, start:end, : columns.shape[1]] = columns
            positions[number, start:end] = np.arange(len(datum))
            for name in names:
                extras[name][number, start:end] = datum.loss_fn_inputs[name]
            spans.append((number, start, end))
            start = end
        positions[number, start:] = np.arange(length - start)
    is_packed = len(spans) > len(rows)
    chunks = [image for row in rows for datum in row for image in datum.model_input.images]
    encoded = images.encode(chunks) if images else []
    if images and encoded:
        places = positions if is_packed else np.broadcast_to(np.arange(length), shape)
        positions = np.stack([places, *_grid_positions(rows, positions, images, encoded)])
    return Batch(
        input_ids=torch.from_numpy(inputs),
        targets=torch.from_numpy(targets.reshape(target_shape)),
        weights=torch.from_numpy(weights.reshape(target_shape)),
        position_ids=torch.from_numpy(positions) if is_packed or encoded else None,
        spans=tuple(spans),
        extras={name: torch.from_numpy(array) for name, array in extras.items()},
        images=stack_images(encoded) if encoded else None,
        num_images=(
            tuple(len(datum.model_input.images) for row in rows for datum in row) if encoded else ()
        ),
        num_pairs=len(spans) // 2 if are_pairs else 0,
        origins=tuple(datum.origin for row in rows for datum in row if datum.origin is not None),
    )


def _grid_positions(
    rows: Sequence[Sequence[Datum]],
    positions_BL: np.ndarray,
    images: ImageEncoder,
    encoded: Sequence[EncodedImage],
) -> np.ndarray:
    """Time, height and width of each position, (3, B, L), from 0 in each Datum as
    ``positions_BL``, which padding keeps.
    """
    found, rest = np.stack([positions_BL] * 3), iter(encoded)
    for number, row in enumerate(rows):
        start = 0
        for datum in row:
            own = [next(rest) for _ in datum.model_input.images]
            found[:, number, start : start + len(datum)] = images.positions(datum.model_input, own)
            start += len(datum)
    return found


def stack_images(encoded: Sequence[EncodedImage]) -> Images:
    """Return images one after the other."""
    import torch

    patches_PD = np.concatenate([image.patches_PD for image in encoded])
    return Images(torch.from_numpy(patches_PD), torch.tensor([image.grid for image in encoded]))


def join(batches: Sequence[Batch], pad_token_id: int) -> Batch:
    """Return the rows of all ``batches`` as one, without what only a loss needs: padded to the
    longest, and to the most targets.

    Rows of several Datums cannot be joined.
    """
    import torch

    if len(batches) == 1:
        return batches[0]
    assert all(batch.position_ids is None or batch.position_ids.ndim == 3 for batch in batches)
    length = max(batch.input_ids.shape[1] for batch in batches)
    width = max((batch.targets.shape[2] if batch.targets.ndim > 2 else 0) for batch in batches)

    def pad(tensor: torch.Tensor, filling: float, is_wide: bool) -> torch.Tensor:
        padding = [0, length - tensor.shape[1]]
        if is_wide:
            tensor = tensor if tensor.ndim > 2 else tensor[..., None]
            padding = [0, width - tensor.shape[2], *padding]
        return torch.nn.functional.pad(tensor, padding, value=filling)

    spans, rows = [], 0
    for batch in batches:
        spans += [(rows + row, start, end) for row, start, end in batch.spans]
        rows += len(batch.input_ids)
    shown = [batch.images for batch in batches if batch.images is not None]
    return Batch(
        input_ids=torch.cat([pad(batch.input_ids, pad_token_id, False) for batch in batches]),
        targets=torch.cat([pad(batch.targets, pad_token_id, width > 0) for batch in batches]),
        weights=torch.cat([pad(batch.weights, 0.0, width > 0) for batch in batches]),
        position_ids=(
            torch.cat([_positions_of(batch, length) for batch in batches], dim=1) if shown else None
        ),
        spans=tuple(spans),
        images=(
            Images(
                torch.cat([images.patches_PD for images in shown]),
                torch.cat([images.grids_N3 for images in shown]),
            )
            if shown
            else None
        ),
    )


def _positions_of(batch: Batch, length: int) -> torch.Tensor:
    """The positions of a batch of single Datums, (4, B, L), for rows of ``length``."""
    import torch

    counted = torch.arange(length).expand(4, len(batch.input_ids), length)
    if batch.position_ids is None:
        return counted
    return torch.cat([batch.position_ids, counted[:, :, batch.input_ids.shape[1] :]], dim=2)


def idle_batch(pad_token_id: int) -> Batch:
    """Return a batch of one position that trains nothing: a process without a batch must still
    take part in the step.
    """
    no_token = Datum(
        ModelInput.from_ints([pad_token_id]), {"target_tokens": [pad_token_id], "weights": [0.0]}
    )
    return replace(collate([[no_token]], pad_token_id), spans=())


def take_positions(batch: Batch, sp_rank: int, sp_size: int, pad_token_id: int) -> Batch:
    """Return the positions of every row that process ``sp_rank`` of ``sp_size`` holds; rows are
    padded so that all hold as many.

    Raises:
        ConfigError: the batch has images, which go to whole rows.
    """
    import torch

    if batch.images is not None:
        raise ConfigError(
            "rows with images cannot be shared by several processes; set"
            " strategy.sequence_parallel=1"
        )

    length = -(-batch.input_ids.shape[1] // sp_size)
    missing = length * sp_size - batch.input_ids.shape[1]
    here = slice(sp_rank * length, (sp_rank + 1) * length)
    positions = batch.position_ids
    if positions is None:
        positions = torch.arange(batch.input_ids.shape[1]).expand(batch.input_ids.shape)

    def cut(tensor: torch.Tensor, filling: float = 0) -> torch.Tensor:
        return torch.nn.functional.pad(tensor, (0, missing), value=filling)[:, here].contiguous()

    return replace(
        batch,
        input_ids=cut(batch.input_ids, pad_token_id),
        targets=cut(batch.targets, pad_token_id),
        weights=cut(batch.weights),
        position_ids=cut(positions),
        extras={name: cut(tensor) for name, tensor in batch.extras.items()},
        position_range=(here.start, here.stop),
    )
