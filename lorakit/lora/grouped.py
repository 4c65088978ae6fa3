"""Products over rows that are sorted by expert: of a few adjacent experts at a time, or of all
experts in one grouped product.

Where tokens belong to several adapters, each with factors of its own, an expert's rows are sorted
by adapter, and each adapter has as many: products with the expert's matrix see all of them,
products with factors see them by pair of expert and adapter (``by_adapter``).

Shapes: S rows (token, expert pairs, and padding), T tokens, E experts, K and N inner and outer
widths; g experts of m rows each.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

from lorakit.model.partition import has_values

ALIGNMENT_BYTES = 16  # of a row, for grouped products
# Measured on two cores: with 128 experts of 64 rows, a batch of products takes 0.7 of the time of
# as many single products: threads share a batch out by expert, and two of them hardly speed up one
# product of 64 rows.
MAX_RANGE_BYTES = (
    4 << 20
)  # of what a range's first products make: it still fits the processor's cache
MAX_PADDING = 1.3  # cost of a range with padding, as a multiple of that without
READ_ROWS = 16  # reading an expert's matrices costs as much as this many rows
# multiplications and additions, as long as which one more range takes beside its products
RANGE_OPERATIONS = 4e6


@dataclass(frozen=True)
class ExpertRange:
    """Adjacent experts whose rows are padded to one number."""

    first: int
    num_experts: int
    rows_each: int  # -1: as many as the rows are, for each


def cut_ranges(
    num_per_expert: list[int], *, max_rows: int, range_rows: float = 0.0
) -> list[ExpertRange]:
    """Cut the experts into ranges, which end where padding would cost more than it saves; experts
    without a row need none.

    Args:
        max_rows: of a range.
        range_rows: what one more range costs, in rows.
    """
    ranges: list[ExpertRange] = []
    first = num = rows_each = cost = 0
    for expert, count in enumerate(num_per_expert):
        if not count:
            continue
        grown, widest = expert - first + 1, max(rows_each, count)
        is_cheap = (
            grown * (widest + READ_ROWS)
            <= MAX_PADDING * (cost + count + READ_ROWS) + (grown - 1) * range_rows
        )
        if num and is_cheap and grown * widest <= max_rows:
            num, rows_each, cost = grown, widest, cost + count + READ_ROWS
            continue
        if num:
            ranges.append(ExpertRange(first, num, rows_each))
        first, num, rows_each, cost = expert, 1, count, count + READ_ROWS
    return [*ranges, ExpertRange(first, num, rows_each)] if num else ranges


@dataclass(frozen=True)
class AdapterIds:
    """Whose factors each token has, of ``num``."""

    adapter_ids_T: torch.Tensor
    num: int

    def pay(
        self,
        experts_TK: torch.Tensor,
        num_experts: int,
        *,
        base_cost: float,
        factor_cost: float,
        pads: bool,
    ) -> bool:
        """Whether rows by adapter cost less than factors of all adapters for each row, of
        which a gate lets one through.

        Args:
            base_cost: of a row's products with its expert's matrices.
            factor_cost: of its products with one adapter's factors, in the same unit.
            pads: whether every adapter of an expert must have as many rows.
        """
        if not pads or not has_values(experts_TK):
            return True
        counts = _count(_pairs(experts_TK, self), num_experts * self.num)
        num_padded = int(counts.view(num_experts, self.num).amax(1).sum()) * self.num
        cost_of_all = experts_TK.numel() * (base_cost + self.num * factor_cost)
        return num_padded * (base_cost + factor_cost) < cost_of_all


def _pairs(experts_TK: torch.Tensor, adapter_ids: AdapterIds | None) -> torch.Tensor:
    """expert * adapters + adapter for each choice, flat."""
    if adapter_ids is None:
        return experts_TK.reshape(-1)
    return (experts_TK * adapter_ids.num + adapter_ids.adapter_ids_T[:, None]).reshape(-1)


def _count(pairs_S: torch.Tensor, num_pairs: int) -> torch.Tensor:
    counts = torch.zeros(num_pairs, dtype=torch.int32, device=pairs_S.device)
    return counts.scatter_add_(0, pairs_S, torch.ones_like(pairs_S, dtype=torch.int32))


@dataclass(frozen=True)
class SortedRows:
    """The pairs of token and expert, in the order of the experts, with padding where ranges of
    experts have it.
    """

    # where each sorted row stood: token * top_k + choice; T * top_k for padding
    order_S: torch.Tensor
    pairs_S: torch.Tensor  # expert * adapters + adapter of each row, without padding
    num_per_pair: torch.Tensor
    num_tokens: int
    top_k: int
    ranges: list[ExpertRange] | None  # None: all experts in one grouped product, without padding
    num_adapters: int = 1

    @classmethod
    def sort(
        cls,
        experts_TK: torch.Tensor,
        num_experts: int,
        *,
        grouped: bool,
        max_rows: int = 0,
        range_rows: float = 0.0,
        adapter_ids: AdapterIds | None = None,
    ) -> SortedRows:
        """Sort the router's choices, (T, top_k): for one grouped product, or in ranges of at most
        ``max_rows`` rows or one expert.
        """
        num_tokens, top_k = experts_TK.shape
        num_adapters = adapter_ids.num if adapter_ids else 1
        pairs_S, order_S = _pairs(experts_TK, adapter_ids).sort(stable=True)
        counts = _count(pairs_S, num_experts * num_adapters)
        if grouped:
            return cls(order_S, pairs_S, counts, num_tokens, top_k, None, num_adapters)
        most_E = counts.view(num_experts, num_adapters).amax(1) * num_adapters
        num_each = _read_counts(most_E, experts_TK.numel())
        ranges = cut_ranges(num_each, max_rows=max_rows, range_rows=range_rows)
        starts = torch.zeros((num_experts, num_adapters), dtype=torch.long)  # of each pair's rows
        end = 0
        for expert_range in ranges:
            num_pairs = expert_range.num_experts * num_adapters
            each = expert_range.rows_each // num_adapters
            first_rows = end + each * torch.arange(num_pairs)
            starts[expert_range.first : expert_range.first + expert_range.num_experts] = (
                first_rows.view(-1, num_adapters)
            )
            end += num_pairs * each
        shift = starts.flatten().to(counts.device) - (counts.cumsum(0) - counts)
        place_S = torch.arange(len(order_S), device=order_S.device) + shift[pairs_S]
        padded_S = order_S.new_full((end,), num_tokens * top_k)
        padded_S[place_S] = order_S
        return cls(padded_S, pairs_S, counts, num_tokens, top_k, ranges, num_adapters)

    @classmethod
    def pad(cls, experts_TK: torch.Tensor, num_experts: int) -> SortedRows:
        """Give every expert as many rows as the busiest has: one range, by fewer calls than a sort
        and a plan, and none to be recorded wrongly (`sampling/traced_step.py`).
        """
        num_tokens, top_k = experts_TK.shape
        experts_S = experts_TK.reshape(-1)
        order_S = (_scripted_pad() if torch.jit.is_tracing() else pad_rows)(experts_S, num_experts)
        return cls(
            order_S,
            experts_S,
            experts_S.new_empty(0),
            num_tokens,
            top_k,
            [ExpertRange(0, num_experts, -1)],
        )

    @functools.cached_property
    def tokens_S(self) -> torch.Tensor:
        """Each row's token; padding has the last one's."""
        return (self.order_S // self.top_k).clamp_(max=self.num_tokens - 1)

    def take(self, values_TK: torch.Tensor) -> torch.Tensor:
        """Return each row's value of the router's choices, (S,); 0 for padding."""
        return F.pad(values_TK.reshape(-1), (0, 1))[self.order_S]

    def put_back(self, values_S: torch.Tensor, like_TK: torch.Tensor) -> torch.Tensor:
        """Return values by row as values by choice, (T, top_k)."""
        values = values_S.new_empty(like_TK.numel() + 1, dtype=like_TK.dtype)
        values[self.order_S] = values_S.to(like_TK.dtype)
        return values[:-1].view_as(like_TK)

    def sum_tokens(self, y_SN: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Return the sum of each token's rows, (T, N), always in the same order, which a GPU's
        ``index_add_`` does not keep.
        """
        back = self.order_S.new_empty(self.num_tokens * self.top_k + 1)
        back[self.order_S] = torch.arange(self.order_S.shape[0], device=back.device)
        y_TKN = y_SN[back[:-1]].view(self.num_tokens, self.top_k, y_SN.shape[1])
        return y_TKN.sum(dim=1, dtype=dtype)

    def blocks(self) -> Iterator[AdjacentExperts | AllExperts]:
        """Yield blocks that together are all rows: one for all experts, or one for each range."""
        if self.ranges is None:
            yield AllExperts(self)
            return
        if [expert_range.rows_each for expert_range in self.ranges] == [-1]:
            yield AdjacentExperts(self, self.ranges[0], slice(None))
            return
        start = 0
        for expert_range in self.ranges:
            end = start + expert_range.num_experts * expert_range.rows_each
            yield AdjacentExperts(self, expert_range, slice(start, end))
            start = end


