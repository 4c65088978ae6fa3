"""Runs of experts: every row once, padding bounded, and values by row and by choice the same
ones.
"""

from __future__ import annotations

import itertools
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lorakit.lora.grouped import (
    MAX_PADDING,
    READ_ROWS,
    AdapterIds,
    ExpertRange,
    SortedRows,
    cut_ranges,
)


def test_experts_of_about_equal_load_go_together_up_to_the_largest_run() -> None:
    assert cut_ranges([60, 64, 62, 64], max_rows=1024) == [ExpertRange(0, 4, 64)]
    assert cut_ranges([60, 64, 62, 64], max_rows=130) == [
        ExpertRange(0, 2, 64),
        ExpertRange(2, 2, 64),
    ]
    assert cut_ranges([60, 64], max_rows=0) == [ExpertRange(0, 1, 60), ExpertRange(1, 1, 64)]
    assert cut_ranges([4, 40, 5], max_rows=1024) == [
        ExpertRange(0, 1, 4),
        ExpertRange(1, 1, 40),
        ExpertRange(2, 1, 5),
    ]
    # small matrices: a range is dear
    assert cut_ranges([4, 40, 5], max_rows=1024, range_rows=50.0) == [ExpertRange(0, 3, 40)]


def test_an_expert_that_gets_most_rows_goes_alone_and_one_that_gets_none_is_left_out() -> None:
    assert cut_ranges([0, 10, 900, 10, 10, 0], max_rows=1024) == [
        ExpertRange(1, 1, 10),
        ExpertRange(2, 1, 900),
        ExpertRange(3, 2, 10),
    ]
    assert cut_ranges([0, 0], max_rows=9) == [] == cut_ranges([], max_rows=9)


@given(st.lists(st.integers(0, 300), max_size=40), st.sampled_from([0, 100, 1024]))
@settings(deadline=None)
def test_runs_hold_every_row_and_little_else(counts: list[int], max_rows: int) -> None:
    ranges = cut_ranges(counts, max_rows=max_rows)
    assert all(
        any(_holds(expert_range, expert) for expert_range in ranges)
        for expert, count in enumerate(counts)
        if count
    )
    assert all(
        one.first + one.num_experts <= other.first for one, other in itertools.pairwise(ranges)
    )
    for expert_range in ranges:
        loads = counts[expert_range.first : expert_range.first + expert_range.num_experts]
        assert expert_range.rows_each == max(loads) > 0
        assert (
            expert_range.num_experts == 1
            or expert_range.num_experts * expert_range.rows_each <= max_rows
        )
        cost = sum(load + READ_ROWS for load in loads if load)
        assert (
            expert_range.num_experts * (expert_range.rows_each + READ_ROWS) <= MAX_PADDING * cost
            or expert_range.num_experts == 1
        )


def test_values_by_choice_come_back_from_padded_rows() -> None:
    generator = torch.Generator().manual_seed(0)
    experts_TK = torch.rand(50, 7, generator=generator).topk(3).indices
    values_TK = torch.rand(50, 3, generator=generator)
    for grouped in (False, True):
        rows = SortedRows.sort(experts_TK, 9, grouped=grouped, max_rows=1024)
        taken = rows.take(values_TK)
        is_padding = rows.order_S == 150
        assert bool(is_padding.any()) != grouped
        assert bool((taken[is_padding] == 0).all())
        assert torch.equal(rows.put_back(taken, values_TK), values_TK)
        assert torch.equal(
            rows.sum_tokens(taken[:, None], torch.float32)[:, 0], values_TK.sum(dim=1)
        )
        for block in rows.blocks():
            expected = torch.arange(9.0)[:, None] if grouped else None
            assert expected is None or torch.equal(
                block.per_row(expected)[:, 0].long(), experts_TK.flatten().sort().values
            )
    padded = SortedRows.sort(experts_TK, 9, grouped=False, max_rows=1024)
    for block in padded.blocks():
        numbers = block.per_row(torch.arange(9)[:, None])[:, 0]
        for place, expert in zip(
            padded.order_S[block.rows].tolist(), numbers.tolist(), strict=True
        ):
            assert place == 150 or int(experts_TK.flatten()[place]) == expert


def _holds(expert_range: ExpertRange, expert: int) -> bool:
    return expert_range.first <= expert < expert_range.first + expert_range.num_experts


def test_rows_by_owner_pay_where_they_are_even_and_not_where_most_would_be_padding() -> None:
    costs: dict[str, Any] = {"base_cost": 100.0, "factor_cost": 50.0}
    # each token goes to all experts: every owner has as many rows
    even = torch.arange(4).repeat(16, 1)
    adapter_ids = AdapterIds(torch.arange(16) % 4, 4)
    assert adapter_ids.pay(even, 4, **costs, pads=True)
    skewed = (torch.arange(16) % 4)[:, None]  # each owner has an expert of its own
    assert not adapter_ids.pay(skewed, 4, **costs, pads=True) and adapter_ids.pay(
        skewed, 4, **costs, pads=False
    )


@given(st.integers(1, 30), st.integers(1, 4), st.integers(1, 5), st.randoms(use_true_random=False))
def test_rows_by_owner_hold_every_choice_with_its_pair(
    num_tokens: int, num_adapters: int, num_experts: int, draw: Any
) -> None:
    top_k = draw.randint(1, num_experts)
    experts_TK = torch.tensor([draw.sample(range(num_experts), top_k) for _ in range(num_tokens)])
    adapter_ids = AdapterIds(
        torch.tensor([draw.randrange(num_adapters) for _ in range(num_tokens)]), num_adapters
    )
    rows = SortedRows.sort(
        experts_TK, num_experts, grouped=False, max_rows=8, adapter_ids=adapter_ids
    )
    seen = []
    for block in rows.blocks():
        order = rows.order_S[block.rows]
        each = block.by_adapter.per_row(torch.arange(num_experts * num_adapters)[:, None])[:, 0]
        expert = block.per_row(torch.arange(num_experts)[:, None])[:, 0]
        assert torch.equal(each // num_adapters, expert)
        for place, pair in zip(order.tolist(), each.tolist(), strict=True):
            if place < num_tokens * top_k:
                seen.append(place)
                token = place // top_k
                assert pair == int(experts_TK.flatten()[place]) * num_adapters + int(
                    adapter_ids.adapter_ids_T[token]
                )
    assert sorted(seen) == list(range(num_tokens * top_k))
