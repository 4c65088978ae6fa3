"""Tensors that are not all here: parameters that ZeRO-3 has partitioned over the processes, and
shapes without values.

DeepSpeed gathers a module's own parameters around its forward and backward. What is read elsewhere
is gathered here.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor


def is_partitioned(parameter: torch.Tensor) -> bool:
    """Whether ZeRO-3 holds ``parameter`` in parts."""
    return hasattr(parameter, "ds_id")


def full_shape(parameter: torch.Tensor) -> torch.Size:
    """The shape of ``parameter`` as the model defines it, wherever its parts are."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


def own_weight(module: torch.nn.Module) -> torch.Tensor:
    """The weight of ``module``. Not by attribute: DeepSpeed would take it for one that the whole
    model needs, and keep it gathered.
    """
    return dict(module.named_parameters(recurse=False))["weight"]


@contextlib.contextmanager
def whole(parameters: Iterable[torch.Tensor], *, changes: bool = False) -> Iterator[bool]:
    """Hold ``parameters`` whole inside the block; yield whether they are gathered for it, and gone
    after it.

    All processes must enter together. ``changes``: what the first process has written into them is
    in force after the block.
    """
    parts: list[Any] = [parameter for parameter in parameters if is_partitioned(parameter)]
    if not parts:
        yield False
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(parts, modifier_rank=0 if changes else None):
        yield True


def has_values(tensor: torch.Tensor) -> bool:
    """Whether ``tensor`` is more than a shape in a plan of the memory."""
    return not isinstance(tensor, FakeTensor)
