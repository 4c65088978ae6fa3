"""The factors of several adapters side by side, for rows of each in one pass.

The factors form one adapter of the summed rank, and a gate lets each token have the columns of
its own:

    y = x W + ((x [A_1; A_2; …]') * gate) [s_1 B_1, s_2 B_2, …]'

so that the base's products, and ours, are as few as for one adapter. What a gate excludes adds
exact zeros. Scales go into B in float32: in a gate of 16 bit most would be rounded, and an adapter
would be another in company. Where tokens are many, layers have the factors one over the other
instead, and a batch of products with the tokens of each (as Punica groups them, arXiv 2310.18547,
section 4); experts' rows are sorted by adapter for it (`lora/grouped.py:AdapterIds`).
"""

from __future__ import annotations

import contextlib
from collections.abc import Hashable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn import functional as F

from lorakit.lora.flat_parameters import FlatParameters, Key
from lorakit.lora.grouped import AdapterIds


class Adapter:
    """One adapter's numbers, a float32 vector, with its factors as views. ``trains``: passes
    make gradients for them.
    """

    def __init__(
        self, layout: FlatParameters, vector: torch.Tensor, *, trains: bool = False
    ) -> None:
        self.layout, self.vector = layout, vector
        self.factors = layout.views(vector)
        if trains:
            self.factors = {
                key: (a.requires_grad_(), b.requires_grad_())
                for key, (a, b) in self.factors.items()
            }

    @property
    def leaves(self) -> list[torch.Tensor]:
        """A and B of each matrix, in the vector's order."""
        return [factor for pair in self.factors.values() for factor in pair]


# What a pass asks for -> A and B side by side, and whose columns they are; None where no adapter
# has it.
_Pairs = dict[tuple[Key, torch.dtype], tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]] | None]


class AdapterBatch:
    """Adapters side by side, and which token of a pass has which. None stands for the base alone.

    Args:
        adapter_ids_T: for each token of a pass, flattened, the number of its adapter; None where
            there is one adapter.
        like: a batch that went through the same model; what passes ask for is then laid side by
            side at once.
        is_sorted: give linear layers each adapter's tokens by themselves, which pays where tokens
            are many.
    """

    def __init__(
        self,
        adapters: Sequence[Adapter | None],
        adapter_ids_T: torch.Tensor | None,
        *,
        like: AdapterBatch | None = None,
        is_sorted: bool = False,
    ) -> None:
        assert adapter_ids_T is not None or len(adapters) == 1
        self.is_sorted = is_sorted and adapter_ids_T is not None
        self._stacks: dict[tuple[Key, torch.dtype], Stacked | None] = {}
        self.adapters, self.adapter_ids_T = tuple(adapters), adapter_ids_T
        self.adapter_ids = (
            AdapterIds(adapter_ids_T, len(self.adapters))
            if adapter_ids_T is not None and is_sorted
            else None
        )
        self._pairs: _Pairs = {}
        for key, dtype in like._pairs if like is not None else ():
            self._pairs[key, dtype] = self._lay(key, dtype)
        self._places: dict[tuple[Any, ...], tuple[torch.Tensor | None, torch.Tensor]] = {}
        self._gates: dict[tuple[Any, ...], torch.Tensor] = {}

    def with_adapter_ids(self, adapter_ids_T: torch.Tensor | None) -> AdapterBatch:
        """Return the same adapters, laid side by side already, for other tokens."""
        other = AdapterBatch(self.adapters, adapter_ids_T)
        other._pairs = self._pairs
        return other

    def pair(
        self, key: Key, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, float | torch.Tensor] | None:
        """Return A, B and the gate (T, R), or the scale where there is one adapter; None where
        none adapts ``key``.
        """
        if (key, dtype) not in self._pairs:
            self._pairs[key, dtype] = self._lay(key, dtype)
        if (found := self._pairs[key, dtype]) is None:
            return None
        a, b, columns = found
        return a, b, self._gate(columns) if self.adapter_ids_T is not None else columns[0][2]

    def stacked(self, key: Key, dtype: torch.dtype) -> Stacked | None:
        """Return the factors of ``key`` one adapter over the other, with the tokens of each;
        None where none adapts it.
        """
        if (key, dtype) not in self._stacks:
            self._stacks[key, dtype] = self._stack(key, dtype)
        return self._stacks[key, dtype]

    def _stack(self, key: Key, dtype: torch.dtype) -> Stacked | None:
        assert self.adapter_ids_T is not None
        if not (present := self._having(key)):
            return None
        a, b = _one_over_the_other([adapter for _, adapter in present], key, dim=0)
        numbers = tuple(n for n, _ in present)
        if numbers not in self._places:
            self._places[numbers] = _places(self.adapter_ids_T, numbers)
        return Stacked(a.to(dtype), b.to(dtype), *self._places[numbers])

    def by_adapter(self, key: Key) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Return A (E * n, r, in) and B (E * n, out, r) of ``key``, a stack of experts: for each
        pair of expert and adapter, n in all.

        Those of an adapter that has none are zeros. None where none adapts it.
        """
        if not self._having(key):
            return None
        a, b = _one_over_the_other(self.adapters, key, dim=1)
        return a.flatten(0, 1), b.flatten(0, 1)

    # ---- for recorded passes (`sampling/traced_step.py`)

    def structure(self) -> Hashable | None:
        """What of the adapters a recording holds for good, or None before the first pass: their
        numbers it does not.
        """
        if not self._pairs:
            return None
        scale = None if self.adapter_ids_T is not None else 0
        return tuple(
            (key, dtype, found and (scale is None or found[2][0][2]))
            for (key, dtype), found in self._pairs.items()
        )

    def tensors(self) -> list[torch.Tensor]:
        """What a pass reads: the factors, and the gates of the columns that they have."""
        pairs = [found for found in self._pairs.values() if found is not None]
        if self.adapter_ids_T is None:
            return [factor for a, b, _ in pairs for factor in (a, b)]
        return [tensor for a, b, columns in pairs for tensor in (a, b, self._gate(columns))]

    @contextlib.contextmanager
    def static_inputs(self, tensors: Sequence[torch.Tensor]) -> Iterator[None]:
        """Within it these are used instead of ``tensors()``."""
        rest, before = iter(tensors), (self._pairs, self._gates)
        pairs: _Pairs = {}
        gates: dict[tuple[Any, ...], torch.Tensor] = {}
        for place, (name, found) in enumerate(self._pairs.items()):
            if found is None:
                pairs[name] = None
                continue
            columns = (
                found[2] if self.adapter_ids_T is None else (*found[2], place)
            )  # each its own gate
            pairs[name] = next(rest), next(rest), columns
            if self.adapter_ids_T is not None:
                gates[columns] = next(rest)
        self._pairs, self._gates = pairs, gates
        try:
            yield
        finally:
            self._pairs, self._gates = before

    def _lay(
        self, key: Key, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor, tuple[Any, ...]] | None:
        if not (present := self._having(key)):
            return None
        columns = tuple(
            (n, adapter.layout.slots[key].rank, adapter.layout.slots[key].scale)
            for n, adapter in present
        )
        if len(self.adapters) == 1:
            a, b = present[0][1].factors[key]
            return a.to(dtype), b.to(dtype), columns
        pairs = [_scaled(adapter, key) for _, adapter in present]
        return (
            torch.cat([a for a, _ in pairs], dim=-2).to(dtype),
            torch.cat([b for _, b in pairs], dim=-1).to(dtype),
            columns,
        )

    def _having(self, key: Key) -> list[tuple[int, Adapter]]:
        """The adapters of ``key``, with their numbers."""
        return [
            (n, adapter)
            for n, adapter in enumerate(self.adapters)
            if adapter is not None and key in adapter.factors
        ]

    def _gate(self, columns: tuple[Any, ...]) -> torch.Tensor:
        """1 where a token meets its own adapter's columns, else 0, (T, R)."""
        if columns not in self._gates:
            assert self.adapter_ids_T is not None
            adapter_ids_R = torch.tensor(
                [n for n, rank, _ in columns for _ in range(rank)], device=self.adapter_ids_T.device
            )
            self._gates[columns] = (self.adapter_ids_T[:, None] == adapter_ids_R).float()
        return self._gates[columns]


