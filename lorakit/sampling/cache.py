"""Keys and values of the sequences that are being generated, row by row in one tensor per layer.

transformers' caches append to a tensor at each token, which copies all of it; here each row has room ahead. Rows stand close
together: the last takes the place of one that ends. It is no cache of transformers' kind but sits in the attention
(`model/attention.py:cached_attention`), so a model needs no other interface for it.

Shapes: R rows, G heads of keys, C tokens of room, D width of a head; B rows at work, H heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.nn import functional as F

ROOM = 64  # tokens of room come in multiples of it
RUN_COST_BYTES = 2 << 20  # one more call costs as much as reading so much


def rounded(num_tokens: int) -> int:
    """Return the room that is made for so many tokens."""
    return -(-num_tokens // ROOM) * ROOM


class KVCache:
    """Room for ``max_rows`` sequences, which grows as they do."""

    def __init__(self) -> None:
        self.keys: dict[int, torch.Tensor] = {}  # layer -> (R, G, C, D)
        self.values: dict[int, torch.Tensor] = {}
        self.num_rows, self.room = 0, 0  # for which there is room in each layer
        self._fill: tuple[torch.Tensor, torch.Tensor] | None = None  # rows and places of a prefill's tokens
        self._rows_B: torch.Tensor | None = None
        self._lengths_B: torch.Tensor | None = None
        self._lengths: list[int] = []
        self._runs: list[_Run] = []
        self._masks: dict[tuple[_Run, int | None], torch.Tensor] = {}  # by run and window

    @property
    def num_bytes(self) -> int:
        return sum(t.nbytes for tensors in (self.keys, self.values) for t in tensors.values())

    @property
    def run_cost(self) -> int:
        """What one more call costs, in tokens of one layer."""
        bytes_each = max((t[0, :, 0].nbytes for t in self.keys.values()), default=1024)
        return RUN_COST_BYTES // (2 * bytes_each)

    def reserve(self, num_rows: int, num_tokens: int) -> None:
        """Make room for so many rows, and so many tokens in each; what there is stays."""
        num_tokens = rounded(num_tokens)
        if num_rows <= self.num_rows and num_tokens <= self.room:
            return
        self.num_rows, self.room = max(num_rows, self.num_rows), max(num_tokens, self.room)
        for tensors in (self.keys, self.values):
            for layer, old in tensors.items():
                tensors[layer] = self._make(old)
                tensors[layer][: old.shape[0], :, : old.shape[2]] = old

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
        """What is computed next is one token for each of the first rows, which have ``lengths`` tokens so far: its places, (B,)."""
        self._fill, self._lengths = None, list(lengths)
        self._lengths_B = torch.tensor(lengths, device=device)
        self._rows_B = torch.arange(len(lengths), device=device)
        self._runs, self._masks = plan_runs(lengths, self.run_cost), {}
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

    # ---- called by each layer's attention

    def take(
        self, module: torch.nn.Module, query_BHLD: torch.Tensor, key_BGLD: torch.Tensor, value_BGLD: torch.Tensor, *,
        scaling: float | None = None, sliding_window: int | None = None, **kwargs: Any,
    ) -> torch.Tensor | None:  # fmt: skip
        """Keep keys and values; return what one token of each row attends to, (B, 1, H, D), or None for a prefill."""
        layer = int(cast(Any, module).layer_idx)
        for tensors, new in ((self.keys, key_BGLD), (self.values, value_BGLD)):
            if layer not in tensors:
                tensors[layer] = self._make(new)
            if self._fill is not None:
                rows_T, places_T = self._fill
                tensors[layer][rows_T, :, places_T] = new[0].transpose(0, 1)
            else:
                assert self._rows_B is not None and self._lengths_B is not None
                tensors[layer][self._rows_B, :, self._lengths_B] = new[:, :, 0]
        if self._fill is not None:
            return None
        batch, heads, _, width = query_BHLD.shape
        keys, values = self.keys[layer], self.values[layer]
        # The heads that share keys stand in the place of positions: no key is copied for them.
        query = query_BHLD.reshape(batch, keys.shape[1], heads // keys.shape[1], width)
        attended = []
        for run in self._runs:
            rows, places = slice(run.first, run.end), slice(0, run.longest + 1)
            mask = self._mask(run, sliding_window, query)
            attended.append(
                F.scaled_dot_product_attention(query[rows], keys[rows, :, places], values[rows, :, places], mask, scale=scaling)
            )
        out = attended[0] if len(attended) == 1 else torch.cat(attended)
        return out.reshape(batch, 1, heads, values.shape[3])

    def _mask(self, run: _Run, window: int | None, like: torch.Tensor) -> torch.Tensor:
        """(rows, 1, 1, longest + 1): what stands at or before each row's new token, and within the window."""
        if (run, window) not in self._masks:
            assert self._lengths_B is not None
            places, last = torch.arange(run.longest + 1, device=like.device), self._lengths_B[run.first : run.end, None]
            seen = places <= last
            if window is not None:
                seen &= places > last - window
            bias = torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, float("-inf"))
            self._masks[run, window] = bias[:, None, None]
        return self._masks[run, window]


@dataclass(frozen=True)
class _Run:
    """Adjacent rows that attend together, over as many places as the longest needs."""

    first: int
    end: int
    longest: int


def plan_runs(lengths: Sequence[int], run_cost: int) -> list[_Run]:
    """Cut rows into runs of like length: what is read beyond a row's own tokens costs as much as if it were its own."""
    runs: list[_Run] = []
    first = longest = held = 0
    for row, length in enumerate(lengths):
        widest = max(longest, length)
        if row > first and (row + 1 - first) * widest - held - length > run_cost:
            runs.append(_Run(first, row, longest))
            first, longest, held = row, length, length
            continue
        longest, held = widest, held + length
    return [*runs, _Run(first, len(lengths), longest)]


def wasted_tokens(lengths: Sequence[int], run_cost: int) -> int:
    """How many tokens are read in vain, runs included."""
    runs = plan_runs(lengths, run_cost)
    return sum((run.end - run.first) * run.longest for run in runs) - sum(lengths) + run_cost * (len(runs) - 1)
