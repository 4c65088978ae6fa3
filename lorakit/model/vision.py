"""What a vision tower needs of processes that share work: each must run it, whether or not its
own batch has an image.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakit.model.load import base_of
from lorakit.model.partition import is_partitioned
from lorakit.types import Batch, Images


def with_blank_image(model: Any, batch: Batch) -> Batch:
    """Return ``batch`` with an image in it, where the tower has adapters or is partitioned: one
    more column, of weight 0.

    A process that did not run the tower would leave the others waiting, for a part of it or for its
    gradients. And gradients must come in one order everywhere, for ZeRO adds up those that come
    together: so the blank image goes the way of any other. It comes after every token, which
    therefore does not see it; the loss is the same, and gradients are there and zero.
    """
    if batch.images is not None or batch.position_range is not None or not is_tower_needed(model):
        return batch
    config, device = base_of(model).config, batch.input_ids.device
    num_rows, length = batch.input_ids.shape

    def widen(tensor: torch.Tensor) -> torch.Tensor:
        return F.pad(tensor, (*(0, 0) * (tensor.ndim - 2), 0, 1))

    input_ids = widen(batch.input_ids)
    input_ids[0, length] = config.image_token_id
    if batch.position_ids is None:
        positions = torch.arange(length + 1, device=device).expand(4, num_rows, length + 1)
    else:  # of packed rows: it begins a document of its own, as padding does
        positions = F.pad(batch.position_ids, (0, 1)).expand(4, num_rows, length + 1)
    wide = replace(
        batch,
        input_ids=input_ids,
        targets=widen(batch.targets),
        weights=widen(batch.weights),
        position_ids=positions,
        images=_blank(config.vision_config, device),
        spans=batch.spans or ((0, length, length + 1),),
    )
    row, place = batch.trained_positions // length, batch.trained_positions % length
    wide.__dict__.update(weight=batch.weight, trained_positions=row * (length + 1) + place)
    return wide


def is_tower_needed(model: Any) -> bool:
    """Whether every batch must run the tower, because it has adapters or is partitioned."""
    tower = find_tower(model)
    return tower is not None and any(
        p.requires_grad or is_partitioned(p) for p in tower.parameters()
    )


def find_tower(model: Any) -> nn.Module | None:
    """The vision tower of a model of Qwen's kind, or None."""
    tower = getattr(getattr(base_of(model), "model", None), "visual", None)
    return tower if isinstance(tower, nn.Module) else None


def _blank(config: Any, device: torch.device) -> Images:
    """An image that takes one position."""
    merge = config.spatial_merge_size
    width = config.in_channels * config.temporal_patch_size * config.patch_size**2
    return Images(
        torch.zeros((merge**2, width), device=device),
        torch.tensor([[1, merge, merge]], device=device),
    )
