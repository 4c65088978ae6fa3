"""Generation in which requests come and go: prompts are computed packed, then one token for each
row, and rows that end make room.

What transformers' own continuous batching lacks: adapters by row, random numbers by request,
log-probabilities, stop strings.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch

from lorakit.errors import DataError
from lorakit.lora.adapter_batch import AdapterBatch
from lorakit.lora.bank import AdapterBank
from lorakit.loss.head import Head
from lorakit.model.families import steady_positions
from lorakit.sampling.cache import KVCache, rounded, wasted_tokens
from lorakit.sampling.model_passes import ModelPasses, RunPass
from lorakit.sampling.prompt_scores import score_prompt
from lorakit.sampling.request import Request, RunningRequest, SampledSequence, Shown, best_of_row
from lorakit.sampling.stop_condition import StopCondition, end_token_ids
from lorakit.sampling.token_sampler import SampledTokens, TokenSampler

# requests join when they are a 16th of the rows or more, or have waited for this many steps
JOIN_SHARE, MAX_STEPS_WAITED = 16, 8
SORT_PAYS_AFTER = 8  # steps: rows mostly stay for longer
MAX_PREFILL_TOKENS = 8192  # of prompts at a time; a longer one comes alone


@dataclass(frozen=True)
class WaitingSequence:
    """Samples of a request that wait for rows; none where only the prompt is to be scored."""

    running: RunningRequest
    numbers: range


class Sampler:
    """Generates on ``model``, which must attend by document
    (`model/attention.py:attend_by_document`).

    Args:
        bank: of the adapters that requests name; None where the model has its own.
        max_rows: samples at work at a time.
        max_cache_tokens: tokens whose keys and values are held at most; what would need more waits.
        run_pass: runs what computes (a tensor, anything), where the model wants something around
            each pass.
        batch_invariant: compute each token of each sequence by itself, those of prompts too. A
            product in another shape rounds otherwise; so a log-probability is the same to the bit,
            whether its token was sampled or is scored, in any company. Slow.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        *,
        bank: AdapterBank | None = None,
        max_rows: int = 256,
        max_cache_tokens: int = 1 << 20,
        run_pass: RunPass = lambda compute: compute(),
        batch_invariant: bool = False,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.max_rows, self.max_cache_tokens = 1 if batch_invariant else max_rows, max_cache_tokens
        self.batch_invariant = batch_invariant
        self.cache = KVCache()
        self.passes = ModelPasses(model, self.cache, bank, run_pass)
        self.num_generated = 0
        self._steps_waited = 0  # by those that could join
        self._waiting: collections.deque[WaitingSequence] = collections.deque()
        self._rows: list[SampledSequence] = []
        self._end_ids = end_token_ids(model, tokenizer)
        config = model.config.get_text_config()
        self._vocab_size = config.vocab_size
        self._limit = getattr(config, "max_position_embeddings", None) or 1 << 30
        if (steady := steady_positions(config)) is not None:
            self._limit = min(self._limit, steady)
        # what depends on which sequence has which row
        self._settled: tuple[TokenSampler, AdapterBatch | None] | None = None

    def add(self, request: Request) -> None:
        """Let ``request`` join at the next step. Raises DataError if the model cannot take it."""
        limit = min(self._limit, self.max_cache_tokens)
        request.check(vocab_size=self._vocab_size, max_tokens=limit)
        if request.shown is not None and (self.batch_invariant or not self.passes.has_grid):
            raise DataError(
                "an image goes through the model whole: not under sampler.batch_invariant, nor in a"
                " model of text"
            )
        most = limit - len(request.prompt)
        max_tokens = (
            most if request.params.max_tokens is None else min(request.params.max_tokens, most)
        )
        running = RunningRequest(
            request, StopCondition(request.params, self.tokenizer, self._end_ids), max_tokens
        )
        if not max_tokens:
            self._waiting.append(WaitingSequence(running, range(0)))
            return
        running.samples = [None] * request.num_samples
        each = max(
            1,
            min(self.max_rows, self.max_cache_tokens // rounded(len(request.prompt) + max_tokens)),
        )
        for first in range(0, request.num_samples, each):
            self._waiting.append(
                WaitingSequence(running, range(first, min(first + each, request.num_samples)))
            )

    @property
    def is_busy(self) -> bool:
        """Whether a step would do anything."""
        return bool(self._waiting or self._rows)

    def fail_all(self, error: BaseException) -> None:
        """End everything with ``error``."""
        running = {
            id(r): r
            for r in (
                *(row.running for row in self._rows),
                *(joining.running for joining in self._waiting),
            )
        }
        self._waiting.clear()
        self._rows, self._settled = [], None
        self._clear()
        for one in running.values():
            one.answer(error)

    @torch.inference_mode()
    def step(self) -> None:
        """Let requests join where there is room, then generate one token for each row."""
        self._remove(
            [place for place, row in enumerate(self._rows) if row.running.request.is_cancelled]
        )
        while joining := self._next_to_join():
            if self.batch_invariant:
                self._prefill_by_token(joining)
            else:
                self._prefill(joining)
            if not all(entry.numbers for entry in joining):
                # scored prompts take no row, so nothing else would end it before all are done
                break
        if self._rows:
            self._decode()
        if not self.is_busy:
            self._clear()

    def _clear(self) -> None:
        self.cache.clear()
        self.passes.forget_adapters()

    # ---- joining

    def _next_to_join(self) -> list[WaitingSequence]:
        """Take those that join now out of those that wait: none before they are enough to be
        worth a pass, or have waited for long.
        """
        joining: list[WaitingSequence] = []
        num_rows = len(self._rows)
        num_tokens = 0
        room = max((_room_of(row.running) for row in self._rows), default=0)
        num_spare = 0  # rows that prompts are laid into which are only scored
        # then there is one row
        while self._waiting and not (self.batch_invariant and (self._rows or joining)):
            first = self._waiting[0]
            if first.running.request.is_cancelled:
                self._waiting.popleft()
                continue
            num_tokens += len(first.running.request.prompt)
            num_rows = num_rows + len(first.numbers)
            num_spare = max(num_spare, int(not first.numbers))
            room = max(room, _room_of(first.running))
            fits = (
                num_rows <= self.max_rows and (num_rows + num_spare) * room <= self.max_cache_tokens
            )
            if (joining and num_tokens > MAX_PREFILL_TOKENS) or (
                not fits and (self._rows or joining)
            ):
                break
            joining.append(self._waiting.popleft())
        num_joining = sum(len(entry.numbers) or 1 for entry in joining)
        if (
            joining
            and num_joining * JOIN_SHARE < len(self._rows)
            and self._steps_waited < MAX_STEPS_WAITED
        ):
            self._waiting.extendleft(reversed(joining))
            self._steps_waited += 1
            return []
        self._steps_waited = 0
        return joining

    def _prefill(self, joining: Sequence[WaitingSequence]) -> None:
        """Compute the prompts, each once however many ask the same, and give every sample its
        row and first token.
        """
        device, first = self.model.device, len(self._rows)
        rows = [
            SampledSequence.of(entry.running, number)
            for entry in joining
            for number in entry.numbers
        ]
        prompts: dict[_Key, list[int]] = {}  # -> rows; that of a scored one may be none
        shown: dict[_Key, Shown | None] = {}
        row = first
        for entry in joining:
            key = _key_of(entry.running)
            shown[key] = entry.running.request.shown
            prompts.setdefault(key, []).extend(range(row, row + len(entry.numbers)))
            row += len(entry.numbers)
        tokens = [key.prompt for key in prompts]
        lengths = [len(prompt) for prompt in tokens]
        ends = np.cumsum(lengths).tolist()
        spans = {
            key: (0, end - length, end)
            for key, end, length in zip(prompts, ends, lengths, strict=True)
        }
        # A prompt that is only scored is laid into the row after the last, which is free.
        self.cache.reserve(
            row + any(not places for places in prompts.values()),
            max(
                _room_of(running)
                for running in (*(r.running for r in self._rows), *(e.running for e in joining))
            ),
            num_used=first,
            max_cache_tokens=self.max_cache_tokens,
        )
        self.cache.prefill(
            [places[0] if places else row for places in prompts.values()], lengths, device
        )
        adapter_of = {
            id(entry.running.request.adapter): entry.running.request.adapter for entry in joining
        }
        hidden_TH, head = self.passes.run(
            torch.tensor([[token for prompt in tokens for token in prompt]], device=device),
            self.passes.positions_of_prompts(lengths, list(shown.values())),
            list(spans.values()),
            self.passes.adapter_batch_of([adapter_of[key.adapter] for key in prompts], lengths),
            [one.images for one in shown.values() if one is not None],
        )
        for key, places in prompts.items():
            if len(places) > 1:
                self.cache.copy_row(places[0], places[1:], len(key.prompt))
        for entry in joining:
            self._score_prompt(entry, hidden_TH, head, spans[_key_of(entry.running)])
        if rows:
            last = torch.tensor([spans[_key_of(row.running)][2] - 1 for row in rows], device=device)
            self._rows += rows
            self._settled = None
            token_sampler, adapter_batch = self._settle(rows)
            self._pick(
                rows, token_sampler, self.passes.logits(hidden_TH[last], head, adapter_batch), first
            )

    def _prefill_by_token(self, joining: Sequence[WaitingSequence]) -> None:
        """Compute prompts as samples are generated."""
        for entry in joining:
            request, hidden = entry.running.request, []
            self.cache.reserve(1, len(request.prompt) + entry.running.max_tokens)
            adapter_batch = self.passes.adapter_batch_of([request.adapter], [1])
            for place, token in enumerate(request.prompt):
                positions = self.passes.positions_of_rows(
                    self.cache.decode([place], self.model.device), [None]
                )
                found, head = self.passes.run(
                    torch.tensor([[token]], device=self.model.device),
                    positions,
                    None,
                    adapter_batch,
                )
                hidden.append(found)
            self._score_prompt(entry, torch.cat(hidden), head, (0, 0, len(hidden)))
            if entry.numbers:
                self._rows = [SampledSequence.of(entry.running, entry.numbers[0])]
                self._settled = None
                self._pick(
                    self._rows,
                    self._settle(self._rows)[0],
                    self.passes.logits(hidden[-1], head, adapter_batch),
                    0,
                )

    def _score_prompt(
        self,
        entry: WaitingSequence,
        hidden_TH: torch.Tensor,
        head: Head,
        span: tuple[int, int, int],
    ) -> None:
        """Keep what is asked about the prompt itself."""
        running, request, (_, start, end) = entry.running, entry.running.request, span
        if request.is_of_prompt and (not entry.numbers or entry.numbers.start == 0):
            head = self.passes.adapted_head(
                head, self.passes.adapter_batch_of([request.adapter], [end - 1 - start])
            )
            score_prompt(
                running,
                hidden_TH[start : end - 1],
                head,
                self._vocab_size,
                by_token=self.batch_invariant,
            )
        if not entry.numbers:
            running.finish_if_done()

    # ---- generating

    def _decode(self) -> None:
        """Generate one token for each row."""
        device = self.model.device
        if self._settled is None:
            self._sort()
        rows = self._rows
        token_sampler, adapter_batch = self._settled = self._settled or self._settle(rows)
        lengths = [row.length for row in rows]
        positions = self.passes.positions_of_rows(
            self.cache.decode(lengths, device), [row.running.request.shown for row in rows]
        )
        tokens = torch.tensor([[row.tokens[-1]] for row in rows], device=device)
        hidden_BH, head = self.passes.run(tokens, positions, None, adapter_batch)
        for row in rows:
            row.length += 1
        self._pick(rows, token_sampler, self.passes.logits(hidden_BH, head, adapter_batch), 0)

    def _sort(self) -> None:
        """Lay rows of like length beside one another, where that saves more than it costs."""
        lengths = [row.length for row in self._rows]
        order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
        saved = wasted_tokens(lengths, self.cache.block_cost) - wasted_tokens(
            [lengths[row] for row in order], self.cache.block_cost
        )
        if saved * SORT_PAYS_AFTER > 2 * sum(lengths):
            self.cache.permute(order)
            self._rows = [self._rows[row] for row in order]

    def _settle(self, rows: Sequence[SampledSequence]) -> tuple[TokenSampler, AdapterBatch | None]:
        requests = [row.running.request for row in rows]
        num_best = max(request.num_best for request in requests)
        token_sampler = TokenSampler(
            [request.params for request in requests],
            [row.key for row in rows],
            num_best,
            self.model.device,
        )
        return token_sampler, self.passes.adapter_batch_of(
            [request.adapter for request in requests], [1] * len(rows)
        )

    def _pick(
        self,
        rows: Sequence[SampledSequence],
        token_sampler: TokenSampler,
        logits_BV: torch.Tensor,
        first: int,
    ) -> None:
        """Pick a token for each of ``rows``, from row ``first`` on; remove those that end."""
        picked: SampledTokens = token_sampler.pick(logits_BV, [len(row.tokens) for row in rows])
        tokens, logprobs = picked.tokens.tolist(), picked.logprobs.tolist()
        best = best_of_row(picked, [row.running.request.num_best for row in rows])
        self.num_generated += len(rows)
        ended = [
            first + i for i, row in enumerate(rows) if row.add(tokens[i], logprobs[i], best[i])
        ]
        done = [self._rows[place] for place in ended]
        self._remove(ended)
        for row in done:
            row.running.samples[row.number] = row.sample()
        for running in {id(row.running): row.running for row in done}.values():
            running.finish_if_done()

    def _remove(self, places: Iterable[int]) -> None:
        """Take rows out; the last ones move into their places."""
        for place in sorted(places, reverse=True):
            last = len(self._rows) - 1
            if place < last:
                self.cache.copy_row(last, [place], self._rows[last].length)
                self._rows[place] = self._rows[last]
            self._rows.pop()
            self._settled = None


def _room_of(running: RunningRequest) -> int:
    """Tokens that each of its rows may come to have."""
    return rounded(len(running.request.prompt) + running.max_tokens)


class _Key(NamedTuple):
    """What is computed once, however many ask it."""

    adapter: int
    prompt: tuple[int, ...]
    images: bytes


def _key_of(running: RunningRequest) -> _Key:
    request = running.request
    return _Key(
        id(request.adapter), tuple(request.prompt), request.shown.key if request.shown else b""
    )
