"""A model as a sampler runs it: one pass over prompts, or over one token of each row, with the
adapters of each.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch

from lorakit.errors import ConfigError
from lorakit.lora.adapter_batch import Adapter, AdapterBatch
from lorakit.lora.bank import AdapterBank
from lorakit.lora.grouped import FewTokens, having
from lorakit.loss.head import Head, all_logits, as_head_adapters
from lorakit.loss.logprobs import hidden_states
from lorakit.model.attention import cached_attention, packed_documents
from lorakit.sampling.cache import KVCache
from lorakit.sampling.request import Shown
from lorakit.sampling.traced_step import TracedStep
from lorakit.types import Images

RunPass = Callable[[Callable[[], tuple[torch.Tensor, Any]]], tuple[torch.Tensor, Any]]
# transformers makes none where one of four dimensions is given; the cache has its own
NO_MASK = torch.zeros((1, 1, 1, 1))


class ModelPasses:
    """Passes of ``model`` over the rows of ``cache``; the arguments are the sampler's.

    Attributes:
        num_forwards: passes so far.
    """

    def __init__(
        self, model: Any, cache: KVCache, bank: AdapterBank | None, run_pass: RunPass
    ) -> None:
        self.model, self.cache, self.bank, self.run_pass = model, cache, bank, run_pass
        self.num_forwards = 0
        self.traced_step, self._few_tokens = TracedStep(model), FewTokens()
        self._last_adapter_batch: AdapterBatch | None = None
        self._last_head: Head | None = None  # as the last pass that was not replayed found it
        # whether positions are places in images, too
        rope = getattr(model.config.get_text_config(), "rope_parameters", None) or {}
        self.has_grid = "mrope_section" in rope

    def forget_adapters(self) -> None:
        """Let go of the adapters of the last pass."""
        self._last_adapter_batch = None

    def positions_of_prompts(
        self, lengths: Sequence[int], shown: Sequence[Shown | None]
    ) -> torch.Tensor:
        """Places of all prompts' tokens in their prompts, (1, T); with time, height and width
        below, (4, 1, T).
        """
        places = torch.tensor([[place for length in lengths for place in range(length)]])
        if self.has_grid:
            own = [
                torch.arange(length).expand(3, length) if one is None else one.grid_positions_3L
                for length, one in zip(lengths, shown, strict=True)
            ]
            places = torch.cat([places, torch.cat(own, dim=1)])[:, None]
        return places.to(self.model.device)

    def positions_of_rows(
        self, places_B: torch.Tensor, shown: Sequence[Shown | None]
    ) -> torch.Tensor:
        """The same of the tokens that rows read next, (B, 1) or (4, B, 1)."""
        if not self.has_grid:
            return places_B[:, None]
        shifts_B = torch.tensor([0 if one is None else one.shift for one in shown])
        moved_B = places_B + shifts_B.to(places_B.device)
        return torch.stack([places_B, moved_B, moved_B, moved_B])[:, :, None]

    def run(
        self,
        tokens: torch.Tensor,
        positions: torch.Tensor,
        spans: list[tuple[int, int, int]] | None,
        adapter_batch: AdapterBatch | None,
        images: Sequence[Images] = (),
    ) -> tuple[torch.Tensor, Head]:
        """Return what the unembedding is given, flattened to (T, H), and the unembedding.
        ``spans`` None: a token for each row.
        """
        active = (
            self.bank.active(adapter_batch)
            if self.bank and adapter_batch
            else contextlib.nullcontext()
        )
        few = self._few_tokens if spans is None else None
        self.num_forwards += 1

        def model_pass(tokens: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
            given = {
                "input_ids": tokens,
                "position_ids": positions,
                "attention_mask": None if spans else NO_MASK,
            }
            if images:
                given["pixel_values"] = torch.cat([one.patches_PD for one in images]).to(
                    tokens.device
                )
                given["image_grid_thw"] = torch.cat([one.grids_N3 for one in images]).to(
                    tokens.device
                )
            hidden, self._last_head = hidden_states(
                self.model, lambda: self.model(**given, use_cache=False)
            )
            if hidden is None or self._last_head is None:
                raise ConfigError(
                    f"{type(self.model).__name__} cannot be sampled in rows: its unembedding is not"
                    " a linear layer"
                )
            return hidden

        def compute() -> tuple[torch.Tensor, Head]:
            if few is None:
                hidden = model_pass(tokens, positions)
            else:
                few.num_tokens = tokens.shape[0]
                hidden = self.traced_step.run(
                    model_pass, tokens, positions, self.cache, adapter_batch, few.decisions
                )
            assert self._last_head is not None
            return hidden, self._last_head

        with active, cached_attention(self.cache), packed_documents(spans), having(few):
            hidden, head = self.run_pass(compute)
        return hidden.flatten(0, 1), head

    def adapter_batch_of(
        self, adapters: Sequence[Adapter | None], num_tokens: Sequence[int]
    ) -> AdapterBatch | None:
        """The adapters of a pass, each of which has ``num_tokens`` in turn."""
        if self.bank is None:
            return None
        distinct = list({id(adapter): adapter for adapter in adapters}.values())
        adapter_ids_T = None
        if len(distinct) > 1:
            number = {id(adapter): n for n, adapter in enumerate(distinct)}
            numbers = [
                number[id(a)]
                for a, count in zip(adapters, num_tokens, strict=True)
                for _ in range(count)
            ]
            adapter_ids_T = torch.tensor(numbers, device=self.model.device)
        last = self._last_adapter_batch
        if last is not None and [id(adapter) for adapter in last.adapters] == [
            id(adapter) for adapter in distinct
        ]:
            self._last_adapter_batch = last.with_adapter_ids(
                adapter_ids_T
            )  # factors already side by side are not laid out again
        else:
            self._last_adapter_batch = AdapterBatch(distinct, adapter_ids_T, like=last)
        return self._last_adapter_batch

    def adapted_head(self, head: Head, adapter_batch: AdapterBatch | None) -> Head:
        """``head`` with what the adapters of ``adapter_batch`` have on it."""
        if self.bank is None or adapter_batch is None:
            return head
        return replace(
            head,
            adapters=(
                *head.adapters,
                *as_head_adapters(self.bank.on_head(adapter_batch, head.weight_VH.dtype)),
            ),
        )

    def logits(
        self, hidden_BH: torch.Tensor, head: Head, adapter_batch: AdapterBatch | None
    ) -> torch.Tensor:
        """The logits of what ``run`` returned, (B, V)."""
        return all_logits(hidden_BH, self.adapted_head(head, adapter_batch))
