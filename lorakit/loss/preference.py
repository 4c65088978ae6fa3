"""Preference losses, for ``forward_backward_custom``: functions of whole sequences' log-probabilities."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lorakit.errors import DataError

CustomLoss = Callable[[Sequence[Any], Sequence[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]]


def dpo(reference_logprobs: Sequence[Any], *, beta: float = 0.1) -> CustomLoss:
    """Return DPO's loss over pairs: data[0] is chosen over data[1], data[2] over data[3], and so on.

    With d the weighted sum of log-probabilities less that of the reference, the loss is the mean over pairs of
    ``-log sigmoid(beta * (d_chosen - d_rejected))`` (Rafailov et al. 2023, arXiv 2305.18290, equation 7).

    Args:
        reference_logprobs: for each Datum, the log-probability of each target under the reference, as ``forward`` gives them.
        beta: how strongly the policy is held to the reference.
    """

    def loss(data: Sequence[Any], logprobs: Sequence[torch.Tensor]) -> tuple[torch.Tensor, dict[str, float]]:
        if not data or len(data) % 2 or len(data) != len(reference_logprobs):
            raise DataError(
                f"dpo wants pairs of chosen and rejected: {len(data)} Datums, {len(reference_logprobs)} reference_logprobs"
            )
        distances = []
        for number, (datum, ours, theirs) in enumerate(zip(data, logprobs, reference_logprobs, strict=True)):
            if "weights" not in datum.loss_fn_inputs:
                raise DataError(f"data[{number}].loss_fn_inputs['weights'] is missing, which dpo sums by")
            weights = datum.loss_fn_inputs["weights"].to_torch().to(ours)
            reference = torch.as_tensor(theirs.tolist() if hasattr(theirs, "tolist") else theirs).to(ours)
            if not weights.shape == reference.shape == ours.shape:
                raise DataError(
                    f"reference_logprobs[{number}] has shape {tuple(reference.shape)}, log-probabilities {tuple(ours.shape)}, "
                    f"weights {tuple(weights.shape)}"
                )
            distances.append((weights * (ours - reference)).sum())
        chosen, rejected = torch.stack(distances[0::2]), torch.stack(distances[1::2])
        margins = beta * (chosen - rejected)
        metrics = {"accuracy:mean": float((margins > 0).float().mean()), "margin:mean": float(margins.detach().mean())}
        return -F.logsigmoid(margins).mean(), metrics

    return loss
