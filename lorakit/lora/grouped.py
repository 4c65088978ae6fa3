"""Products over rows that are sorted by expert: of one expert at a time, or of all experts in one grouped product.

Shapes: S rows (token, expert pairs), T tokens, E experts, K and N inner and outer widths.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional as F

ALIGNMENT_BYTES = 16  # of a row, for grouped products


@dataclass(frozen=True)
class SortedRows:
    """The pairs of token and expert, in the order of the experts."""

    order_S: torch.Tensor  # where each sorted row stood: token * top_k + choice
    tokens_S: torch.Tensor
    experts_S: torch.Tensor
    num_per_expert_E: torch.Tensor
    top_k: int

    @classmethod
    def sort(cls, experts_TK: torch.Tensor, num_experts: int) -> SortedRows:
        """Sort the router's choices, (T, top_k)."""
        top_k = experts_TK.shape[1]
        experts_S, order_S = experts_TK.reshape(-1).sort(stable=True)
        counts = torch.zeros(num_experts, dtype=torch.int32, device=experts_S.device)
        counts.scatter_add_(0, experts_S, torch.ones_like(experts_S, dtype=torch.int32))
        return cls(order_S, order_S // top_k, experts_S, counts, top_k)

    def blocks(self, *, grouped: bool) -> Iterator[OneExpert | AllExperts]:
        """Yield blocks of rows that together are all rows: one for all experts, or one for each expert that has a row."""
        if grouped:
            yield AllExperts(self)
            return
        start = 0
        for expert, count in enumerate(self.num_per_expert_E.tolist()):
            if count:
                yield OneExpert(self, expert, slice(start, start + count))
                start += count


class OneExpert:
    """The rows of one expert: plain products, whatever the number format. What they make fits the processor's cache.

    A processor that multiplies 16-bit numbers only by emulation, tens of times slower, is given this one expert in float32.
    """

    def __init__(self, sorted_rows: SortedRows, expert: int, rows: slice) -> None:
        self.expert, self.rows = expert, rows
        self.tokens = sorted_rows.tokens_S[rows]

    def times(self, x_SK: torch.Tensor, w_EKN: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        """Return each row times its expert's matrix, (rows, N)."""
        w_KN = w_EKN[self.expert]
        if emulates_products(w_KN):
            product = (x_SK.float() @ w_KN.float()).to(w_KN.dtype)
            return product if out is None else out.copy_(product)
        return torch.mm(x_SK, w_KN, out=out)

    def add_times_(self, y_SN: torch.Tensor, x_SK: torch.Tensor, w_EKN: torch.Tensor, scale: float) -> None:
        """Add ``scale`` times that product to ``y_SN``."""
        if emulates_products(y_SN):
            y_SN.add_(self.times(x_SK, w_EKN), alpha=scale)
        else:
            y_SN.addmm_(x_SK, w_EKN[self.expert], alpha=scale)

    def put_outer_(self, sum_EMN: torch.Tensor, a_SM: torch.Tensor, b_SN: torch.Tensor, scale: float) -> None:
        """Write ``scale`` times the sum over rows of a times b, (M, N), to the place of each row's expert."""
        if emulates_products(a_SM):
            sum_EMN[self.expert] = (a_SM.float().t() @ b_SN.float()).mul_(scale)
        else:
            torch.mm(a_SM.t(), b_SN, out=sum_EMN[self.expert]).mul_(scale)

    def add_to_tokens_(self, sum_TN: torch.Tensor, y_SN: torch.Tensor) -> None:
        """Add each row to its token."""
        sum_TN.index_add_(0, self.tokens, y_SN.to(sum_TN.dtype))

    def per_row(self, values_EN: torch.Tensor) -> torch.Tensor:
        """Return what each row's expert has, to be broadcast over the rows."""
        return values_EN[self.expert]


class AllExperts:
    """All rows at once, by grouped products (`torch.nn.functional.grouped_mm`)."""

    def __init__(self, sorted_rows: SortedRows) -> None:
        self.rows, self.tokens = slice(None), sorted_rows.tokens_S
        self._sorted = sorted_rows
        self._ends_E = sorted_rows.num_per_expert_E.cumsum(0, dtype=torch.int32)

    def times(self, x_SK: torch.Tensor, w_EKN: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
        product = F.grouped_mm(x_SK.contiguous(), w_EKN, offs=self._ends_E)
        return product if out is None else out.copy_(product)

    def add_times_(self, y_SN: torch.Tensor, x_SK: torch.Tensor, w_EKN: torch.Tensor, scale: float) -> None:
        y_SN.add_(self.times(x_SK, w_EKN), alpha=scale)

    def put_outer_(self, sum_EMN: torch.Tensor, a_SM: torch.Tensor, b_SN: torch.Tensor, scale: float) -> None:
        product = F.grouped_mm(a_SM.contiguous().t(), b_SN.contiguous(), offs=self._ends_E)
        is_empty_E = self._sorted.num_per_expert_E == 0  # the kernel may leave these as they were
        sum_EMN.copy_(product.masked_fill_(is_empty_E[:, None, None], 0.0).mul_(scale))

    def add_to_tokens_(self, sum_TN: torch.Tensor, y_SN: torch.Tensor) -> None:
        """Add each row to its token; not by ``index_add_``, whose order of summation differs from run to run on a GPU."""
        back_S = torch.empty_like(self._sorted.order_S)
        back_S[self._sorted.order_S] = torch.arange(len(back_S), device=back_S.device)
        sum_TN.add_(y_SN[back_S].view(sum_TN.shape[0], self._sorted.top_k, -1).sum(dim=1, dtype=sum_TN.dtype))

    def per_row(self, values_EN: torch.Tensor) -> torch.Tensor:
        return values_EN[self._sorted.experts_S]


def can_group(rows: SortedRows, *weights_EKN: torch.Tensor) -> bool:
    """Whether grouped products take these weights: 16-byte rows, and a number format that they know on this device."""
    first = weights_EKN[0]
    if len(rows.order_S) == 0 or first.dtype == torch.float64 or not hasattr(F, "grouped_mm"):
        return False
    is_cuda = first.device.type == "cuda"
    if is_cuda and (first.dtype != torch.bfloat16 or torch.cuda.get_device_capability(first.device) < (8, 0)):
        return False
    return all(size * w.element_size() % ALIGNMENT_BYTES == 0 for w in weights_EKN for size in w.shape[1:])


def emulates_products(x: torch.Tensor) -> bool:
    """Whether this processor has no instructions for products in the number format of ``x``."""
    return x.device.type == "cpu" and x.dtype.itemsize < 4 and not _has_native(x.dtype)


@functools.cache
def _has_native(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float16 and bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())


def pad_rank(factor: torch.Tensor, dim: int) -> torch.Tensor:
    """Return ``factor`` with zeros behind its rank dimension, up to what grouped products want; they change no result."""
    multiple = ALIGNMENT_BYTES // factor.element_size()
    missing = -factor.shape[dim] % multiple
    if not missing:
        return factor
    return F.pad(factor, (0, 0, 0, missing) if dim == 1 else (0, missing))
