"""Hidden states to log-probabilities of chosen tokens, in blocks: the (tokens, vocabulary) matrix is never held.

With z the logits of a token, p their softmax and t a target, log p_t = z_t - logsumexp(z), and

    d log p_t / d hidden = W_t - sum over v of p_v W_v

The sum over the vocabulary is gathered block by block beside the logsumexp, both rescaled when a larger logit comes: the online
softmax of FlashAttention (arXiv 2205.14135, section 3.1) with the unembedding in the place of the values. So the logits are computed
once, for whatever loss, and the backward only scales.

A trained unembedding needs every p_v. Where the loss is a weighted sum whose weights are known, few tokens at a time meet the whole
vocabulary and its gradient is summed while p is at hand, to be scaled in the backward; for another loss its blocks are computed twice.

Shapes: N tokens, V vocabulary, H hidden, K targets per token, R rank of an adapter of the unembedding; n, v of a block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

MAX_TOKENS = 4096  # of a block
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of float32 logits at a time
WHOLE_BLOCKS = 4  # times as much where a block holds the whole vocabulary: products of few tokens are slow


@dataclass(frozen=True)
class Head:
    """An unembedding: ``logits = cap(multiplier * (hidden W' + bias + sum of scale * hidden A' B'))``."""

    weight_VH: torch.Tensor  # frozen
    bias_V: torch.Tensor | None = None
    adapters: tuple[tuple[torch.Tensor, torch.Tensor, float], ...] = ()  # A (R, H), B (V, R), scale
    multiplier: float = 1.0
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap)


def head_logprobs(
    hidden_NH: torch.Tensor, head: Head, targets_NK: torch.Tensor, *, temperature: float = 1.0, block_bytes: int | None = None,
    weights_NK: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """Return log p(target) of each target at each token, (N, K) float32, with gradients to ``hidden_NH`` and the adapters.

    ``weights_NK``: the loss will be the sum of these times the log-probabilities, or a multiple of it. It spares a trained
    unembedding the second computation of its logits; where the loss turns out to be another one, they are computed all the same.
    """
    factors = [factor for a, b, _ in head.adapters for factor in (a, b)]
    call = _Call(head, temperature, block_bytes, torch.is_grad_enabled(), weights_NK)
    return _HeadFunction.apply(hidden_NH, targets_NK, call, *factors)


@torch.no_grad()
def best_logprobs(
    hidden_NH: torch.Tensor, head: Head, num_best: int, *, temperature: float = 1.0, block_bytes: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``num_best`` largest log-probabilities at each token and their token ids, both (N, num_best), best first."""
    call = _Call(head, temperature, block_bytes, False)
    values = hidden_NH.new_full((len(hidden_NH), num_best), float("-inf"), dtype=torch.float32)
    tokens = torch.zeros_like(values, dtype=torch.long)
    lse = hidden_NH.new_full((len(hidden_NH), 1), float("-inf"), dtype=torch.float32)
    for rows in call.row_blocks(hidden_NH):
        for first, logits in call.logit_blocks(hidden_NH[rows]):
            lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(dim=-1, keepdim=True))
            best = logits.topk(min(num_best, logits.shape[1]))
            candidates = torch.cat([values[rows], best.values], dim=1)
            kept = candidates.topk(num_best)
            values[rows] = kept.values
            tokens[rows] = torch.cat([tokens[rows], best.indices + first], dim=1).gather(1, kept.indices)
    return values - lse, tokens


@dataclass(frozen=True)
class _Call:
    head: Head
    temperature: float
    block_bytes: int | None
    keeps: bool  # whether a backward may follow
    weights_NK: torch.Tensor | None = None  # the expected gradient of the log-probabilities, but for one factor

    def row_blocks(self, hidden_NH: torch.Tensor, *, whole: bool = False) -> Iterator[slice]:
        """Yield slices over the tokens: few enough for ``logit_blocks`` to be one block with ``whole``."""
        size = max(1, min(MAX_TOKENS, self.max_whole_rows if whole else self._num_bytes() // 4096))
        for start in range(0, len(hidden_NH), size):
            yield slice(start, start + size)

    @property
    def max_whole_rows(self) -> int:
        """The number of tokens whose logits over the whole vocabulary may be held; it can be 0."""
        return WHOLE_BLOCKS * self._num_bytes() // (4 * self.head.weight_VH.shape[0])

    def logit_blocks(self, hidden_nH: torch.Tensor, *, whole: bool = False) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first token of the vocabulary, logits over temperature (n, v) float32), each to be written over."""
        vocab = self.head.weight_VH.shape[0]
        size = vocab if whole else max(1, self._num_bytes() // (4 * max(1, len(hidden_nH))))
        hidden = hidden_nH.to(self.head.weight_VH.dtype)
        narrow = [hidden @ a.to(hidden.dtype).mT for a, _, _ in self.head.adapters]
        for first in range(0, vocab, size):
            yield first, self._logits(hidden, narrow, slice(first, min(vocab, first + size)))

    def _logits(self, hidden: torch.Tensor, narrow: list[torch.Tensor], tokens: slice) -> torch.Tensor:
        head = self.head
        logits = hidden @ head.weight_VH[tokens].mT
        for inner, (_, b, scale) in zip(narrow, head.adapters, strict=True):
            logits.addmm_(inner, b[tokens].to(hidden.dtype).mT, alpha=scale)
        if head.bias_V is not None:
            logits.add_(head.bias_V[tokens])
        logits = logits.float()
        if head.multiplier != 1:
            logits.mul_(head.multiplier)
        if head.softcap:
            logits.div_(head.softcap).tanh_().mul_(head.softcap)
        return logits if self.temperature == 1 else logits.div_(self.temperature)

    def slope_(self, logits: torch.Tensor) -> torch.Tensor | float:
        """Return d logits / d product, written over ``logits`` where it is not one number."""
        constant = self.head.multiplier / self.temperature
        if not self.head.softcap:
            return constant
        return logits.mul_(self.temperature / self.head.softcap).square_().neg_().add_(1).mul_(constant)

    def add_pulled_(self, sum_nH: torch.Tensor, grad_nv: torch.Tensor, first: int) -> None:
        """Add to ``sum_nH`` the gradient of a block's products as one of its hidden states."""
        head, tokens = self.head, slice(first, first + grad_nv.shape[1])
        grad = grad_nv.to(head.weight_VH.dtype)
        _add_product_(sum_nH, grad, head.weight_VH[tokens], 1.0)
        for a, b, scale in head.adapters:
            _add_product_(sum_nH, grad @ b[tokens].to(grad.dtype), a.to(grad.dtype), scale)

    def rows_of(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Return the rows of the whole unembedding for some tokens, (N, H)."""
        rows = self.head.weight_VH[tokens_N]
        for a, b, scale in self.head.adapters:
            rows = rows.addmm(b[tokens_N].to(rows.dtype), a.to(rows.dtype), alpha=scale)
        return rows

    def _num_bytes(self) -> int:
        return self.block_bytes or BLOCK_BYTES.get(self.head.weight_VH.device.type, BLOCK_BYTES["cuda"])


class _HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, targets_NK: torch.Tensor, call: _Call, *factors: torch.Tensor
    ) -> torch.Tensor:
        wants_hidden = call.keeps and ctx.needs_input_grad[0]
        logprobs = hidden_NH.new_zeros(targets_NK.shape, dtype=torch.float32)
        lse = hidden_NH.new_zeros((len(hidden_NH), 1), dtype=torch.float32)
        mean_NH = torch.empty_like(hidden_NH) if wants_hidden else None
        slope_NK = torch.empty_like(logprobs) if wants_hidden and call.head.softcap else None
        is_summed = wants_hidden and any(ctx.needs_input_grad[3:]) and call.weights_NK is not None and call.max_whole_rows > 0
        sums = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors] if is_summed else []
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for rows in call.row_blocks(hidden_NH, whole=is_summed):
                found = _scan(call, hidden_NH[rows], targets_NK[rows], wants_hidden, whole=is_summed)
                logprobs[rows], lse[rows] = found.logits_nK - found.lse_n1, found.lse_n1
                if mean_NH is not None and found.mean_nH is not None:
                    mean_NH[rows] = found.mean_nH
                slope_nK = call.slope_(found.logits_nK)
                if slope_NK is not None:
                    slope_NK[rows] = torch.as_tensor(slope_nK)
                if call.weights_NK is not None and is_summed:
                    weights_nK = call.weights_NK[rows].float()
                    grad = found.pulling_nv.mul_(weights_nK.sum(dim=1, keepdim=True).neg_() / found.total_n1)
                    grad.scatter_add_(1, targets_NK[rows], weights_nK * slope_nK)
                    _add_factor_gradients_(sums, call, hidden_NH[rows], [(0, grad)])
        ctx.call = call
        ctx.num_factors = len(factors)
        if call.keeps:
            ctx.save_for_backward(hidden_NH, targets_NK, mean_NH, slope_NK, lse, *factors, *sums)
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, targets_NK, mean_NH, slope_NK, lse, *rest = ctx.saved_tensors
        factors, sums = rest[: ctx.num_factors], rest[ctx.num_factors :]
        call: _Call = ctx.call
        grad_hidden = None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            if mean_NH is not None:
                constant = call.head.multiplier / call.temperature
                weights_NK = grad_NK * (constant if slope_NK is None else slope_NK)
                grad_hidden = mean_NH * -grad_NK.sum(dim=1, keepdim=True).to(mean_NH.dtype)
                for choice in range(targets_NK.shape[1]):
                    rows = call.rows_of(targets_NK[:, choice])
                    grad_hidden.addcmul_(rows, weights_NK[:, choice, None].to(rows.dtype))
            wants = ctx.needs_input_grad[3:]
            grads: list[Any] = [None] * len(wants)
            multiple = _multiple_of(call.weights_NK, grad_NK) if sums else None
            if multiple is not None:
                grads = [(total * multiple).to(factor.dtype) for total, factor in zip(sums, factors, strict=True)]
            elif any(wants):
                grads = _factor_gradients(call, hidden_NH, targets_NK, grad_NK, lse, factors, whole=bool(sums))
        return (grad_hidden, None, None, *(grad if want else None for grad, want in zip(grads, wants, strict=True)))


@dataclass
class _Scanned:
    lse_n1: torch.Tensor
    total_n1: torch.Tensor  # sum of exp(logit - largest)
    logits_nK: torch.Tensor  # of the targets
    mean_nH: torch.Tensor | None  # sum over the vocabulary of p times the unembedding's rows
    pulling_nv: torch.Tensor  # of the last block: exp(logit - largest), times d logits / d product where there is a mean


def _scan(call: _Call, hidden: torch.Tensor, targets: torch.Tensor, wants_mean: bool, *, whole: bool = False) -> _Scanned:
    """Go over the vocabulary once, keeping sums relative to the largest logit so far."""
    top = hidden.new_full((len(hidden), 1), float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(top)
    picked = hidden.new_zeros(targets.shape, dtype=torch.float32)
    mean = torch.zeros_like(hidden, dtype=torch.float32) if wants_mean else None
    weights = total
    for first, logits in call.logit_blocks(hidden, whole=whole):
        _pick_(picked, logits, targets, first)
        new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
        shrink = (top - new_top).exp_()
        top = new_top
        weights = (logits - top).exp_() if call.head.softcap and mean is not None else logits.sub_(top).exp_()
        total.mul_(shrink).add_(weights.sum(dim=-1, keepdim=True))
        if mean is not None:
            call.add_pulled_(mean.mul_(shrink), weights.mul_(call.slope_(logits)), first)
    return _Scanned(top + total.log(), total, picked, None if mean is None else mean.div_(total), weights)


def _pick_(picked_nK: torch.Tensor, logits_nv: torch.Tensor, targets_nK: torch.Tensor, first: int) -> None:
    """Copy the logits of those targets that lie in this block."""
    inside = (targets_nK >= first) & (targets_nK < first + logits_nv.shape[1])
    local = (targets_nK - first).clamp(0, logits_nv.shape[1] - 1)
    picked_nK.copy_(torch.where(inside, logits_nv.gather(1, local), picked_nK))


def _multiple_of(weights_NK: torch.Tensor | None, grad_NK: torch.Tensor) -> float | None:
    """Return the number that ``grad_NK`` is ``weights_NK`` times, or None where it is no multiple. On a GPU it waits for both."""
    if weights_NK is None or not weights_NK.numel():
        return None
    weights = weights_NK.to(grad_NK.dtype)
    multiple = (grad_NK * weights).sum() / weights.square().sum()
    is_multiple = (grad_NK - multiple * weights).abs().max() <= 1e-6 * grad_NK.abs().max()
    return float(multiple) if bool(is_multiple) else None


def _factor_gradients(
    call: _Call, hidden_NH: torch.Tensor, targets_NK: torch.Tensor, grad_NK: torch.Tensor, lse: torch.Tensor,
    factors: list[torch.Tensor], *, whole: bool,
) -> list[torch.Tensor]:  # fmt: skip
    """Compute each block once more, for the gradients of the unembedding's adapters.

    In the blocks of the forward: a product in another shape rounds otherwise, and logits that differ from those in ``lse`` give
    probabilities whose sum is not 1.
    """
    sums = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors]
    for rows in call.row_blocks(hidden_NH, whole=whole):
        blocks = _gradient_blocks(call, hidden_NH[rows], targets_NK[rows], grad_NK[rows], lse[rows], whole=whole)
        _add_factor_gradients_(sums, call, hidden_NH[rows], blocks)
    return [total.to(factor.dtype) for total, factor in zip(sums, factors, strict=True)]


def _gradient_blocks(
    call: _Call, hidden: torch.Tensor, targets: torch.Tensor, grad: torch.Tensor, lse: torch.Tensor, *, whole: bool
) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield (first token of the vocabulary, gradient of the products (n, v) float32)."""
    for first, logits in call.logit_blocks(hidden, whole=whole):
        grad_logits = (logits - lse).exp_().mul_(-grad.sum(dim=1, keepdim=True))
        inside = (targets >= first) & (targets < first + logits.shape[1])
        local = (targets - first).clamp(0, logits.shape[1] - 1)
        grad_logits.scatter_add_(1, local, grad * inside)
        yield first, grad_logits.mul_(call.slope_(logits))


def _add_factor_gradients_(
    sums: list[torch.Tensor], call: _Call, hidden: torch.Tensor, blocks: Iterable[tuple[int, torch.Tensor]]
) -> None:
    """Add to ``sums`` (A, B, A, B, ... float32) what the tokens of ``hidden`` give, by the gradients of their products."""
    adapters = call.head.adapters
    hidden = hidden.to(call.head.weight_VH.dtype)
    narrow = [hidden @ a.to(hidden.dtype).mT for a, _, _ in adapters]
    pulled = [torch.zeros_like(inner, dtype=torch.float32) for inner in narrow]
    for first, block in blocks:
        grad_products = block.to(hidden.dtype)
        tokens = slice(first, first + grad_products.shape[1])
        for number, (_, b, scale) in enumerate(adapters):
            _add_product_(pulled[number], grad_products, b[tokens].to(hidden.dtype), scale)
            _add_product_(sums[2 * number + 1][tokens], grad_products.mT, narrow[number], scale)
    for number, total in enumerate(pulled):
        _add_product_(sums[2 * number], total.to(hidden.dtype).mT, hidden, 1.0)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add ``scale * a @ b`` to the float32 ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(a @ b, alpha=scale)
