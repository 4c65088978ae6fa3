"""Datums of several adapters through the base together: cut into passes, run, and put together again."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.data.collate import collate, join
from lorakit.data.packing import assign_batches
from lorakit.lora.bank import AdapterBank, Mix
from lorakit.loss import Loss
from lorakit.loss.head import HeadAdapter
from lorakit.service.trainee import Trainee
from lorakit.training.step import Share, compute_losses
from lorakit.types import Datum, ForwardBackwardOutput, TensorData

log = logging.getLogger("lorakit")


@dataclass
class Work:
    """What one call asks of one adapter. ``data`` is as ``loss/inputs.py:prepare`` returns it."""

    trainee: Trainee
    data: Sequence[Datum]
    loss: Loss  # with its knobs
    knobs: dict[str, float] = field(default_factory=dict)
    needs_gradient: bool = True
    is_whole: bool = False  # all of its data must be in one pass

    @property
    def num_tokens(self) -> int:
        return sum(map(len, self.data))


@dataclass
class _Found:
    """What passes have found for a Work so far."""

    logprobs: list[TensorData | None]
    metrics: dict[str, float] = field(default_factory=dict)
    gradients: list[torch.Tensor] | None = None

    def add(self, gradients: Sequence[torch.Tensor]) -> None:
        if self.gradients is None:
            self.gradients = list(gradients)
        else:
            torch._foreach_add_(self.gradients, list(gradients))


class PassRunner:
    """Runs Works on one base.

    Args:
        max_tokens: positions of a pass, padding included; a Datum that is longer has a pass of its own.
    """

    def __init__(
        self, model: Any, bank: AdapterBank, *, pad_token_id: int, max_tokens: int, autocast: Callable[[], Any]
    ) -> None:
        self.model, self.bank, self.pad_token_id, self.max_tokens, self.autocast = (
            model,
            bank,
            pad_token_id,
            max_tokens,
            autocast,
        )
        self.num_passes = 0

    def run(self, works: Sequence[Work]) -> list[ForwardBackwardOutput | BaseException]:
        """Return what each Work came to. Gradients are added where a Work wants them, all of them or, at an error, none."""
        try:
            found = self._run_together(works)
        except Exception as error:
            if len(works) == 1:
                return [error]
            log.warning("a pass of %d calls failed (%s); each is run by itself", len(works), error)
            found = None
        if found is None or (len({id(work.trainee) for work in works}) > 1 and not all(map(_is_finite, found))):
            # Of one adapter what is not finite must not reach another's gradient, where a gate's 0 times it is not 0.
            return [outcome for work in works for outcome in self.run([work])]
        for work, result in zip(works, found, strict=True):
            if work.needs_gradient and result.gradients is not None:
                work.trainee.add_gradients(result.gradients)
        return [_output(work, result) for work, result in zip(works, found, strict=True)]

    def _run_together(self, works: Sequence[Work]) -> list[_Found]:
        found = [_Found([None] * len(work.data)) for work in works]
        entries = [(w, d) for w, work in enumerate(works) for d in range(len(work.data))]
        for part in self._cut(works, entries):
            self._run_pass(works, part, found)
        return found

    def _cut(self, works: Sequence[Work], entries: list[tuple[int, int]]) -> list[list[tuple[int, int]]]:
        """Share out (Work, Datum) over passes, those of like length together."""
        if any(work.is_whole for work in works):
            return [entries]
        entries = sorted(entries, key=lambda entry: len(works[entry[0]].data[entry[1]]))
        lengths = [len(works[w].data[d]) for w, d in entries]
        plan = assign_batches(lengths, batch_size=None, batch_tokens=self.max_tokens, row_tokens=None, rng=None)
        return [sorted(entries[row[0]] for row in rows) for rows in plan]

    def _run_pass(self, works: Sequence[Work], part: list[tuple[int, int]], found: list[_Found]) -> None:
        by_work: dict[int, list[int]] = {}
        for w, d in part:
            by_work.setdefault(w, []).append(d)
        batches = {w: collate([[works[w].data[d]] for d in datums], self.pad_token_id) for w, datums in by_work.items()}
        device = works[0].trainee.vector.device
        joined = join(list(batches.values()), self.pad_token_id).to(device)
        trainees = list({id(works[w].trainee): works[w].trainee for w in by_work}.values())
        number_of = {id(trainee): number for number, trainee in enumerate(trainees)}
        owners_T = None
        if len(trainees) > 1:
            owners = [number_of[id(works[w].trainee)] for w, datums in by_work.items() for _ in datums]
            owners_T = torch.tensor(owners, device=device).repeat_interleave(joined.input_ids.shape[1])
        mix = Mix([trainee.adapter for trainee in trainees], owners_T)
        shares = [Share(batch.to(device), works[w].loss, self._on_head(works[w])) for w, batch in batches.items()]
        needs_gradient = any(works[w].needs_gradient for w in by_work)
        self.num_passes += 1
        with self.bank.active(mix), torch.set_grad_enabled(needs_gradient):
            with self.autocast():
                outputs = compute_losses(self.model, joined, shares)
            for (w, datums), output, share in zip(by_work.items(), outputs, shares, strict=True):
                _keep(found[w], works[w], datums, output, share)
            if needs_gradient:
                self._pull(works, dict(zip(by_work, outputs, strict=True)), found)

    def _on_head(self, work: Work) -> tuple[HeadAdapter, ...]:
        on_head = self.bank.on_head(work.trainee.adapter)
        return () if on_head is None else (HeadAdapter(*on_head),)

    def _pull(self, works: Sequence[Work], outputs: dict[int, Any], found: list[_Found]) -> None:
        """The way back. Of several Works of one adapter the first is given the gradient of all, which are added or dropped together."""
        first_of: dict[int, int] = {}
        for w in outputs:
            if works[w].needs_gradient:
                first_of.setdefault(id(works[w].trainee), w)
        leaves = {w: works[w].trainee.adapter.leaves for w in first_of.values()}
        total = torch.stack([outputs[w].loss_sum for w in outputs if works[w].needs_gradient]).sum()
        flat = [leaf for own in leaves.values() for leaf in own]
        gradients = iter(torch.autograd.grad(total, flat, allow_unused=True))
        for w, own in leaves.items():
            mine = [next(gradients) for _ in own]
            found[w].add([torch.zeros_like(leaf) if g is None else g for leaf, g in zip(own, mine, strict=True)])


def _keep(found: _Found, work: Work, datums: list[int], output: Any, share: Share) -> None:
    logprobs = output.logprobs.float().cpu().numpy()
    for (row, start, end), number in zip(share.batch.spans, datums, strict=True):
        own = logprobs[row, start:end]
        shape = work.data[number].targets.shape
        found.logprobs[number] = TensorData(own[:, : shape[1]] if len(shape) > 1 else own if own.ndim == 1 else own[:, 0])
    found.metrics["loss:sum"] = found.metrics.get("loss:sum", 0.0) + float(output.loss_sum.detach())
    found.metrics |= output.metrics  # of a custom loss, which has one pass


def _is_finite(found: _Found) -> bool:
    if not all(math.isfinite(value) for value in found.metrics.values()):
        return False
    return found.gradients is None or bool(torch.stack([g.sum() for g in found.gradients]).isfinite().all())


def _output(work: Work, found: _Found) -> ForwardBackwardOutput:
    outputs = [{"logprobs": logprobs} for logprobs in found.logprobs if logprobs is not None]
    knobs = {f"{name}:mean": float(value) for name, value in work.knobs.items()}
    return ForwardBackwardOutput(outputs, {**found.metrics, "tokens:sum": float(work.num_tokens), **knobs})
