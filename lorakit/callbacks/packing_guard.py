"""Packing only where documents in one row are shown not to see one another."""

from __future__ import annotations

import logging
from typing import Any

import lightning as L
import torch

from lorakit.model.attention import attend_by_document, packed_documents
from lorakit.model.families import packing_is_doubtful
from lorakit.model.load import base_of

log = logging.getLogger("lorakit")


class PackingGuard(L.Callback):
    """Tests the loaded model before the first step: changing one packed document must leave its
    neighbour's logits alone.

    Where it does not, the run pads instead and says so. Attention goes by document where the
    model's logits stay the same.
    """

    def on_fit_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        datamodule: Any = getattr(trainer, "datamodule", None)
        if not getattr(datamodule, "is_packed", False):
            return
        reason = packing_is_doubtful(pl_module.model.config)
        if reason is None:
            if problem := attend_by_document(base_of(pl_module.model)):
                log.info(
                    "attention of packed rows makes a mask over all pairs of positions: %s", problem
                )
            leak = measure_leak(pl_module.model)
            if leak > 0.05:
                moved = "changing one document moved its neighbour's logits"
                reason = f"{moved} by {leak:.1%} of a full leak"
        if reason:
            log.warning("data.packing is off, rows are padded instead: %s", reason)
            datamodule.pad_rows()


@torch.no_grad()
def measure_leak(model: Any, length: int = 12) -> float:
    """Return how far changing the first of two packed documents moves the second's logits, as a
    share of what it would move them if both were one document (the largest difference of each).
    """
    was_training = model.training
    model.eval()
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, vocab_size, (3, length), generator=generator).to(model.device)
    first, other, second = tokens
    packed = torch.arange(length, device=model.device).repeat(1, 2)
    joined = torch.arange(2 * length, device=model.device)[None]

    def logits(start: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        input_ids = torch.cat((start, second))[None]
        spans = ((0, 0, length), (0, length, 2 * length)) if positions is packed else None
        with packed_documents(spans):  # as in training
            found = model(input_ids=input_ids, position_ids=positions, use_cache=False)
        return found.logits[0, length:].float()

    leak = (logits(first, packed) - logits(other, packed)).abs().max()
    full = (logits(first, joined) - logits(other, joined)).abs().max()
    model.train(was_training)
    return float(leak / full.clamp(min=1e-6))
