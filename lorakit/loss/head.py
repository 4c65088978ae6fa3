"""Hidden states to log-probabilities of chosen tokens, in chunks: the (tokens, vocabulary) matrix is never held.

With z the logits of a token, p their softmax and t a target, log p_t = z_t - logsumexp(z), and

    d log p_t / d hidden = W_t - sum over v of p_v W_v

The sum over the vocabulary is formed in the forward pass, while the chunk's logits are at hand (Wijmans et al., "Cut Your Losses",
arXiv 2411.09009, section 4, forms it from recomputed logits instead), so that the backward only scales it: the logits are
computed once, for whatever loss. A trained unembedding needs every p_v again; its chunks are computed a second time.

Shapes: N tokens, V vocabulary, H hidden, K targets per token, R rank of an adapter of the unembedding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.function import once_differentiable

# Of float32 logits at a time. Small chunks stay near the processor; a GPU wants large products.
CHUNK_BYTES = {"cpu": 32 << 20, "cuda": 512 << 20}


@dataclass(frozen=True)
class Head:
    """An unembedding: ``logits = cap(multiplier * (hidden W' + bias + sum of scale * hidden A' B'))``."""

    weight_VH: torch.Tensor  # frozen
    bias_V: torch.Tensor | None = None
    adapters: tuple[tuple[torch.Tensor, torch.Tensor, float], ...] = ()  # A (R, H), B (V, R), scale
    multiplier: float = 1.0
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap)


def head_logprobs(
    hidden_NH: torch.Tensor, head: Head, targets_NK: torch.Tensor, *, temperature: float = 1.0, chunk_tokens: int | None = None
) -> torch.Tensor:
    """Return log p(target) of each target at each token, (N, K) float32, with gradients to ``hidden_NH`` and the adapters."""
    factors = [factor for a, b, _ in head.adapters for factor in (a, b)]
    call = _Call(head, temperature, chunk_tokens, torch.is_grad_enabled())
    return _HeadFunction.apply(hidden_NH, targets_NK, call, *factors)


@torch.no_grad()
def best_logprobs(
    hidden_NH: torch.Tensor, head: Head, num_best: int, *, temperature: float = 1.0, chunk_tokens: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``num_best`` largest log-probabilities at each token and their token ids, both (N, num_best), best first."""
    call = _Call(head, temperature, chunk_tokens, False)
    found = [_log_softmax(call.logits(chunk)).topk(num_best) for chunk in call.chunks(hidden_NH)]
    if not found:
        return hidden_NH.new_zeros((0, num_best), dtype=torch.float32), hidden_NH.new_zeros((0, num_best), dtype=torch.long)
    return torch.cat([best.values for best in found]), torch.cat([best.indices for best in found])


@dataclass(frozen=True)
class _Call:
    head: Head
    temperature: float
    chunk_tokens: int | None
    keeps: bool  # whether a backward may follow

    def chunks(self, *tensors: torch.Tensor) -> Iterator[Any]:
        """Yield matching pieces of ``tensors``."""
        rows_at_once = self.chunk_tokens or self._default_chunk()
        for pieces in zip(*(tensor.split(rows_at_once) for tensor in tensors), strict=True):
            if len(pieces[0]):
                yield pieces if len(pieces) > 1 else pieces[0]

    def _default_chunk(self) -> int:
        weight = self.head.weight_VH
        return max(16, CHUNK_BYTES.get(weight.device.type, CHUNK_BYTES["cuda"]) // (4 * weight.shape[0]))

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Return the logits of a chunk over temperature, (n, V) float32: a tensor of its own, to be written over."""
        head = self.head
        hidden = hidden.to(head.weight_VH.dtype)
        logits = hidden @ head.weight_VH.mT
        for a, b, scale in head.adapters:
            logits.addmm_(hidden @ a.to(hidden.dtype).mT, b.to(hidden.dtype).mT, alpha=scale)
        if head.bias_V is not None:
            logits.add_(head.bias_V)
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

    def pull(self, grad_nV: torch.Tensor) -> torch.Tensor:
        """Return the gradient of a chunk's products as one of its hidden states, (n, H)."""
        head = self.head
        grad = grad_nV.to(head.weight_VH.dtype)
        pulled = grad @ head.weight_VH
        for a, b, scale in head.adapters:
            pulled.addmm_(grad @ b.to(grad.dtype), a.to(grad.dtype), alpha=scale)
        return pulled

    def rows(self, tokens_N: torch.Tensor) -> torch.Tensor:
        """Return the rows of the whole unembedding for some tokens, (N, H)."""
        rows = self.head.weight_VH[tokens_N]
        for a, b, scale in self.head.adapters:
            rows = rows.addmm(b[tokens_N].to(rows.dtype), a.to(rows.dtype), alpha=scale)
        return rows


class _HeadFunction(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden_NH: torch.Tensor, targets_NK: torch.Tensor, call: _Call, *factors: torch.Tensor
    ) -> torch.Tensor:
        wants_hidden = call.keeps and ctx.needs_input_grad[0]
        logprobs, means, slopes = [], [], []
        with torch.autocast(hidden_NH.device.type, enabled=False):
            for hidden, targets in call.chunks(hidden_NH, targets_NK):
                logits = call.logits(hidden)
                lse = logits.logsumexp(dim=-1, keepdim=True)
                logprobs.append(logits.gather(1, targets) - lse)
                if wants_hidden:
                    softmax = (logits - lse).exp_() if call.head.softcap else logits.sub_(lse).exp_()
                    slope = call.slope_(logits)
                    if isinstance(slope, torch.Tensor):
                        slopes.append(slope.gather(1, targets))
                    means.append(call.pull(softmax.mul_(slope)).to(hidden_NH.dtype))
        ctx.call = call
        if call.keeps:
            mean_NH = torch.cat(means) if means else None
            slope_NK = torch.cat(slopes) if slopes else None
            ctx.save_for_backward(hidden_NH, targets_NK, mean_NH, slope_NK, *factors)
        return torch.cat(logprobs) if logprobs else hidden_NH.new_zeros(targets_NK.shape, dtype=torch.float32)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden_NH, targets_NK, mean_NH, slope_NK, *factors = ctx.saved_tensors
        call: _Call = ctx.call
        grad_hidden = None
        with torch.autocast(hidden_NH.device.type, enabled=False):
            if mean_NH is not None:
                constant = call.head.multiplier / call.temperature
                weights_NK = grad_NK * (constant if slope_NK is None else slope_NK)
                grad_hidden = mean_NH * -grad_NK.sum(dim=1, keepdim=True).to(mean_NH.dtype)
                for choice in range(targets_NK.shape[1]):
                    rows = call.rows(targets_NK[:, choice])
                    grad_hidden.addcmul_(rows, weights_NK[:, choice, None].to(rows.dtype))
            wants = ctx.needs_input_grad[3:]
            grads = _factor_gradients(call, hidden_NH, targets_NK, grad_NK, factors) if any(wants) else [None] * len(wants)
        return (grad_hidden, None, None, *(grad if want else None for grad, want in zip(grads, wants, strict=True)))


def _factor_gradients(
    call: _Call, hidden_NH: torch.Tensor, targets_NK: torch.Tensor, grad_NK: torch.Tensor, factors: list[torch.Tensor]
) -> list[torch.Tensor]:
    """Compute each chunk once more, for the gradients of the unembedding's adapters."""
    sums = [torch.zeros_like(factor, dtype=torch.float32) for factor in factors]
    for hidden, targets, grad in call.chunks(hidden_NH, targets_NK, grad_NK):
        logits = call.logits(hidden)
        grad_logits = _log_softmax(logits).exp_().mul_(-grad.sum(dim=1, keepdim=True))
        grad_logits.scatter_add_(1, targets, grad)
        grad_products = grad_logits.mul_(call.slope_(logits)).to(call.head.weight_VH.dtype)
        hidden = hidden.to(grad_products.dtype)
        for number, (a, b, scale) in enumerate(call.head.adapters):
            narrow = hidden @ a.to(hidden.dtype).mT
            sums[2 * number].add_((grad_products @ b.to(hidden.dtype)).mT @ hidden, alpha=scale)
            sums[2 * number + 1].add_(grad_products.mT @ narrow, alpha=scale)
    return [total.to(factor.dtype) for total, factor in zip(sums, factors, strict=True)]


def _log_softmax(logits: torch.Tensor) -> torch.Tensor:
    return logits - logits.logsumexp(dim=-1, keepdim=True)
