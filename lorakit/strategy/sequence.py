"""Sequence parallelism as DeepSpeed's Ulysses has it: several processes share each row of tokens.

Each holds some of the positions, and computes everything for them but attention. Around attention
two exchanges turn some positions of all heads into whole rows of some heads, and back (Jacobs et
al. 2023, "DeepSpeed Ulysses", section 3): each process sends 1/N of what it holds to each of the N,
so that the traffic of a process falls with N. Its loss is a sum over its own targets.
"""

from __future__ import annotations

import functools
from types import SimpleNamespace
from typing import Any

import torch
import torch.distributed as dist
from transformers import AttentionInterface, AttentionMaskInterface

from lorakit.errors import ConfigError
from lorakit.model.attention import NAME as BY_DOCUMENT
from lorakit.model.attention import (
    SHARED_ROWS,
    attention_by_document,
    document_mask,
    find_difference,
    packed_logits,
)
from lorakit.model.families import row_sharing_problem
from lorakit.strategy.world import all_gather_object, lift_limits

NAME = "sdpa_shared_rows"


@functools.cache
def sequence_group(sp_size: int) -> dist.ProcessGroup:
    """The processes that share rows with this one: ``sp_size`` neighbours. All processes call
    together, once.

    Raises:
        ConfigError: the processes cannot be divided so.
    """
    check_group_size(sp_size, dist.get_world_size())
    firsts = range(0, dist.get_world_size(), sp_size)
    groups = [dist.new_group(list(range(first, first + sp_size))) for first in firsts]
    lift_limits()
    return groups[dist.get_rank() // sp_size]


def check_group_size(sp_size: int, num_processes: int) -> None:
    """Raise ConfigError where ``num_processes`` cannot share rows in groups of ``sp_size``."""
    if sp_size < 1 or num_processes % sp_size:
        counts = range(1, num_processes + 1)
        fitting = ", ".join(str(count) for count in counts if num_processes % count == 0)
        raise ConfigError(
            f"strategy.sequence_parallel={sp_size}: it must divide the number of processes,"
            f" {num_processes}; choose {fitting}"
        )


def share_rows(model: Any, sp_size: int, max_tokens: int | None = None) -> None:
    """Let ``model`` attend over rows, with examples of ``max_tokens``, that ``sp_size`` processes
    share. All call together.

    Raises:
        ConfigError: the model's heads cannot be divided so, or its logits are not those of whole
            rows.
    """
    group = sequence_group(sp_size)
    problem = row_sharing_problem(model.config, sp_size, max_tokens) or _compare(model, group)
    if found := [problem for problem in all_gather_object(problem) if problem]:
        error = ConfigError(
            f"strategy.sequence_parallel={sp_size} does not work for {type(model).__name__}:"
            f" {found[0]}; set it to 1"
        )
        error.is_of_all = True
        raise error


def _compare(model: Any, group: dist.ProcessGroup) -> str | None:
    """Switch ``model`` over, and return how its logits differ from those of whole rows, or None."""
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation not in ("sdpa", BY_DOCUMENT):
        return f"its attention is {implementation}, not sdpa"
    sp_rank, sp_size, whole = dist.get_rank(group), dist.get_world_size(group), packed_logits(model)
    length = -(-32 // sp_size)  # of a process
    # 30 and 32 tokens
    expected = torch.cat(
        [row[sp_rank * length : (sp_rank + 1) * length] for row in (whole[:30], whole[30:])]
    )
    AttentionInterface.register(NAME, functools.partial(attention_over_shared_rows, group))
    AttentionMaskInterface.register(NAME, document_mask)
    try:
        model.set_attn_implementation(NAME)
        return find_difference(
            packed_logits(model, sp_rank, sp_size), expected, is_exact=model.dtype == torch.float32
        )
    except Exception as error:  # whatever a model does with a mask that it does not know
        return str(error) if isinstance(error, ConfigError) else f"{type(error).__name__}: {error}"


def attention_over_shared_rows(
    group: dist.ProcessGroup,
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As ``attention_by_document``, for shared rows too: the processes of ``group`` each
    hold L of their positions.
    """
    if attention_mask is None or attention_mask.dtype != torch.long or attention_mask.dim() != 2:
        return attention_by_document(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, **kwargs
        )
    if not len(attention_mask) or tuple(attention_mask[0].tolist()) != SHARED_ROWS:
        return attention_by_document(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, **kwargs
        )
    heads, kv_heads, sp_size = query_BHLD.shape[1], key_BGLD.shape[1], dist.get_world_size(group)
    if kv_heads % sp_size == 0:
        copies = 1
    elif sp_size % kv_heads == 0:
        copies = sp_size // kv_heads
    else:
        copies = heads // kv_heads
    whole = [
        _to_whole_rows(tensor.repeat_interleave(count, dim=1) if count > 1 else tensor, group)
        for tensor, count in ((query_BHLD, 1), (key_BGLD, copies), (value_BGLD, copies))
    ]
    per_kv = whole[0].shape[1] // whole[1].shape[1]
    key, value = (
        tensor.repeat_interleave(per_kv, dim=1) if per_kv > 1 else tensor for tensor in whole[1:]
    )
    # heads are repeated already
    bare: Any = SimpleNamespace(is_causal=True, training=module.training)
    documents = attention_mask[1:]
    # an idle batch; every parameter must have a gradient all the same, or ZeRO-3 loses those it has
    if not len(documents):
        documents = torch.tensor([[0, 0, whole[0].shape[2]]])
    attended, _ = attention_by_document(bare, whole[0], key, value, documents, **kwargs)
    return _to_own_positions(attended, group), None


def _to_whole_rows(x_BHlD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, H, L / N, D) in each of N processes to (B, H / N, L, D)."""
    sp_size = dist.get_world_size(group)
    batch, heads, length, width = x_BHlD.shape
    sent = x_BHlD.reshape(batch, sp_size, heads // sp_size, length, width).transpose(0, 1)
    received = _Exchange.apply(sent, group).permute(1, 2, 0, 3, 4)
    return received.reshape(batch, heads // sp_size, sp_size * length, width)


def _to_own_positions(x_BLhD: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
    """(B, L, H / N, D) in each of N processes to (B, L / N, H, D)."""
    sp_size = dist.get_world_size(group)
    batch, length, heads, width = x_BLhD.shape
    sent = x_BLhD.reshape(batch, sp_size, length // sp_size, heads, width).transpose(0, 1)
    received = _Exchange.apply(sent, group).permute(1, 2, 0, 3, 4)
    return received.reshape(batch, length // sp_size, sp_size * heads, width)


class _Exchange(torch.autograd.Function):
    """Entry n of the first dimension goes to process n; gradients go back the same way."""

    @staticmethod
    def forward(ctx: Any, sent: torch.Tensor, group: dist.ProcessGroup) -> torch.Tensor:
        ctx.group = group
        sent = sent.contiguous()
        received = torch.empty_like(sent)
        dist.all_to_all_single(received, sent, group=group)
        return received

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return _Exchange.apply(gradients[0], ctx.group), None
