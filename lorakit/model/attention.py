"""Attention of packed rows, document by document: the mask over all pairs of positions is never
made.

transformers isolates packed documents by a (B, 1, L, L) mask, with which
scaled_dot_product_attention computes every pair of a row. Here the mask that travels to the layers
is a list of documents, (D, 3): row, first position, one past the last. Documents of like length are
laid beside one another, padded on the right (which causal attention never sees), and attended
causally at once.

The list is the mask itself, so that a layer that is computed again in the backward pass has it too,
and an attention that does not know it cannot take it for the absence of a mask.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.errors import ConfigError

NAME = "sdpa_by_document"
# what attends by document: the latter is of strategy/sequence.py
BY_DOCUMENT = (NAME, "sdpa_shared_rows")
MAX_PADDING = 0.2  # share of a group of documents
Span = tuple[int, int, int]  # row, first position, one past the last

SHARED_ROWS: Span = (-1, -1, -1)  # stands before the documents of rows that several processes share
_documents: contextvars.ContextVar[Sequence[Span] | None] = contextvars.ContextVar(
    "documents", default=None
)
_cache: contextvars.ContextVar[Any] = contextvars.ContextVar("cache", default=None)


def attend_by_document(model: Any) -> str | None:
    """Give ``model`` this attention instead of sdpa, where its logits stay the same; return
    why not, or None.

    The logits are compared on a small packed batch with documents of several lengths and padding.
    """
    AttentionInterface.register(NAME, attention_by_document)
    AttentionMaskInterface.register(NAME, document_mask)
    implementation = getattr(model.config, "_attn_implementation", None)
    if implementation != "sdpa":
        return f"model.attention is {implementation}"
    expected = packed_logits(model)
    try:
        model.set_attn_implementation(NAME)
        is_exact = model.dtype == torch.float32
        problem = find_difference(packed_logits(model), expected, is_exact=is_exact)
    except Exception as error:  # whatever a model does with a mask that it does not know
        problem = f"{type(error).__name__}: {error}"
    if problem and model.config._attn_implementation == NAME:
        model.set_attn_implementation("sdpa")
    return problem


@contextlib.contextmanager
def attending_by_document(model: Any) -> Iterator[str | None]:
    """Within it ``model`` attends by document; yields why not, or None."""
    before = getattr(model.config, "_attn_implementation", None)
    if before != "sdpa":
        yield None if before in BY_DOCUMENT else f"model.attention is {before}"
        return
    problem = attend_by_document(model)
    try:
        yield problem
    finally:
        if problem is None:
            model.set_attn_implementation(before)


def find_difference(ours: torch.Tensor, expected: torch.Tensor, *, is_exact: bool) -> str | None:
    """Say how far the logits ``ours`` are from those that are ``expected``, or return None where
    they are the same.

    Of all logits together, relative: in bf16 rounding alone moves single ones of a trained model by
    6 % of the largest, and all by 0.3 %, where one document that sees another moves them by 20 %.
    """
    difference = float((ours - expected).norm() / expected.norm())
    if difference <= (1e-4 if is_exact else 0.05):  # not so where it is no number
        return None
    return f"logits differ by {difference:.1e} (relative)"


@torch.no_grad()
def packed_logits(model: Any, sp_rank: int = 0, sp_size: int = 1) -> torch.Tensor:
    """The logits of two rows of 32 positions: documents of 20, 7 and 3, of 32; and 2 positions of
    padding, which are left out.

    ``sp_size`` processes share each row; the logits are those of number ``sp_rank``.
    """
    spans = ((0, 0, 20), (0, 20, 27), (0, 27, 30), (1, 0, 32))
    positions = torch.zeros((2, 32), dtype=torch.long)
    for row, start, end in (*spans, (0, 30, 32)):
        positions[row, start:end] = torch.arange(end - start)
    vocab_size, padded = model.config.get_text_config().vocab_size, -(-32 // sp_size) * sp_size
    tokens = torch.randint(0, vocab_size, (2, 32), generator=torch.Generator().manual_seed(0))
    tokens, positions = (
        torch.nn.functional.pad(tensor, (0, padded - 32)) for tensor in (tokens, positions)
    )
    was_training = model.training
    model.eval()
    here = slice(sp_rank * padded // sp_size, (sp_rank + 1) * padded // sp_size)
    try:
        with packed_documents(spans, is_shared=sp_size > 1):
            logits = model(
                input_ids=tokens[:, here].to(model.device),
                position_ids=positions[:, here].to(model.device),
                use_cache=False,
            ).logits.float()
    finally:
        model.train(was_training)
    is_token = torch.arange(padded) < torch.tensor([[30], [32]])
    return logits[is_token[:, here].to(logits.device)]


@contextlib.contextmanager
def packed_documents(spans: Sequence[Span] | None, *, is_shared: bool = False) -> Iterator[None]:
    """Within it, models with this attention see each of ``spans`` alone; None leaves masks as
    transformers makes them.

    ``is_shared``: several processes share the rows, and ``spans`` are those of whole rows;
    ``strategy/sequence.py`` attends so.
    """
    token = _documents.set((SHARED_ROWS, *(spans or ())) if is_shared else spans)
    try:
        yield
    finally:
        _documents.reset(token)


@contextlib.contextmanager
def cached_attention(cache: Any) -> Iterator[None]:
    """Within it ``cache`` is given every layer's keys and values, and attends where it has those of
    earlier tokens.

    Args:
        cache: ``sampling/cache.py:KVCache``.
    """
    token = _cache.set(cache)
    try:
        yield
    finally:
        _cache.reset(token)


def document_mask(*, local_size: int | None = None, **kwargs: Any) -> torch.Tensor | None:
    """The list of documents, (D, 3) int64 on the CPU; transformers' own mask where there are
    none, or a window is narrower.
    """
    spans = _documents.get()
    if spans is None or (
        local_size is not None and max(end - start for _, start, end in spans) > local_size
    ):
        # model/families.py:row_sharing_problem looks for it before
        if spans and spans[0] == SHARED_ROWS:
            raise ConfigError(
                f"the model's attention has a window of {local_size} positions; set"
                " strategy.sequence_parallel=1"
            )
        return sdpa_mask(local_size=local_size, **kwargs)
    return torch.tensor(spans, dtype=torch.long).view(-1, 3)


def attention_by_document(
    module: torch.nn.Module,
    query_BHLD: torch.Tensor,
    key_BGLD: torch.Tensor,
    value_BGLD: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """As transformers' sdpa; ``attention_mask`` may be a list of documents."""
    cache = _cache.get()
    # a vision tower's layers have no number, and no cache
    if cache is not None and hasattr(module, "layer_idx"):
        attended = cache.take(module, query_BHLD, key_BGLD, value_BGLD, **kwargs)
        if attended is not None:
            return attended, None
    if attention_mask is None or attention_mask.dtype != torch.long or attention_mask.dim() != 2:
        return sdpa_attention_forward(
            module, query_BHLD, key_BGLD, value_BGLD, attention_mask, **kwargs
        )
    batch, heads, length = query_BHLD.shape[:3]
    tokens = [
        t.transpose(1, 2).reshape(batch * length, t.shape[1], -1)
        for t in (query_BHLD, key_BGLD, value_BGLD)
    ]
    found_THD = []
    layout = _find_layout(attention_mask, length, query_BHLD.device)
    for places, kept in layout.groups:
        query, key, value = (
            t.index_select(0, places.flatten()).unflatten(0, places.shape).transpose(1, 2)
            for t in tokens
        )
        causal = {**kwargs, "is_causal": True}
        attended, _ = sdpa_attention_forward(module, query, key, value, None, **causal)
        found_THD.append(attended.flatten(0, 1) if kept is None else attended.flatten(0, 1)[kept])
    # padding of the batch belongs to no document
    out = query_BHLD.new_zeros((batch * length, heads, value_BGLD.shape[-1]))
    out = out.index_copy(0, layout.place_T, torch.cat(found_THD))
    return out.view(batch, length, heads, -1), None