def pad_rows(experts_S: torch.Tensor, num_experts: int) -> torch.Tensor:
    """Return where each row stood, expert by expert with as many rows for each as the busiest
    has, and S for padding.
    """
    is_expert_SE = experts_S[:, None] == torch.arange(num_experts, device=experts_S.device)
    # from 1, among the expert's rows
    place_S = is_expert_SE.cumsum(0).gather(1, experts_S[:, None])[:, 0]
    rows_each, num, device = int(place_S.max()), experts_S.numel(), experts_S.device
    order = torch.full((num_experts * rows_each,), num, dtype=torch.long, device=device)
    order[experts_S * rows_each + place_S - 1] = torch.arange(num, device=device)
    return order


@functools.cache
def _scripted_pad() -> Any:
    """As a trace records it: the number of rows for each is found anew at each replay."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(pad_rows)


class AdjacentExperts:
    """The rows of a range of experts: a batch of plain products, whatever the number format. What
    they make fits the processor's cache.

    A processor that multiplies 16-bit numbers only by emulation, tens of times slower, is given the
    experts in float32.
    """

    def __init__(
        self,
        sorted_rows: SortedRows,
        expert_range: ExpertRange,
        rows: slice,
        *,
        num_adapters: int = 1,
    ) -> None:
        first, num = expert_range.first * num_adapters, expert_range.num_experts * num_adapters
        self.experts = slice(first, first + num)
        self._shape = (num, expert_range.rows_each // num_adapters)
        self.rows = rows
        self.tokens = sorted_rows.tokens_S[self.rows]
        self._made_of = sorted_rows, expert_range

    @functools.cached_property
    def by_adapter(self) -> AdjacentExperts:
        """The same rows by pair of expert and adapter."""
        sorted_rows, expert_range = self._made_of
        return AdjacentExperts(
            sorted_rows, expert_range, self.rows, num_adapters=sorted_rows.num_adapters
        )

    def times(
        self, x_SK: torch.Tensor, w_EKN: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return each row times its expert's matrix, (rows, N)."""
        x_gmK, w_gKN = self._by_expert(x_SK), w_EKN[self.experts]
        if emulates_products(w_gKN):
            product = torch.bmm(x_gmK.float(), w_gKN.float()).to(w_gKN.dtype).flatten(0, 1)
            return product if out is None else out.copy_(product)
        out_gmN = None if out is None else self._by_expert(out)
        return torch.bmm(x_gmK, w_gKN, out=out_gmN).flatten(0, 1)

    def add_times_(
        self, y_SN: torch.Tensor, x_SK: torch.Tensor, w_EKN: torch.Tensor, scale: float
    ) -> None:
        """Add ``scale`` times that product to ``y_SN``."""
        if emulates_products(y_SN):
            y_SN.add_(self.times(x_SK, w_EKN), alpha=scale)
        else:
            self._by_expert(y_SN).baddbmm_(self._by_expert(x_SK), w_EKN[self.experts], alpha=scale)

    def put_outer_(
        self, sum_EMN: torch.Tensor, a_SM: torch.Tensor, b_SN: torch.Tensor, scale: float
    ) -> None:
        """Write ``scale`` times the sum over rows of a times b, (M, N), for each expert."""
        a_gMm, b_gmN = self._by_expert(a_SM).mT, self._by_expert(b_SN)
        if emulates_products(a_SM):
            sum_EMN[self.experts] = torch.bmm(a_gMm.float(), b_gmN.float()).mul_(scale)
        else:
            torch.bmm(a_gMm, b_gmN, out=sum_EMN[self.experts]).mul_(scale)

    def add_to_tokens_(self, sum_TN: torch.Tensor, y_SN: torch.Tensor) -> None:
        """Add each row to its token."""
        sum_TN.index_add_(0, self.tokens, y_SN.to(sum_TN.dtype))

    def per_row(self, values_EN: torch.Tensor) -> torch.Tensor:
        """Return what each row's expert has, (rows, N)."""
        rows_each = self.tokens.shape[0] // self._shape[0]
        return values_EN[self.experts].repeat_interleave(rows_each, dim=0)

    def _by_expert(self, x_SK: torch.Tensor) -> torch.Tensor:
        return x_SK.unflatten(0, self._shape)


