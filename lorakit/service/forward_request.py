"""What one call asks of one adapter, as it is sent to every process."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lorakit.loss import LOSSES, Loss
from lorakit.loss.vocabulary import VocabularyLoss
from lorakit.service.custom import CustomLoss, as_loss
from lorakit.types import Datum


@dataclass(frozen=True)
class ForwardRequest:
    """Forward, and backward, of rows under a loss.

    It names its model and loss, so that it can be sent; the worker resolves them when it runs it.

    Args:
        data: as ``loss/inputs.py:prepare`` returns it.
        knobs: numbers of the loss.
        custom: the caller's own function and its rows, instead of ``loss_fn``; in one process
            only.
        vocabulary: the same, of whole distributions.
    """

    model_id: str
    data: Sequence[Datum]
    loss_fn: str = "cross_entropy"
    knobs: Mapping[str, float] = field(default_factory=dict)
    needs_gradient: bool = True
    custom: tuple[CustomLoss, Sequence[Datum]] | None = None
    vocabulary: VocabularyLoss | None = None

    @property
    def loss(self) -> Loss:
        """The loss with its numbers."""
        if self.custom is not None:
            return as_loss(*self.custom)
        loss = LOSSES[self.loss_fn]
        return functools.partial(loss, **self.knobs) if self.knobs else loss

    @property
    def is_whole(self) -> bool:
        """Whether all of its rows must be in one pass."""
        return self.custom is not None

    @property
    def is_alone(self) -> bool:
        """Whether nothing else goes through the base with it."""
        return self.custom is not None or self.vocabulary is not None

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.data))