@dataclass(frozen=True)
class _Layout:
    """Where documents are among all tokens, on the device that attends: for each group
    (documents, longest), and what is kept of it.
    """

    groups: tuple[tuple[torch.Tensor, torch.Tensor | None], ...]
    place_T: torch.Tensor  # of what all groups keep, one after the other


@torch.compiler.disable
def _find_layout(documents: torch.Tensor, row_length: int, device: torch.device) -> _Layout:
    return _layout(
        tuple((row, start, end) for row, start, end in documents.tolist()), row_length, device
    )


@functools.lru_cache(maxsize=4)
def _layout(spans: tuple[Span, ...], row_length: int, device: torch.device) -> _Layout:
    """Made once for all layers of a step: each copy to a GPU waits for the GPU."""
    groups, place_T = [], []
    # what an evaluation makes must do for a training step on the same documents
    with torch.inference_mode(False):
        for group in group_by_length(spans):
            places, kept = _places(group, row_length), _kept(group)
            place_T.append(places.flatten()[kept])
            is_padded = len(kept) < places.numel()
            groups.append((places.to(device), kept.to(device) if is_padded else None))
        return _Layout(tuple(groups), torch.cat(place_T).to(device))


def group_by_length(spans: Sequence[Span]) -> list[list[Span]]:
    """Return ``spans`` in groups whose padding to the longest is at most ``MAX_PADDING``."""
    groups: list[list[Span]] = []
    held = 0
    for span in sorted(spans, key=lambda span: span[1] - span[2]):
        length = span[2] - span[1]
        longest = groups[-1][0][2] - groups[-1][0][1] if groups else 0
        if not groups or held + length < (1 - MAX_PADDING) * longest * (len(groups[-1]) + 1):
            groups.append([])
            held = 0
        groups[-1].append(span)
        held += length
    return groups


def _places(group: Sequence[Span], row_length: int) -> torch.Tensor:
    """Where the tokens of ``group`` are among all tokens, (documents, longest); padding repeats
    a document's last token.
    """
    longest = max(end - start for _, start, end in group)
    first = torch.tensor([row * row_length + start for row, start, _ in group])[:, None]
    last = torch.tensor([row * row_length + end - 1 for row, _, end in group])[:, None]
    return torch.minimum(first + torch.arange(longest), last)


def _kept(group: Sequence[Span]) -> torch.Tensor:
    """Which of the flattened places hold a token, and not padding."""
    lengths = [end - start for _, start, end in group]
    return (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).flatten().nonzero()[:, 0]