def _scaled(adapter: Adapter, key: Key) -> tuple[torch.Tensor, torch.Tensor]:
    """A and s B."""
    (a, b), scale = adapter.factors[key], adapter.layout.slots[key].scale
    return a, b if scale == 1 else b * scale


def _one_over_the_other(
    adapters: Sequence[Adapter | None], key: Key, dim: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """A and s B of all ``adapters`` along a new dimension, zero-padded to the largest rank."""
    pairs = [_scaled(x, key) if x is not None and key in x.factors else None for x in adapters]
    a, b = max((pair for pair in pairs if pair is not None), key=lambda pair: pair[0].shape[-2])
    widest = a.shape[-2]
    nothing = a.new_zeros(a.shape), b.new_zeros(b.shape)
    filled = [
        nothing
        if pair is None
        else pair
        if (missing := widest - pair[0].shape[-2]) == 0
        else (F.pad(pair[0], (0, 0, 0, missing)), F.pad(pair[1], (0, missing)))
        for pair in pairs
    ]
    return torch.stack([a for a, _ in filled], dim), torch.stack([b for _, b in filled], dim)


class Stacked(NamedTuple):
    """Factors of n adapters, and the tokens of each, at most M, of which there are T in all."""

    a_nRI: torch.Tensor
    b_nOR: torch.Tensor
    # which tokens they are; None where they are all tokens in their order
    places_nM: torch.Tensor | None
    gate_nM1: torch.Tensor  # 1; 0 where a place is filled up

    def add_to(self, output_TO: torch.Tensor, x_TI: torch.Tensor) -> torch.Tensor:
        """Return ``output_TO`` with what the adapters make of ``x_TI``."""
        num_adapters = len(self.a_nRI)
        x_nMI = (
            x_TI.unflatten(0, (num_adapters, -1))
            if self.places_nM is None
            else x_TI[self.places_nM]
        )
        narrow = torch.bmm(x_nMI, self.a_nRI.mT) * self.gate_nM1.to(x_TI.dtype)
        if self.places_nM is None:
            return torch.baddbmm(
                output_TO.unflatten(0, (num_adapters, -1)), narrow, self.b_nOR.mT
            ).flatten(0, 1)
        return output_TO.index_add(
            0, self.places_nM.flatten(), torch.bmm(narrow, self.b_nOR.mT).flatten(0, 1)
        )


def _places(
    adapter_ids_T: torch.Tensor, adapters: Sequence[int]
) -> tuple[torch.Tensor | None, torch.Tensor]:
    """The tokens of each of ``adapters``, filled up with its last one, and their gate."""
    tokens = [(adapter_ids_T == number).nonzero()[:, 0] for number in adapters]
    place_M = torch.arange(max(map(len, tokens)), device=adapter_ids_T.device)
    places_nM = torch.stack([own[place_M.clamp(max=len(own) - 1)] for own in tokens])
    gate_nM = torch.stack([(place_M < len(own)).float() for own in tokens])
    all_T = torch.arange(len(adapter_ids_T), device=adapter_ids_T.device)
    is_plain = places_nM.numel() == len(adapter_ids_T) and torch.equal(places_nM.flatten(), all_T)
    return None if is_plain else places_nM, gate_nM[:, :, None]
