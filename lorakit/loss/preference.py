"""Preference losses: of a batch of pairs, for `lorakit train`, and of Datums, for
``forward_backward_custom``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn import functional as F

from lorakit.errors import ConfigError, DataError
from lorakit.loss.inputs import takes
from lorakit.types import Batch, LossOutput

REFERENCE = "reference_logprobs"  # in a batch's extras


@takes("weights", pairs=True, reference=True)
def dpo_pairs(
    logprobs: torch.Tensor, batch: Batch, *, beta: float = 0.1, label_smoothing: float = 0.0
) -> LossOutput:
    """Return DPO's loss, summed over the pairs of ``batch``; its reference is the base, with the
    adapter switched off.

    With d the weighted sum of log-probabilities less that of the reference, and m = beta *
    (d_chosen - d_rejected), it is ``-log sigmoid(m)`` (Rafailov et al. 2023, arXiv 2305.18290,
    equation 7). The metrics are sums over pairs, too: TRL's names.

    Args:
        beta: how strongly the policy is held to the reference.
        label_smoothing: probability that a preference is the wrong way round (Mitchell 2023,
            "cDPO"); below 0.5.
    """
    if not 0 <= label_smoothing < 0.5 or beta <= 0:
        raise ConfigError(
            f"loss.beta={beta} must be above 0, loss.label_smoothing={label_smoothing} from 0 to"
            " below 0.5"
        )
    distances = logprobs.new_zeros(2 * batch.num_pairs + 1)  # the last one is the padding's
    if batch.num_pairs:
        terms, spans = batch.weights * (logprobs - batch.extras[REFERENCE]), batch.span_ids
    else:
        terms, spans = batch.weights * logprobs, torch.zeros_like(batch.input_ids)
    distances = distances.index_add(0, spans.flatten(), terms.flatten())[:-1]
    chosen, rejected = beta * distances[0::2], beta * distances[1::2]
    margins = chosen - rejected
    right, wrong = F.logsigmoid(margins), F.logsigmoid(-margins)
    losses = -(1 - label_smoothing) * right - label_smoothing * wrong
    metrics = {
        "rewards/chosen": chosen.detach().sum(),
        "rewards/rejected": rejected.detach().sum(),
        "rewards/margins": margins.detach().sum(),
        "rewards/accuracies": (margins > 0).float().sum(),
    }
    return LossOutput(losses.sum() + 0.0 * terms.sum(), logprobs.detach(), metrics)


CustomLoss = Callable[
    [Sequence[Any], Sequence[torch.Tensor]], tuple[torch.Tensor, dict[str, float]]
]


def dpo(reference_logprobs: Sequence[Any], *, beta: float = 0.1) -> CustomLoss:
    """Return DPO's loss over pairs: data[0] is chosen over data[1], data[2] over data[3], and so
    on.

    With d the weighted sum of log-probabilities less that of the reference, the loss is the mean
    over pairs of ``-log sigmoid(beta * (d_chosen - d_rejected))`` (Rafailov et al. 2023, arXiv
    2305.18290, equation 7).

    Args:
        reference_logprobs: for each Datum, the log-probability of each target under the reference,
            as ``forward`` gives them.
        beta: how strongly the policy is held to the reference.
    """

    def loss(
        data: Sequence[Any], logprobs: Sequence[torch.Tensor]
    ) -> tuple[torch.Tensor, dict[str, float]]:
        if not data or len(data) % 2 or len(data) != len(reference_logprobs):
            raise DataError(
                f"dpo needs pairs of chosen and rejected: {len(data)} Datums,"
                f" {len(reference_logprobs)} reference_logprobs"
            )
        distances = []
        for number, (datum, ours, theirs) in enumerate(
            zip(data, logprobs, reference_logprobs, strict=True)
        ):
            if "weights" not in datum.loss_fn_inputs:
                raise DataError(
                    f"data[{number}].loss_fn_inputs['weights'] is missing, which dpo sums by"
                )
            weights = datum.loss_fn_inputs["weights"].to_torch().to(ours)
            theirs = theirs.tolist() if hasattr(theirs, "tolist") else theirs
            reference = torch.as_tensor(theirs).to(ours)
            if not weights.shape == reference.shape == ours.shape:
                raise DataError(
                    f"reference_logprobs[{number}] has shape {tuple(reference.shape)},"
                    f" log-probabilities {tuple(ours.shape)}, weights {tuple(weights.shape)}"
                )
            distances.append((weights * (ours - reference)).sum())
        chosen, rejected = torch.stack(distances[0::2]), torch.stack(distances[1::2])
        margins = beta * (chosen - rejected)
        metrics = {
            "accuracy:mean": float((margins > 0).float().mean()),
            "margin:mean": float(margins.detach().mean()),
        }
        return -F.logsigmoid(margins).mean(), metrics

    return loss
