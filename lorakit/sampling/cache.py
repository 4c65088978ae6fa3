"""Keys and values of the sequences that are being generated, row by row in one tensor per layer.

transformers' caches append to a tensor at each token, which copies all of it; here each row has
room ahead. Rows are contiguous: the last takes the place of one that ends. It is no cache of
transformers' kind but sits in the attention (`model/attention.py:cached_attention`), so a model
needs no other interface for it.

Shapes: R rows, G heads of keys, C tokens of room, D width of a head; B rows at work, H heads.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Hashable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional as F

ROOM = 64  # tokens of room come in multiples of it
RUN_COST_BYTES = 4 << 20  # one more call costs as much as reading so much


def rounded(num_tokens: int) -> int:
    """Return the room that is made for ``length`` tokens."""
    return -(-num_tokens // ROOM) * ROOM


class KVCache:
    """Room for ``max_rows`` sequences, which grows as they do."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}  # layer -> (R, G, C, D)
        self.values: dict[int, torch.Tensor] = {}
        self.num_rows, self.room = 0, 0  # for which there is room in each layer
        # rows and places of a prefill's tokens
        self._fill: tuple[torch.Tensor, torch.Tensor] | None = None
        self._rows_B: torch.Tensor | None = None
        self._lengths_B: torch.Tensor | None = None
        self._blocks: list[_Block] = []
        self._masks: dict[
            tuple[_Block, int | None], torch.Tensor
        ] = {}  # by block and sliding window
        self._windows: dict[int | None, None] = {}  # that layers have; a dict for its order

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.keys, self.values) for t in tensors.values())

    @property
    def block_cost(self) -> int:
        """What one more call costs, in tokens of one layer."""
        bytes_each = max((t[0, :, 0].nbytes for t in self.keys.values()), default=1024)
        return RUN_COST_BYTES // (2 * bytes_each)

    def reserve(
        self,
        num_rows: int,
        num_tokens: int,
        *,
        num_used: int = 0,
        max_cache_tokens: int | None = None,
    ) -> None:
        """Make room for that many rows, and that many tokens in each.

        Args:
            num_used: of the first rows, whose tokens, at most ``num_tokens`` each, stay.
            max_cache_tokens: rows times room beyond which what there was room for before is given
                up.
        """
        num_tokens = rounded(num_tokens)
        if num_rows <= self.num_rows and num_tokens <= self.room:
            return
        rows, room = max(num_rows, self.num_rows), max(num_tokens, self.room)
        if max_cache_tokens is not None and rows * room > max_cache_tokens:
            rows, room = num_rows, num_tokens
        self.num_rows, self.room = rows, room
        for tensors in (self.keys, self.values):
            for layer, old in tensors.items():
                tensors[layer] = self._make(old)
                kept = old[:num_used, :, :room]
                tensors[layer][:num_used, :, : kept.shape[2]] = kept

    def clear(self) -> None:
        """Give the memory back."""
        self.keys.clear()
        self.values.clear()
        self.num_rows = self.room = 0

    def _make(self, like: torch.Tensor) -> torch.Tensor:
        # Zeros: what a mask excludes is multiplied by 0 all the same, and must be finite.
        return like.new_zeros((self.num_rows, like.shape[1], self.room, like.shape[3]))

    def prefill(self, rows: Sequence[int], lengths: Sequence[int], device: torch.device) -> None:
        """What is computed next are packed prompts, each for its row."""
        row_T = [row for row, length in zip(rows, lengths, strict=True) for _ in range(length)]
        places_T = [place for length in lengths for place in range(length)]
        self._fill = (torch.tensor(row_T, device=device), torch.tensor(places_T, device=device))

    def decode(self, lengths: Sequence[int], device: torch.device) -> torch.Tensor:
        """What is computed next is one token for each of the first rows, which have ``lengths``
        tokens so far: its places, (B,).
        """
        self._fill = None
        self._lengths_B = torch.tensor(lengths, device=device)
        self._rows_B = torch.arange(len(lengths), device=device)
        self._blocks, self._masks = cut_blocks(lengths, self.block_cost), {}
        for like in itertools.islice(self.keys.values(), 1):
            for block, sliding_window in itertools.product(self._blocks, self._windows):
                self._mask(block, sliding_window, like)
        return self._lengths_B

    def permute(self, order: Sequence[int]) -> None:
        """Let row ``order[i]`` become row i."""
        index = list(order)
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[: len(index)] = tensor[index]

    def copy_row(self, source: int, targets: Sequence[int], num_tokens: int) -> None:
        """Give ``targets`` the first ``num_tokens`` tokens of ``source``."""
        for tensors in (self.keys, self.values):
            for tensor in tensors.values():
                tensor[list(targets), :, :num_tokens] = tensor[source, :, :num_tokens]

    # ---- for recorded passes (`sampling/traced_step.py`)

    def step_kind(self) -> Hashable | None:
        """What is the same in all passes of one token for each row that a recording stands for;
        None where there is none for it.
        """
        has_masks = len(self._masks) == len(self._blocks) * len(self._windows)
        if not self.keys or not has_masks or self._fill is not None:
            return None
        return (
            len(self._blocks),
            *self.keys,
            *self._windows,
            next(iter(self.keys.values())).dtype,
        )

    def step_tensors(self) -> list[torch.Tensor]:
        """What such a pass reads and writes."""
        assert self._rows_B is not None and self._lengths_B is not None
        return [
            self._rows_B,
            self._lengths_B,
            *self._masks.values(),
            *self.keys.values(),
            *self.values.values(),
        ]

    @contextlib.contextmanager
    def static_inputs(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within it these are used instead of ``step_tensors``."""
        before = self._rows_B, self._lengths_B, self._masks, self.keys, self.values
        rest = iter(tensors)
        self._rows_B, self._lengths_B = next(rest), next(rest)
        self._masks = {name: next(rest) for name in self._masks}
        self.keys = {name: next(rest) for name in self.keys}
        self.values = {name: next(rest) for name in self.values}
        try:
            yield
        finally:
            self._rows_B, self._lengths_B, self._masks, self.keys, self.values = before

    # ---- called by each layer's attention

    def take(
        self,
        module: torch.nn.Module,
        query_BHLD: torch.Tensor,
        key_BGLD: torch.Tensor,
        value_BGLD: torch.Tensor,
        *,
        scaling: float | None = None,
        sliding_window: int | None = None,
        **kwargs: Any,
    ) -> torch.Tensor | None:
        """Keep keys and values; return what one token of each row attends to, (B, 1, H, D), or
        None for a prefill.
        """
        layer = int(cast(Any, module).layer_idx)
        for tensors, new in ((self.keys, key_BGLD), (self.values, value_BGLD)):
            if layer not in tensors:
                tensors[layer] = self._make(new)
            if self._fill is not None:
                at, tokens = self._fill, new[0].transpose(0, 1)
            else:
                assert self._rows_B is not None and self._lengths_B is not None
                at, tokens = (self._rows_B, self._lengths_B), new[:, :, 0]
            # no assignment, whose shape a recording would hold for good
            tensors[layer].transpose(1, 2).index_put_(at, tokens)
        if self._fill is not None:
            return None
        batch, heads, _, width = query_BHLD.shape
        keys, values = self.keys[layer], self.values[layer]
        # The heads that share keys take the dimension of positions: no key is copied for them.
        query = query_BHLD.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
        attended: list[torch.Tensor] = []
        self._windows.setdefault(sliding_window)
        first = 0
        for block in self._blocks:
            mask = self._mask(block, sliding_window, query)
            # of the mask: recordings follow it
            rows, places = slice(first, first + mask.shape[0]), slice(0, mask.shape[3])
            attended.append(
                _attend(query[rows], keys[rows, :, places], values[rows, :, places], mask, scaling)
            )
            first = first + mask.shape[0]
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        return out.reshape(batch, 1, heads, values.shape[3])

    def _mask(self, block: _Block, sliding_window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(rows, 1, 1, longest + 1): what is at or before each row's new token, in the window."""
        if (block, sliding_window) not in self._masks:
            assert self._lengths_B is not None
            places = torch.arange(block.longest + 1, device=like.device)
            last = self._lengths_B[block.first : block.end, None]
            seen = places <= last
            if sliding_window is not None:
                seen &= places > last - sliding_window
            bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(
                ~seen, float("-inf")
            )
            self._masks[block, sliding_window] = bias[:, None, None]
        return self._masks[block, sliding_window]


def _attend(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    mask: torch.Tensor,
    scaling: float | None,
) -> torch.Tensor:
    if query.device.type != "cpu" or query.dtype != torch.float32:
        return F.scaled_dot_product_attention(query, keys, values, mask, scale=scaling)
    # torch's kernel for CPUs cuts its work by positions of the query, of which there are one or two
    # here: half as fast as products.
    scores = torch.matmul(query * (scaling or query.shape[-1] ** -0.5), keys.mT).add_(mask)
    return torch.matmul(scores.softmax(dim=-1), values)


@dataclass(frozen=True)
class _Block:
    """Adjacent rows that attend together, over as many places as the longest needs."""

    first: int
    end: int
    longest: int


def cut_blocks(lengths: Sequence[int], block_cost: int) -> list[_Block]:
    """Cut rows into blocks of like length: what is read beyond a row's own tokens costs as much as
    if it were its own.
    """
    blocks: list[_Block] = []
    first = longest = held = 0
    for row, length in enumerate(lengths):
        widest = max(longest, length)
        if row > first and (row + 1 - first) * widest - held - length > block_cost:
            blocks.append(_Block(first, row, longest))
            first, longest, held = row, length, length
            continue
        longest, held = widest, held + length
    return [*blocks, _Block(first, len(lengths), longest)]


def wasted_tokens(lengths: Sequence[int], block_cost: int) -> int:
    """How many tokens are read in vain, blocks included."""
    blocks = cut_blocks(lengths, block_cost)
    num_read = sum((block.end - block.first) * block.longest for block in blocks)
    return num_read - sum(lengths) + block_cost * (len(blocks) - 1)
