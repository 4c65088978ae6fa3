"""A layer of stacked experts with LoRA, forward and backward, that never makes a tensor of the size
of the stack.

For a row x of expert e, with W the frozen matrices and A, B the factors of each adapter (LoRA,
arXiv 2106.09685, section 4.1):

    h = W1_e x + s B1_e A1_e x        a = act(h)        y = W2_e a + s B2_e A2_e a        out = sum
    over experts of weight_e y

A factor with one entry for all experts is applied to tokens instead of rows. Where adapters are
mixed, there are two ways. Rows are sorted by adapter within each expert, and a factor has an entry
for each pair of expert and adapter; or the factors are those of all adapters side by side, and a
gate lets each token have its own adapter's columns of the rank. s is part of B then.

Kept for the backward are x, h and the rows of rank width; everything else is computed again,
because it costs a gather or an activation, and h makes a of it. The gradient of the router's weight
needs no y: <g, W2 a + s B2 A2 a> = <W2' g + s A2' B2' g, a>, and the left factor is what the
activation needs.

Shapes: T tokens, S = T * top_k rows sorted by expert, H hidden, I expert width, N = 2I (I without a
gate), r rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable

from lorakit.lora.grouped import (
    MAX_RANGE_BYTES,
    RANGE_OPERATIONS,
    AdapterIds,
    AdjacentExperts,
    AllExperts,
    SortedRows,
    can_group,
    emulates_products,
    few_tokens,
    pad_rank,
)
from lorakit.model.families import ExpertStack


@dataclass(frozen=True)
class FactorPair:
    """One pair of factors: A (E, r, in) and B (E, out, r), at ``2 * index`` and ``2 * index + 1``
    of all factors.

    The factor that touches H may have one entry for all experts: ``is_shared``, then A (1, r, H) on
    the way in, B (1, H, r) out.
    """

    index: int
    columns: slice  # of the product that B adds to
    scale: float
    is_shared: bool = False
    dropout: float = 0.0
    seed: int = 0  # of the dropout of this call
    # what each token's rows of rank width are multiplied by
    gate_TR: torch.Tensor | None = field(default=None, compare=False)
    # A (E * adapters, r, in) and B (E * adapters, out, r): an entry for each expert and adapter
    is_by_adapter: bool = False


@dataclass(frozen=True)
class ExpertCall:
    """What one call of a layer is made of, apart from tensors that may have a gradient."""

    # (E, H, N) and (E, I, H), views of the frozen stacks
    weights: Callable[[], tuple[torch.Tensor, torch.Tensor]]
    biases: Callable[[], tuple[torch.Tensor | None, torch.Tensor | None]]  # (E, N) and (E, H)
    activate: Callable[[torch.Tensor], torch.Tensor]  # (S, N) -> (S, I)
    experts_TK: torch.Tensor  # the router's choices
    num_experts: int
    first: tuple[FactorPair, ...]  # factors on the way in
    second: tuple[FactorPair, ...]  # factors on the way out
    products: str = "auto"  # or: loop, grouped, padded
    adapter_ids: AdapterIds | None = None  # of tokens, where pairs are by adapter

    @property
    def prefers_groups(self) -> bool:
        """Whether one grouped product is wanted: on a CPU a few experts at a time keep what they
        make in the cache.
        """
        return self.products == "grouped" or (
            self.products == "auto" and self.experts_TK.device.type != "cpu"
        )


def run_experts(
    layer: nn.Module,
    stack: ExpertStack,
    x_TH: torch.Tensor,
    experts_TK: torch.Tensor,
    weights_TK: torch.Tensor,
    first: Sequence[FactorPair],
    second: Sequence[FactorPair],
    factors: Sequence[torch.Tensor],
    *,
    products: str = "auto",
    adapter_ids: AdapterIds | None = None,
) -> torch.Tensor:
    """Return what ``layer``, which holds ``stack``, makes of tokens, with the pairs of adapters;
    with graph where gradients are on.
    """
    keeps = torch.is_grad_enabled()
    if (
        not keeps
        and (few := few_tokens()) is not None
        and few.pads(layer, experts_TK, *stack.weights())
    ):
        products = "padded"
    call = ExpertCall(
        stack.weights,
        stack.biases,
        stack.activate,
        experts_TK,
        stack.num_experts,
        tuple(first),
        tuple(second),
        products,
        adapter_ids,
    )
    if keeps:  # a backward may follow; under no_grad ctx.needs_input_grad would be True too
        out: torch.Tensor = ExpertFunction.apply(x_TH, weights_TK, call, *factors)
        return out
    return run_forward(x_TH, weights_TK, call, factors)[0]


class ExpertFunction(torch.autograd.Function):
    """``apply(x_TH, weights_TK, call, *factors)`` -> out_TH. Gradients: of x, of the router's
    weights, of each factor.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_TH: torch.Tensor,
        weights_TK: torch.Tensor,
        call: ExpertCall,
        *factors: torch.Tensor,
    ) -> torch.Tensor:
        keeps = any(ctx.needs_input_grad)
        out_TH, kept = run_forward(x_TH, weights_TK, call, factors, keeps=keeps)
        if keeps:
            ctx.call, ctx.num_factors = call, len(factors)
            ctx.save_for_backward(*kept, *factors)
        return out_TH

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_TH: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weights_TK, hidden_SN, *rest = ctx.saved_tensors
        narrow, factors = rest[: len(rest) - ctx.num_factors], rest[len(rest) - ctx.num_factors :]
        wants_x, wants_weights, _, *wants = ctx.needs_input_grad
        with torch.autocast(grad_TH.device.type, enabled=False):
            layer = _Layer(ctx.call, factors)
            weights_S = layer.rows.take(weights_TK).to(layer.dtype)
            grads = layer.backward(
                grad_TH.to(layer.dtype),
                x,
                weights_S,
                hidden_SN,
                narrow,
                wants_x=wants_x,
                wants=wants,
            )
        grad_x, grad_weights_S, grad_factors = grads
        grad_weights = None
        if wants_weights:
            grad_weights = layer.rows.put_back(grad_weights_S, weights_TK)
        return (
            None if grad_x is None else grad_x.to(grad_TH.dtype),
            grad_weights,
            None,
            *grad_factors,
        )


