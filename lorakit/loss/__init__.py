"""Losses: pure functions (logprobs, batch, knobs by name) -> LossOutput. ``LOSSES`` is the only
list of their names.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from lorakit.loss.cross_entropy import cross_entropy
from lorakit.loss.policy import cispo, dro, gspo, importance_sampling, ppo

if TYPE_CHECKING:
    from lorakit.types import LossOutput

Loss = Callable[..., "LossOutput"]
LOSSES: dict[str, Loss] = {
    loss.__name__: loss for loss in (cross_entropy, importance_sampling, ppo, cispo, dro, gspo)
}
