"""Log-probabilities of the target tokens, for the positions that have a weight and no others."""

from __future__ import annotations

from typing import Any

import torch

from lorakit.types import Batch


def target_logprobs(model: Any, batch: Batch) -> torch.Tensor:
    """Return log p(target | what stands before it) for each position, (B, L) float32, with graph; 0 where the weight is 0.

    The unembedding runs only at positions where some row has a weight. No attention mask and no cache are given, and position
    ids only for packed rows: this is what isolates packed documents from one another in transformers.
    """
    trained_BL = batch.weights != 0
    positions_K = trained_BL.any(dim=0).nonzero().squeeze(1)
    if len(positions_K) == 0:
        positions_K = positions_K.new_zeros(1)
    options = {} if batch.position_ids is None else {"position_ids": batch.position_ids}
    logits_BKV = model(input_ids=batch.input_ids, logits_to_keep=positions_K, use_cache=False, **options).logits
    chosen_BK = trained_BL[:, positions_K]
    targets_N = batch.targets[:, positions_K][chosen_BK]
    losses_N = torch.nn.functional.cross_entropy(logits_BKV[chosen_BK].float(), targets_N, reduction="none")
    logprobs_BL = losses_N.new_zeros(batch.weights.shape)
    return logprobs_BL.index_put(trained_BL.nonzero(as_tuple=True), -losses_N)
