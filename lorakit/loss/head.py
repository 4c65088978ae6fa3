"""Hidden states to log-probabilities of chosen tokens, in blocks: the (tokens, vocabulary) matrix
is never held.

With z the logits of a token, p their softmax and t a target, log p_t = z_t - logsumexp(z), and

    d log p_t / d hidden = W_t - sum over v of p_v W_v

The sum over the vocabulary is gathered block by block beside the logsumexp, both rescaled when a
larger logit comes: the online softmax of FlashAttention (arXiv 2205.14135, section 3.1) with the
unembedding instead of the values. So the logits are computed once, for whatever loss, and the
backward only scales. Of one target, 1 - p of its row is taken less the sum over all others: the
same, and no small difference of two large vectors.

An adapter of the unembedding enters as its rows of rank width, A' times the hidden state, which
autograd makes beforehand, dropout included; they are treated as the hidden states are. The gradient
of its B needs every p_v. Where the loss is a weighted sum whose weights are known, few tokens at a
time meet the whole vocabulary and that gradient is summed while p is at hand, to be scaled in the
backward; for another loss the blocks are computed twice.

Shapes: N tokens, V vocabulary, H hidden, K targets per token, R rank of an adapter of the
unembedding; n, v of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from lorakit.model.partition import has_values, whole

# tokens of a block at most, and how many of the vocabulary each of them meets at least
MAX_TOKENS, MIN_LOGITS = 4096, 1024
BLOCK_BYTES = {"cpu": 32 << 20, "cuda": 256 << 20}  # of float32 logits at a time
# times as much where a block holds the whole vocabulary: products of few tokens are slow
WHOLE_BLOCKS = 4


class HeadAdapter(NamedTuple):
    """One LoRA adapter of an unembedding."""

    A_RH: torch.Tensor
    B_VR: torch.Tensor
    scale: float
    dropout: Callable[[torch.Tensor], torch.Tensor] | None = None  # of what A is given
    # multiplies what A gives: several adapters side by side, of which each token has one
    gate_NR: torch.Tensor | None = None


def as_head_adapters(
    found: tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None,
) -> tuple[HeadAdapter, ...]:
    """Return what an unembedding has beside itself: A, B and the scale of one adapter, or the
    gate (T, R) of several.
    """
    if found is None:
        return ()
    a_RH, b_VR, gate = found
    if isinstance(gate, float):
        return (HeadAdapter(a_RH, b_VR, gate),)
    return (HeadAdapter(a_RH, b_VR, 1.0, gate_NR=gate),)


@dataclass(frozen=True)
class Head:
    """An unembedding: ``logits = cap(multiplier * (hidden W' + bias + sum of scale *
    dropout(hidden) A' B'))``.
    """

    weight_VH: torch.Tensor  # frozen
    bias_V: torch.Tensor | None = None
    adapters: tuple[HeadAdapter, ...] = ()
    multiplier: float = 1.0
    softcap: float | None = None  # logits are softcap * tanh(logits / softcap)

    @property
    def frozen(self) -> list[torch.Tensor]:
        """The unembedding's own tensors, which ZeRO-3 may hold in parts."""
        return [self.weight_VH] if self.bias_V is None else [self.weight_VH, self.bias_V]