def run_forward(
    x_TH: torch.Tensor,
    weights_TK: torch.Tensor,
    call: ExpertCall,
    factors: Sequence[torch.Tensor],
    *,
    keeps: bool = False,
) -> tuple[torch.Tensor, tuple[Any, ...]]:
    """Return what ``ExpertFunction`` returns, and what its backward needs where ``keeps``."""
    with torch.autocast(x_TH.device.type, enabled=False):  # it would cast the frozen stacks
        layer = _Layer(call, factors)
        x = x_TH.to(layer.dtype)
        weights_S = layer.rows.take(weights_TK).to(layer.dtype)
        out_TH, hidden_SN, narrow = layer.forward(x, weights_S, keeps=keeps)
    return out_TH.to(x_TH.dtype), (x, weights_TK, hidden_SN, *narrow)


class _Layer:
    """The mathematics of one call, block by block of rows."""

    def __init__(self, call: ExpertCall, factors: Sequence[torch.Tensor]) -> None:
        self.call, self.pairs = call, (*call.first, *call.second)
        self.w1_EHN, self.w2_EIH = call.weights()
        self.b1_EN, self.b2_EH = call.biases()
        self.dtype = self.w1_EHN.dtype
        self.grouped = call.prefers_groups and can_group(
            call.experts_TK.numel(), self.w1_EHN, self.w2_EIH
        )
        if call.products == "grouped" and not self.grouped:
            raise ValueError(
                f"grouped products do not take {self.dtype} stacks of {tuple(self.w1_EHN.shape)}"
                " here"
            )
        # A range is one expert where experts are given in float32, one at a time, and in float16,
        # in which padding (a token at an expert that was not chosen for it) may overflow, and
        # infinity times a weight of 0 is not 0.
        is_single = emulates_products(self.w1_EHN) or self.dtype == torch.float16
        max_rows = (
            0
            if is_single
            else MAX_RANGE_BYTES // (self.w1_EHN.shape[2] * self.w1_EHN.element_size())
        )
        if call.products == "padded":
            self.rows = SortedRows.pad(call.experts_TK, call.num_experts)
        else:
            range_rows = RANGE_OPERATIONS / (2 * (self.w1_EHN[0].numel() + self.w2_EIH[0].numel()))
            self.rows = SortedRows.sort(
                call.experts_TK,
                call.num_experts,
                grouped=self.grouped,
                max_rows=max_rows,
                range_rows=range_rows,
                adapter_ids=call.adapter_ids,
            )
        self.originals = factors
        self._masks: dict[tuple[int, tuple[int, ...]], torch.Tensor] = {}
        self.factors = [factor.to(self.dtype) for factor in factors]
        if self.grouped:
            self.factors = [pad_rank(f, dim=2 if n % 2 else 1) for n, f in enumerate(self.factors)]
        self._gates = {
            pair.index: self._prepare_gate(pair) for pair in self.pairs if pair.gate_TR is not None
        }
        # Sums over experts are kept in float32 where the products are in 16 bit.
        self.sum_dtype = torch.float32 if self.dtype.itemsize < 4 else self.dtype

    def forward(
        self, x_TH: torch.Tensor, weights_S: torch.Tensor, *, keeps: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
        """Return out (T, H), h (S, N) and the rows of rank width of each pair; the latter two
        only where ``keeps``.
        """
        num_rows, num_out = weights_S.shape[0], self.w1_EHN.shape[2]
        out_TH = x_TH.new_zeros((x_TH.shape[0], self.w2_EIH.shape[2]), dtype=self.sum_dtype)
        hidden_SN = x_TH.new_empty((num_rows, num_out)) if keeps or self.grouped else None
        narrow = {pair.index: self._narrow(pair, x_TH, num_rows) for pair in self.pairs}
        for block in self.rows.blocks():
            rows = block.rows
            h = block.times(
                x_TH[block.tokens], self.w1_EHN, out=None if hidden_SN is None else hidden_SN[rows]
            )
            if self.b1_EN is not None:
                h.add_(block.per_row(self.b1_EN))
            for pair in self.call.first:
                a, b = self._factors(pair)
                own = block.by_adapter if pair.is_by_adapter else block
                if pair.is_shared:
                    u = narrow[pair.index][block.tokens]
                else:
                    dropped = self._drop_tokens(x_TH, pair, block.tokens)
                    u = own.times(dropped, a.mT, out=narrow[pair.index][rows])
                    self._gate_(u, pair, block.tokens)
                # In bf16 the sum rounds much of a small part away: of a change of 7e-4 of the
                # weights 40 % arrives in the output, of one of 3e-3 94 %. A sum in float32 would
                # keep it, and needs one kernel of sum and activation on a GPU.
                if pair.columns.step in (None, 1):
                    own.add_times_(h[:, pair.columns], u, b.mT, pair.scale)
                else:  # interleaved gate and up: no product writes there
                    h[:, pair.columns].add_(own.times(u, b.mT), alpha=pair.scale)
            act = self.call.activate(h)
            y = block.times(act, self.w2_EIH)
            if self.b2_EH is not None:
                y.add_(block.per_row(self.b2_EH))
            for pair in self.call.second:
                a, b = self._factors(pair)
                own = block.by_adapter if pair.is_by_adapter else block
                v = own.times(self._drop_rows(act, pair, rows), a.mT, out=narrow[pair.index][rows])
                self._gate_(v, pair, block.tokens)
                if not pair.is_shared:
                    own.add_times_(y, v, b.mT, pair.scale)
            block.add_to_tokens_(out_TH, y.mul_(weights_S[rows, None]))
        for pair in self.call.second:
            if pair.is_shared:
                v_TR = self._sum_narrow(narrow[pair.index], weights_S)
                b_RH = self._factors(pair)[1][0].mT
                out_TH.addmm_(v_TR, b_RH.to(self.sum_dtype), alpha=pair.scale)
        return out_TH, hidden_SN, list(narrow.values())

    def backward(
        self,
        grad_TH: torch.Tensor,
        x_TH: torch.Tensor,
        weights_S: torch.Tensor,
        hidden_SN: torch.Tensor,
        narrow: list[torch.Tensor],
        *,
        wants_x: bool,
        wants: list[bool],
    ) -> tuple[torch.Tensor | None, torch.Tensor, list[torch.Tensor | None]]:
        """Return the gradients of x (T, H), sorted router weights (S,), and each factor."""
        call = self.call
        rank_rows = {pair.index: rows for pair, rows in zip(self.pairs, narrow, strict=True)}
        sums = [
            torch.zeros_like(f) if want else None
            for f, want in zip(self.factors, wants, strict=True)
        ]
        grad_x = torch.zeros_like(x_TH, dtype=self.sum_dtype) if wants_x else None
        grad_weights_S = torch.empty_like(weights_S)
        # Of factors that all experts share: the rank-wide gradients by token.
        shared = {
            p.index: x_TH.new_zeros((len(x_TH), self._rank(p)), dtype=self.sum_dtype)
            for p in call.first
            if p.is_shared
        }
        shared |= {
            p.index: self._gate_(grad_TH @ self._factors(p)[1][0], p)
            for p in call.second
            if p.is_shared
        }
        wants_hidden = wants_x or any(
            wants[2 * pair.index] or wants[2 * pair.index + 1] for pair in call.first
        )
        for block in self.rows.blocks():
            rows, tokens = block.rows, block.tokens
            g, weights = grad_TH[tokens], weights_S[rows, None]
            act, pull = self._activate(hidden_SN[rows])
            grad_act = block.times(g, self.w2_EIH.mT)
            for pair in call.second:
                self._second_pair(block, pair, act, g, weights, grad_act, rank_rows, shared, sums)
            grad_weights = torch.linalg.vecdot(grad_act, act)
            if self.b2_EH is not None:
                grad_weights = grad_weights + torch.linalg.vecdot(
                    g, block.per_row(self.b2_EH).expand_as(g)
                )
            grad_weights_S[rows] = grad_weights
            if not wants_hidden:
                continue
            grad_h = pull(grad_act.mul_(weights))
            grad_rows = block.times(grad_h, self.w1_EHN.mT) if wants_x else None
            for pair in call.first:
                self._first_pair(block, pair, x_TH, grad_h, grad_rows, rank_rows, shared, sums)
            if grad_x is not None and grad_rows is not None:
                block.add_to_tokens_(grad_x, grad_rows)
        self._finish_shared(grad_TH, x_TH, weights_S, grad_x, rank_rows, shared, sums)
        return grad_x, grad_weights_S, [self._restore(number, s) for number, s in enumerate(sums)]

    def _second_pair(
        self,
        block: AdjacentExperts | AllExperts,
        pair: FactorPair,
        act: torch.Tensor,
        g: torch.Tensor,
        weights: torch.Tensor,
        grad_act: torch.Tensor,
        narrow: dict[int, torch.Tensor],
        shared: dict[int, torch.Tensor],
        sums: list[Any],
    ) -> None:
        """Add the pair's way back to ``grad_act`` and the sums of its factors' gradients."""
        a, b = self._factors(pair)
        block = block.by_adapter if pair.is_by_adapter else block
        sum_a, sum_b = sums[2 * pair.index], sums[2 * pair.index + 1]
        if pair.is_shared:
            q = shared[pair.index][block.tokens]
        else:
            q = self._gate_(block.times(g, b), pair, block.tokens)
        dropped = self._drop_rows(act, pair, block.rows)
        if pair.dropout:
            grad_act.add_(self._drop_rows(block.times(q, a), pair, block.rows), alpha=pair.scale)
        else:
            block.add_times_(grad_act, q, a, pair.scale)
        if sum_a is not None:
            block.put_outer_(sum_a, q * weights, dropped, pair.scale)
        if sum_b is not None and not pair.is_shared:
            block.put_outer_(sum_b, g, narrow[pair.index][block.rows] * weights, pair.scale)

    def _first_pair(
        self,
        block: AdjacentExperts | AllExperts,
        pair: FactorPair,
        x_TH: torch.Tensor,
        grad_h: torch.Tensor,
        grad_rows: torch.Tensor | None,
        narrow: dict[int, torch.Tensor],
        shared: dict[int, torch.Tensor],
        sums: list[Any],
    ) -> None:
        """Add the pair's way back to ``grad_rows`` and the sums of its factors' gradients."""
        a, b = self._factors(pair)
        block = block.by_adapter if pair.is_by_adapter else block
        sum_a, sum_b = sums[2 * pair.index], sums[2 * pair.index + 1]
        grad_pair = grad_h[:, pair.columns]
        p = block.times(grad_pair, b)
        u = narrow[pair.index][block.tokens if pair.is_shared else block.rows]
        if sum_b is not None:
            block.put_outer_(sum_b, grad_pair, u, pair.scale)
        if pair.is_shared:
            block.add_to_tokens_(shared[pair.index], p)
            return
        self._gate_(p, pair, block.tokens)
        if grad_rows is not None:
            if pair.dropout:
                mask = self._mask(pair, x_TH.shape, x_TH)[block.tokens]
                grad_rows.add_(block.times(p, a).mul_(mask), alpha=pair.scale)
            else:
                block.add_times_(grad_rows, p, a, pair.scale)
        if sum_a is not None:
            block.put_outer_(sum_a, p, self._drop_tokens(x_TH, pair, block.tokens), pair.scale)

    def _finish_shared(
        self,
        grad_TH: torch.Tensor,
        x_TH: torch.Tensor,
        weights_S: torch.Tensor,
        grad_x: torch.Tensor | None,
        narrow: dict[int, torch.Tensor],
        shared: dict[int, torch.Tensor],
        sums: list[Any],
    ) -> None:
        """The way back through factors that all experts share, over tokens."""
        for pair in self.call.first:
            if pair.is_shared:
                p_TR = self._gate_(shared[pair.index], pair).to(self.dtype)
                a_RH, sum_a = self._factors(pair)[0][0], sums[2 * pair.index]
                if sum_a is not None:
                    dropped = self._drop_tokens(x_TH, pair)
                    torch.mm(p_TR.t(), dropped, out=sum_a[0]).mul_(pair.scale)
                if grad_x is not None:
                    grad_x.add_(self._drop_tokens(p_TR @ a_RH, pair), alpha=pair.scale)
        for pair in self.call.second:
            if pair.is_shared and sums[2 * pair.index + 1] is not None:
                v_TR = self._sum_narrow(narrow[pair.index], weights_S).to(self.dtype)
                torch.mm(grad_TH.t(), v_TR, out=sums[2 * pair.index + 1][0]).mul_(pair.scale)

    # ---- pieces

    def _prepare_gate(self, pair: FactorPair) -> torch.Tensor:
        assert pair.gate_TR is not None
        gate = pair.gate_TR.to(self.dtype)
        return torch.nn.functional.pad(gate, (0, self._rank(pair) - gate.shape[1]))

    def _gate_(
        self, narrow: torch.Tensor, pair: FactorPair, tokens: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Multiply rows of rank width by the gate of their tokens, in place."""
        if (gate := self._gates.get(pair.index)) is None:
            return narrow
        return narrow.mul_(gate if tokens is None else gate[tokens])

    def _restore(self, number: int, gradient: torch.Tensor | None) -> torch.Tensor | None:
        if gradient is None:
            return None
        original = self.originals[number]
        rank_dim = 2 if number % 2 else 1
        return gradient.narrow(rank_dim, 0, original.shape[rank_dim]).to(original.dtype)

    def _factors(self, pair: FactorPair) -> tuple[torch.Tensor, torch.Tensor]:
        return self.factors[2 * pair.index], self.factors[2 * pair.index + 1]

    def _rank(self, pair: FactorPair) -> int:
        return self._factors(pair)[0].shape[1]

    def _narrow(self, pair: FactorPair, x_TH: torch.Tensor, num_rows: int) -> torch.Tensor:
        """Room for the rows of rank width, (S, r); of a shared A the values themselves, (T, r)."""
        if pair.is_shared and pair in self.call.first:
            return self._gate_(self._drop_tokens(x_TH, pair) @ self._factors(pair)[0][0].mT, pair)
        return x_TH.new_empty((num_rows, self._rank(pair)))

    def _sum_narrow(self, rows_SR: torch.Tensor, weights_S: torch.Tensor) -> torch.Tensor:
        return self.rows.sum_tokens(rows_SR * weights_S[:, None], self.sum_dtype)

    def _activate(
        self, h: torch.Tensor
    ) -> tuple[torch.Tensor, Callable[[torch.Tensor], torch.Tensor]]:
        """Return act(h), and what pulls a gradient of it back to h."""
        with torch.enable_grad():
            h = h.detach().requires_grad_()
            act = self.call.activate(h)
        return act.detach(), lambda grad: torch.autograd.grad(act, h, grad)[0]

    def _drop_tokens(
        self, x_TH: torch.Tensor, pair: FactorPair, tokens: torch.Tensor | slice = slice(None)
    ) -> torch.Tensor:
        x = x_TH[tokens]
        return x * self._mask(pair, x_TH.shape, x_TH)[tokens] if pair.dropout else x

    def _drop_rows(self, values_SI: torch.Tensor, pair: FactorPair, rows: slice) -> torch.Tensor:
        if not pair.dropout:
            return values_SI
        shape = (len(self.rows.order_S), values_SI.shape[1])
        return values_SI * self._mask(pair, shape, values_SI)[rows]

    def _mask(self, pair: FactorPair, shape: Any, like: torch.Tensor) -> torch.Tensor:
        """0, or 1 / (1 - p): drawn again alike within one call, so that it need not be kept."""
        key = (pair.index, tuple(shape))
        if key not in self._masks:
            generator = torch.Generator(like.device).manual_seed(pair.seed)
            keep = torch.rand(shape, generator=generator, device=like.device) >= pair.dropout
            self._masks[key] = keep.to(like.dtype).div_(1 - pair.dropout)
        return self._masks[key]