class AllExperts:
    """All rows at once, by grouped products (`torch.nn.functional.grouped_mm`)."""

    def __init__(self, sorted_rows: SortedRows, *, num_adapters: int = 1) -> None:
        self.rows, self.tokens = slice(None), sorted_rows.tokens_S
        self._sorted, self._num_adapters = sorted_rows, num_adapters
        num_together = sorted_rows.num_adapters // num_adapters
        self._counts_E = sorted_rows.num_per_pair.view(-1, num_together).sum(1)
        self._ends_E = self._counts_E.cumsum(0, dtype=torch.int32)

    @functools.cached_property
    def by_adapter(self) -> AllExperts:
        """The same rows by pair of expert and adapter."""
        return AllExperts(self._sorted, num_adapters=self._sorted.num_adapters)

    def times(
        self, x_SK: torch.Tensor, w_EKN: torch.Tensor, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        product = F.grouped_mm(x_SK.contiguous(), w_EKN, offs=self._ends_E)
        return product if out is None else out.copy_(product)

    def add_times_(
        self, y_SN: torch.Tensor, x_SK: torch.Tensor, w_EKN: torch.Tensor, scale: float
    ) -> None:
        y_SN.add_(self.times(x_SK, w_EKN), alpha=scale)

    def put_outer_(
        self, sum_EMN: torch.Tensor, a_SM: torch.Tensor, b_SN: torch.Tensor, scale: float
    ) -> None:
        product = F.grouped_mm(a_SM.contiguous().t(), b_SN.contiguous(), offs=self._ends_E)
        is_empty_E = self._counts_E == 0  # the kernel may leave these as they were
        sum_EMN.copy_(product.masked_fill_(is_empty_E[:, None, None], 0.0).mul_(scale))

    def add_to_tokens_(self, sum_TN: torch.Tensor, y_SN: torch.Tensor) -> None:
        sum_TN.add_(self._sorted.sum_tokens(y_SN, sum_TN.dtype))

    def per_row(self, values_EN: torch.Tensor) -> torch.Tensor:
        return values_EN[self._sorted.pairs_S // (self._sorted.num_adapters // self._num_adapters)]


def _read_counts(num_per_expert_E: torch.Tensor, num_rows: int) -> list[int]:
    """The rows of each expert; where nothing has values, as many for each."""
    if has_values(num_per_expert_E):
        return num_per_expert_E.tolist()
    each, rest = divmod(num_rows, len(num_per_expert_E))
    return [each + (expert < rest) for expert in range(len(num_per_expert_E))]


def can_group(num_rows: int, *weights_EKN: torch.Tensor) -> bool:
    """Whether grouped products take these weights: 16-byte rows, and a number format that they
    know on this device.
    """
    first = weights_EKN[0]
    if num_rows == 0 or first.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
        return False
    if first.device.type == "cuda" and first.dtype != torch.bfloat16:
        return False
    if first.device.type == "cuda" and torch.cuda.get_device_capability(first.device) < (8, 0):
        return False
    widths = [size * w.element_size() for w in weights_EKN for size in w.shape[1:]]
    return all(width % ALIGNMENT_BYTES == 0 for width in widths)


class FewTokens:
    """Decides, in passes of one token for each row, which layers give every expert as many rows as
    the busiest has.

    On a CPU that is one product instead of one for each expert. It pays where most experts have a
    token, or the whole stack is small. A recorded pass (`sampling/traced_step.py`) holds these
    decisions for good, so they depend on the number of tokens alone.
    """

    def __init__(self) -> None:
        self.num_tokens = 0
        self._at_least: dict[int, int | None] = {}  # layer -> tokens from which it pads

    def pads(
        self,
        layer: nn.Module,
        experts_TK: torch.Tensor,
        *weights_EKN: torch.Tensor,
        is_adapted: bool = True,
    ) -> bool:
        """Decide for ``layer``, whose stacks are ``weights_EKN``. A small one without adapters
        is best left to torch.
        """
        if id(layer) not in self._at_least:
            first = weights_EKN[0]
            is_small = sum(w.nbytes for w in weights_EKN) <= MAX_RANGE_BYTES
            at_least = 0 if is_small else -(-first.shape[0] // experts_TK.shape[1])
            self._at_least[id(layer)] = at_least if is_plain_product(first) else None
        found = self._at_least[id(layer)]
        return found is not None and self.num_tokens >= found and (is_adapted or found > 0)

    @property
    def decisions(self) -> tuple[bool, ...]:
        """What was decided for the layers of the pass before."""
        at_least = self._at_least.values()
        return tuple(found is not None and self.num_tokens >= found for found in at_least)


_few_tokens: contextvars.ContextVar[FewTokens | None] = contextvars.ContextVar(
    "few_tokens", default=None
)


@contextlib.contextmanager
def having(few: FewTokens | None) -> Iterator[None]:
    """Within it passes are of few tokens; of any number for None."""
    token = _few_tokens.set(few)
    try:
        yield
    finally:
        _few_tokens.reset(token)


def few_tokens() -> FewTokens | None:
    """What the pass that runs now was said to be."""
    return _few_tokens.get()


def is_plain_product(x: torch.Tensor) -> bool:
    """Whether products of ``x`` are made on a CPU in their own, wide, number format."""
    return x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64)


def emulates_products(x: torch.Tensor) -> bool:
    """Whether this processor has no instructions for products in the number format of ``x``."""
    return x.device.type == "cpu" and x.dtype.itemsize < 4 and not _has_native(x.dtype)


@functools.cache
def _has_native(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def pad_rank(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return ``factor`` with zeros after its rank dimension, up to what grouped products need;
    they change no result.
    """
    multiple = ALIGNMENT_BYTES // factor.element_size()
    missing = -factor.shape[dim] % multiple
    if not missing:
        return factor
    return F.pad(factor, (0, 0, 0, missing) if dim == 1 else (0, missing))