def head_logprobs(
    hidden_NH: torch.Tensor,
    head: Head,
    targets_NK: torch.Tensor,
    *,
    temperature: float = 1.0,
    block_bytes: int | None = None,
    weights_NK: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return log p(target) of each target at each token, (N, K) float32, with gradients to
    ``hidden_NH`` and the adapters.

    ``weights_NK``: the loss will be the sum of these times the log-probabilities, or a multiple of
    it. It spares a trained unembedding the second computation of its logits; where the loss turns
    out to be another one, they are computed all the same.
    """
    call = _Call(head, temperature, block_bytes, torch.is_grad_enabled(), weights_NK)
    function: Callable[..., torch.Tensor] = _HeadFunction.apply
    with whole(head.frozen):
        return function(
            targets_NK, call, hidden_NH, *_narrow(head, hidden_NH), *(a.B_VR for a in head.adapters)
        )


def _narrow(head: Head, hidden_NH: torch.Tensor) -> list[torch.Tensor]:
    """Return the rows of rank width of each adapter, (N, R), with graph."""
    dtype, rows = head.weight_VH.dtype, []
    with torch.autocast(hidden_NH.device.type, enabled=False):
        for adapter in head.adapters:
            inputs = adapter.dropout(hidden_NH) if adapter.dropout else hidden_NH
            narrow = inputs.to(dtype) @ adapter.A_RH.to(dtype).mT
            rows.append(narrow if adapter.gate_NR is None else narrow * adapter.gate_NR.to(dtype))
    return rows


@torch.no_grad()
def all_logits(hidden_NH: torch.Tensor, head: Head) -> torch.Tensor:
    """Return the logits of the whole vocabulary, (N, V) float32: for few tokens."""
    call = _Call(head, 1.0, None, False)
    with torch.autocast(hidden_NH.device.type, enabled=False), whole(head.frozen):
        ((_, logits),) = call.logit_blocks(hidden_NH, _narrow(head, hidden_NH), whole=True)
    return logits


@torch.no_grad()
def best_logprobs(
    hidden_NH: torch.Tensor,
    head: Head,
    num_best: int,
    *,
    temperature: float = 1.0,
    block_bytes: int | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the ``num_best`` largest log-probabilities at each token and their token ids, both
    (N, num_best), best first.
    """
    call = _Call(head, temperature, block_bytes, False)
    values = hidden_NH.new_full((len(hidden_NH), num_best), float("-inf"), dtype=torch.float32)
    tokens = torch.zeros_like(values, dtype=torch.long)
    lse = hidden_NH.new_full((len(hidden_NH), 1), float("-inf"), dtype=torch.float32)
    narrow = _narrow(head, hidden_NH)
    with torch.autocast(hidden_NH.device.type, enabled=False), whole(head.frozen):
        for rows in call.row_blocks(len(hidden_NH)):
            inners = [inner[rows] for inner in narrow]
            for first, logits in call.logit_blocks(hidden_NH[rows], inners):
                lse[rows] = torch.logaddexp(lse[rows], logits.logsumexp(dim=-1, keepdim=True))
                best = logits.topk(min(num_best, logits.shape[1]))
                candidates = torch.cat([values[rows], best.values], dim=1)
                kept = candidates.topk(num_best)
                values[rows] = kept.values
                ids = torch.cat([tokens[rows], best.indices + first], dim=1)
                tokens[rows] = ids.gather(1, kept.indices)
    return values - lse, tokens


@dataclass(frozen=True)
class _Call:
    head: Head
    temperature: float
    block_bytes: int | None
    keeps: bool  # whether a backward may follow
    # the expected gradient of the log-probabilities, but for one factor
    weights_NK: torch.Tensor | None = None

    def row_blocks(self, num_tokens: int, *, whole: bool = False) -> Iterator[slice]:
        """Yield slices of the tokens; with ``whole``, ``logit_blocks`` makes one block of each."""
        room = self.max_whole_rows if whole else self._num_bytes() // (4 * MIN_LOGITS)
        size = max(1, min(MAX_TOKENS, room))
        for start in range(0, num_tokens, size):
            yield slice(start, start + size)

    @property
    def max_whole_rows(self) -> int:
        """The number of tokens whose logits over the whole vocabulary may be held; it can be 0."""
        return WHOLE_BLOCKS * self._num_bytes() // (4 * self.head.weight_VH.shape[0])

    def logit_blocks(
        self, hidden_nH: torch.Tensor, narrow: list[torch.Tensor], *, whole: bool = False
    ) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first token of the vocabulary, logits over temperature (n, v) float32), each to
        be written over.
        """
        vocab = self.head.weight_VH.shape[0]
        size = vocab if whole else max(1, self._num_bytes() // (4 * max(1, len(hidden_nH))))
        hidden = hidden_nH.to(self.head.weight_VH.dtype)
        for first in range(0, vocab, size):
            yield first, self._logits(hidden, narrow, slice(first, min(vocab, first + size)))

    def _logits(
        self, hidden: torch.Tensor, narrow: list[torch.Tensor], tokens: slice
    ) -> torch.Tensor:
        head = self.head
        logits = hidden @ head.weight_VH[tokens].mT
        for inner, adapter in zip(narrow, head.adapters, strict=True):
            logits.addmm_(inner, adapter.B_VR[tokens].to(hidden.dtype).mT, alpha=adapter.scale)
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
        constant, softcap = self.head.multiplier / self.temperature, self.head.softcap
        if not softcap:
            return constant
        return logits.mul_(self.temperature / softcap).square_().neg_().add_(1).mul_(constant)

    def matrices(self) -> list[tuple[torch.Tensor, float]]:
        """What the hidden states and each adapter's rows of rank width are multiplied by, (V, H)
        and (V, R), with its scale.
        """
        adapters = self.head.adapters
        return [(self.head.weight_VH, 1.0), *((one.B_VR, one.scale) for one in adapters)]

    def _num_bytes(self) -> int:
        device = self.head.weight_VH.device.type
        return self.block_bytes or BLOCK_BYTES.get(device, BLOCK_BYTES["cuda"])


class _HeadFunction(torch.autograd.Function):
    """``apply(targets_NK, call, hidden_NH, *narrow, *Bs)`` -> log p(target) (N, K)."""

    @staticmethod
    def forward(
        ctx: Any, targets_NK: torch.Tensor, call: _Call, *tensors: torch.Tensor
    ) -> torch.Tensor:
        num_inputs = 1 + len(call.head.adapters)
        wants = [call.keeps and want for want in ctx.needs_input_grad[2:]]
        inputs, matrices, wants_b = tensors[:num_inputs], tensors[num_inputs:], wants[num_inputs:]
        logprobs = inputs[0].new_zeros(targets_NK.shape, dtype=torch.float32)
        lse = inputs[0].new_zeros((len(targets_NK), 1), dtype=torch.float32)
        pull_NK = torch.empty_like(logprobs) if call.keeps else None
        # see _scan
        mean_dtypes = [x.dtype if targets_NK.shape[1] == 1 else torch.float32 for x in inputs]
        means = [
            torch.empty_like(x, dtype=dtype) if want else None
            for x, dtype, want in zip(inputs, mean_dtypes, wants[:num_inputs], strict=True)
        ]
        is_summed = any(wants_b) and call.weights_NK is not None and call.max_whole_rows > 0
        sums = _zeros(matrices, wants_b) if is_summed else []
        with torch.autocast(logprobs.device.type, enabled=False):
            for rows in call.row_blocks(len(targets_NK), whole=is_summed):
                some, targets = [x[rows] for x in inputs], targets_NK[rows]
                found = _scan(
                    call, some, targets, [mean is not None for mean in means], whole=is_summed
                )
                lse[rows] = found.lse_n1
                logprobs[rows] = found.logits_nK - found.lse_n1
                for mean, part in zip(means, found.means, strict=True):
                    if mean is not None and part is not None:
                        mean[rows] = part
                if pull_NK is not None:
                    pull_NK[rows] = torch.as_tensor(call.slope_(found.logits_nK))
                    if targets.shape[1] == 1:
                        # 1 - p, as the mean is without the target
                        pull_NK[rows] *= -logprobs[rows].expm1()
                if (
                    is_summed
                    and call.weights_NK is not None
                    and pull_NK is not None
                    and found.pulling_nv is not None
                ):
                    weights_nK = call.weights_NK[rows].float()
                    grad = found.pulling_nv.mul_(
                        weights_nK.sum(dim=1, keepdim=True).neg_() / found.total_n1
                    )
                    grad.scatter_add_(1, targets, weights_nK * pull_NK[rows])
                    _add_gradients_(sums, call, some[1:], 0, grad)
                    del grad
                del found  # before the next block is made
        if call.keeps:
            ctx.call, ctx.is_summed, ctx.num_inputs = call, is_summed, num_inputs
            ctx.dtypes = [tensor.dtype for tensor in tensors]
            again = (lse, *inputs) if any(wants_b) else [None] * (1 + num_inputs)
            ctx.save_for_backward(
                targets_NK, call.weights_NK, pull_NK, *again, *means, *matrices, *sums
            )
        return logprobs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_NK: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        call, num_inputs = ctx.call, ctx.num_inputs
        targets_NK, weights_NK, pull_NK, lse, *rest = ctx.saved_tensors
        inputs, means = rest[:num_inputs], rest[num_inputs : 2 * num_inputs]
        matrices, sums = rest[2 * num_inputs : 3 * num_inputs - 1], rest[3 * num_inputs - 1 :]
        wants = ctx.needs_input_grad[2:]
        with torch.autocast(grad_NK.device.type, enabled=False), whole(call.head.frozen):
            grads = [
                None
                if mean is None
                else _pull(mean, matrix, scale, targets_NK, grad_NK, grad_NK * pull_NK)
                for mean, (matrix, scale) in zip(means, call.matrices(), strict=True)
            ]
            multiple = _multiple_of(weights_NK, grad_NK) if ctx.is_summed else None
            if multiple is not None:
                grads += [None if total is None else total * multiple for total in sums]
            elif any(wants[num_inputs:]):
                sums = _zeros(matrices, wants[num_inputs:])
                _add_all_gradients_(
                    sums, call, inputs, targets_NK, grad_NK, lse, whole=ctx.is_summed
                )
                grads += sums
            else:
                grads += [None] * len(matrices)
        wanted = zip(grads, wants, ctx.dtypes, strict=True)
        return (
            None,
            None,
            *(g.to(dtype) if want and g is not None else None for g, want, dtype in wanted),
        )


def _zeros(matrices: Sequence[torch.Tensor], wants: Sequence[bool]) -> list[torch.Tensor | None]:
    """Room for the gradients that are wanted, in float32."""
    return [
        torch.zeros_like(m, dtype=torch.float32) if want else None
        for m, want in zip(matrices, wants, strict=True)
    ]


@dataclass
class _Scanned:
    lse_n1: torch.Tensor
    total_n1: torch.Tensor  # sum of exp(logit - largest)
    logits_nK: torch.Tensor  # of the targets
    # of each input: sum over the vocabulary of p times its matrix's rows
    means: list[torch.Tensor | None]
    # of a block that is the whole vocabulary: exp(logit - largest) times d logits / d product
    pulling_nv: torch.Tensor | None


def _scan(
    call: _Call,
    inputs: list[torch.Tensor],
    targets: torch.Tensor,
    wants: list[bool],
    *,
    whole: bool = False,
) -> _Scanned:
    """Go over the vocabulary once, keeping sums relative to the largest logit so far.

    What pulls leaves out the target where there is one: of a token that the model is sure of, its
    row less the mean of all rows would be the small difference of two that are nearly alike, and
    lost in 16 bit. Its pull is 1 - p instead.
    """
    top = inputs[0].new_full((len(targets), 1), float("-inf"), dtype=torch.float32)
    total = torch.zeros_like(top)
    picked = top.new_zeros(targets.shape)
    means = [
        torch.zeros_like(x, dtype=torch.float32) if want else None
        for x, want in zip(inputs, wants, strict=True)
    ]
    needs_slope = whole or any(wants)
    dtype, last = call.head.weight_VH.dtype, None
    for first, logits in call.logit_blocks(inputs[0], inputs[1:], whole=whole):
        tokens = slice(first, first + logits.shape[1])
        inside, local = _find(targets, tokens)
        picked = torch.where(inside, logits.gather(1, local), picked)
        new_top = torch.maximum(top, logits.amax(dim=-1, keepdim=True))
        shrink = (top - new_top).exp_()
        top = new_top
        makes_slope = call.head.softcap and needs_slope  # of the logits, which must stay for it
        pulling = (logits - top if makes_slope else logits.sub_(top)).exp_()
        total.mul_(shrink).add_(pulling.sum(dim=-1, keepdim=True))
        if needs_slope:
            pulling.mul_(call.slope_(logits))
            if targets.shape[1] == 1:
                pulling.scatter_(1, local, pulling.gather(1, local).masked_fill_(inside, 0.0))
        if any(wants):
            narrowed = pulling.to(dtype)
            for mean, (matrix, scale) in zip(means, call.matrices(), strict=True):
                if mean is not None:
                    _add_product_(mean.mul_(shrink), narrowed, matrix[tokens].to(dtype), scale)
            del narrowed
        last = pulling if whole else None
        del logits, pulling  # before the next block is made
    means = [mean if mean is None else mean.div_(total) for mean in means]
    return _Scanned(top + total.log(), total, picked, means, last)


def _pull(
    mean_NX: torch.Tensor,
    matrix_VX: torch.Tensor,
    scale: float,
    targets_NK: torch.Tensor,
    grad_NK: torch.Tensor,
    grad_products_NK: torch.Tensor,
) -> torch.Tensor:
    """Return the gradient of an input: the pull of its targets less that of the vocabulary."""
    grad_NX = mean_NX * -grad_NK.sum(dim=1, keepdim=True).to(mean_NX.dtype)
    for choice in range(targets_NK.shape[1]):
        rows = matrix_VX[targets_NK[:, choice]].to(mean_NX.dtype)
        grad_NX.addcmul_(rows, grad_products_NK[:, choice, None].to(rows.dtype), value=scale)
    return grad_NX


def _find(targets_nK: torch.Tensor, tokens: slice) -> tuple[torch.Tensor, torch.Tensor]:
    """Return which targets are in a block, and where in it (for others, somewhere)."""
    inside = (targets_nK >= tokens.start) & (targets_nK < tokens.stop)
    return inside, (targets_nK - tokens.start).clamp(0, tokens.stop - tokens.start - 1)


def _multiple_of(weights_NK: torch.Tensor, grad_NK: torch.Tensor) -> float | None:
    """Return the number that ``grad_NK`` is ``weights_NK`` times, or None where it is no
    multiple. On a GPU it waits for both.
    """
    if not weights_NK.numel():
        return None
    if not has_values(grad_NK):
        return 1.0
    weights = weights_NK.to(grad_NK.dtype)
    largest = weights.abs().argmax()
    multiple = (grad_NK.flatten()[largest] / weights.flatten()[largest]).nan_to_num(
        nan=0.0, posinf=0.0, neginf=0.0
    )
    is_multiple = (grad_NK - multiple * weights).abs().max() <= 1e-6 * grad_NK.abs().max()
    number, holds = torch.stack([multiple, is_multiple.to(multiple.dtype)]).tolist()
    return number if holds else None


def _add_all_gradients_(
    sums: list[torch.Tensor | None],
    call: _Call,
    inputs: list[torch.Tensor],
    targets_NK: torch.Tensor,
    grad_NK: torch.Tensor,
    lse: torch.Tensor,
    *,
    whole: bool,
) -> None:
    """Compute each block once more, for the gradients of the adapters' B.

    In the blocks of the forward: a product in another shape rounds otherwise, and logits that
    differ from those in ``lse`` give probabilities whose sum is not 1.
    """
    for rows in call.row_blocks(len(targets_NK), whole=whole):
        hidden, *narrow = [x[rows] for x in inputs]
        targets, grad = targets_NK[rows], grad_NK[rows]
        for first, logits in call.logit_blocks(hidden, narrow, whole=whole):
            inside, local = _find(targets, slice(first, first + logits.shape[1]))
            grad_logits = (logits - lse[rows]).exp_().mul_(-grad.sum(dim=1, keepdim=True))
            grad_logits.scatter_add_(1, local, grad * inside)
            _add_gradients_(sums, call, narrow, first, grad_logits.mul_(call.slope_(logits)))
            del logits, grad_logits


def _add_gradients_(
    sums: list[torch.Tensor | None],
    call: _Call,
    narrow: list[torch.Tensor],
    first: int,
    grad_nv: torch.Tensor,
) -> None:
    """Add a block's gradients of the adapters' B, by the gradient of its products."""
    grad_vn = grad_nv.to(call.head.weight_VH.dtype).mT
    tokens = slice(first, first + grad_nv.shape[1])
    for total, inner, adapter in zip(sums, narrow, call.head.adapters, strict=True):
        if total is not None:
            _add_product_(total[tokens], grad_vn, inner, adapter.scale)


def _add_product_(total: torch.Tensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
    """Add ``scale * a @ b`` to the float32 ``total``."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(a @ b, alpha=scale)
