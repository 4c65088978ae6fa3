"""A caller's own loss of whole distributions, a few positions at a time: the (positions,
vocabulary) matrix is never held.

Each chunk's log-probabilities are made, given to the function, and its gradient taken to the hidden
states at once; what follows in the backward pass is that of the hidden states.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

from lorakit.errors import DataError
from lorakit.loss.head import Head
from lorakit.model.partition import whole
from lorakit.types import LossOutput

# (Datum's number, first position, logprobs (n, V)) -> scalar
VocabularyLoss = Callable[[int, int, torch.Tensor], torch.Tensor]
CHUNK_POSITIONS = 256


@dataclass(frozen=True)
class _Call:
    head: Head
    function: VocabularyLoss
    spans: Sequence[tuple[int, int]]  # of each Datum, among all positions
    targets_T: torch.Tensor
    found_T: torch.Tensor  # log-probability of each target: written here


def vocabulary_loss(
    hidden_BLH: torch.Tensor,
    head: Head,
    spans: Sequence[tuple[int, int, int]],
    targets_BL: torch.Tensor,
    function: VocabularyLoss,
) -> LossOutput:
    """Return the sum of what ``function`` returns for each chunk of each Datum, and the
    log-probabilities of the targets.

    Raises:
        DataError: ``function`` returns anything but a scalar that depends on what it was given.
    """
    length, found = hidden_BLH.shape[1], torch.zeros(targets_BL.shape, device=hidden_BLH.device)
    places = [(row * length + start, row * length + end) for row, start, end in spans]
    call = _Call(head, function, places, targets_BL.flatten(), found.view(-1))
    factors = [factor for adapter in head.adapters for factor in (adapter.A_RH, adapter.B_VR)]
    total: Callable[..., torch.Tensor] = _VocabularyFunction.apply
    return LossOutput(total(call, hidden_BLH.flatten(0, 1), *factors), found)


class _VocabularyFunction(torch.autograd.Function):
    """``apply(call, hidden_TH, *factors)`` -> the sum. The gradients are found on the way in,
    and scaled on the way back.
    """

    @staticmethod
    def forward(
        ctx: Any, call: _Call, hidden_TH: torch.Tensor, *factors: torch.Tensor
    ) -> torch.Tensor:
        total = hidden_TH.new_zeros((), dtype=torch.float32)
        grads = [torch.zeros_like(tensor, dtype=torch.float32) for tensor in (hidden_TH, *factors)]
        with torch.autocast(hidden_TH.device.type, enabled=False), whole(call.head.frozen):
            for number, (start, end) in enumerate(call.spans):
                for first in range(start, end, CHUNK_POSITIONS):
                    rows = slice(first, min(first + CHUNK_POSITIONS, end))
                    total += _add_chunk_(
                        call, number, first - start, rows, hidden_TH, factors, grads
                    )
        ctx.save_for_backward(*grads)
        ctx.dtypes = [tensor.dtype for tensor in (hidden_TH, *factors)]
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        return (
            None,
            *(
                (grad * found).to(dtype)
                for found, dtype in zip(ctx.saved_tensors, ctx.dtypes, strict=True)
            ),
        )


def _add_chunk_(
    call: _Call,
    number: int,
    first: int,
    rows: slice,
    hidden_TH: torch.Tensor,
    factors: Sequence[torch.Tensor],
    grads: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Add a chunk's gradients to ``grads``, and return its loss."""
    with torch.enable_grad():
        leaves = [
            hidden_TH[rows].detach().requires_grad_(),
            *(factor.detach().requires_grad_() for factor in factors),
        ]
        logprobs_nV = _logits(call.head, leaves, rows).log_softmax(dim=-1)
        value = call.function(number, first, logprobs_nV)
        if not isinstance(value, torch.Tensor) or value.numel() != 1 or not value.requires_grad:
            raise DataError(
                "a loss of the vocabulary must return a scalar tensor that depends on the"
                " log-probabilities"
            )
        found = torch.autograd.grad(value.sum(), leaves, allow_unused=True)
    call.found_T[rows] = logprobs_nV.detach().gather(1, call.targets_T[rows, None])[:, 0]
    for total, gradient in zip((grads[0][rows], *grads[1:]), found, strict=True):
        if gradient is not None:
            total.add_(gradient)
    return value.detach().sum()


def _logits(head: Head, leaves: Sequence[torch.Tensor], rows: slice) -> torch.Tensor:
    """The logits of a chunk, (n, V) float32, with graph to ``leaves``: hidden states, and A and
    B of each adapter.
    """
    dtype, hidden = head.weight_VH.dtype, leaves[0].to(head.weight_VH.dtype)
    logits = hidden @ head.weight_VH.mT
    for adapter, a_RH, b_VR in zip(head.adapters, leaves[1::2], leaves[2::2], strict=True):
        narrow = hidden @ a_RH.to(dtype).mT * adapter.scale
        narrow = narrow if adapter.gate_NR is None else narrow * adapter.gate_NR[rows].to(dtype)
        logits = logits + narrow @ b_VR.to(dtype).mT
    logits = (logits if head.bias_V is None else logits + head.bias_V).float() * head.multiplier
    return head.softcap * torch.tanh(logits / head.softcap) if head.softcap else logits
