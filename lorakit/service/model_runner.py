"""Datums of several adapters through the base together: cut into passes, run, and put together
again.

Of several processes each runs every so-manieth pass. Gradients stay where they were found until the
step adds them up; everything else is sent to all.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.data.batch.collate import collate, idle_batch, join
from lorakit.data.batch.packing import assign_batches
from lorakit.lora.adapter_batch import AdapterBatch
from lorakit.loss import LOSSES
from lorakit.loss.head import as_head_adapters
from lorakit.loss.logprobs import whole_distributions
from lorakit.model.vision import with_blank_image
from lorakit.service.base import Base
from lorakit.service.custom import as_targets
from lorakit.service.forward_request import ForwardRequest
from lorakit.service.training_state import TrainingState
from lorakit.strategy.world import World, all_gather_object
from lorakit.training.step import MicroBatch, compute_losses
from lorakit.types import ForwardBackwardOutput, TensorData

log = logging.getLogger("lorakit")
States = Mapping[str, TrainingState]  # by model id
Entry = tuple[int, int]  # a request, and one of its Datums


@dataclass
class _Found:
    """What passes have found for a request so far."""

    logprobs: dict[int, TensorData] = field(default_factory=dict)  # by number of the Datum
    metrics: dict[str, float] = field(default_factory=dict)
    gradients: list[torch.Tensor] | None = None  # of this process

    def add_gradients(self, gradients: Sequence[torch.Tensor]) -> None:
        if self.gradients is None:
            self.gradients = list(gradients)
        else:
            torch._foreach_add_(self.gradients, list(gradients))

    def is_finite(self) -> bool:
        if not all(math.isfinite(value) for value in self.metrics.values()):
            return False
        return self.gradients is None or bool(
            torch.stack([g.sum() for g in self.gradients]).isfinite().all()
        )


class ModelRunner:
    """Runs requests on one base.

    Args:
        max_tokens: positions of a pass, padding included; a Datum that is longer has a pass of its
            own.
    """

    def __init__(self, base: Base, *, max_tokens: int, world: World) -> None:
        self.base, self.max_tokens, self.world = base, max_tokens, world
        self.num_passes = 0

    def run(
        self, requests: Sequence[ForwardRequest], states: States
    ) -> list[ForwardBackwardOutput | BaseException]:
        """Return what each request came to. Gradients are added where a request wants them, all of
        them or, at an error, none.
        """
        try:
            found = self._run_together(requests, states)
        except Exception as error:
            if self.world.size > 1:
                raise  # the others may be in the middle of it
            if len(requests) == 1:
                return [error]
            log.warning(
                "a pass of %d calls failed (%s); each is run by itself", len(requests), error
            )
            found = None
        if found is None or (
            len({request.model_id for request in requests}) > 1 and not self._are_finite(found)
        ):
            # What is not finite in one adapter must not reach another's gradient, where a gate's 0
            # times it is not 0.
            return [outcome for request in requests for outcome in self.run([request], states)]
        for request, result in zip(requests, found, strict=True):
            if request.needs_gradient and result.gradients is not None:
                states[request.model_id].add_gradients(result.gradients)
        return [_output(request, result) for request, result in zip(requests, found, strict=True)]

    def _are_finite(self, found: Sequence[_Found]) -> bool:
        return all(all_gather_object(all(result.is_finite() for result in found)))

    def _run_together(self, requests: Sequence[ForwardRequest], states: States) -> list[_Found]:
        found = [_Found() for _ in requests]
        passes, world = self._cut(requests), self.world
        # the same everywhere: a backward pass is of all
        needs_gradient = any(request.needs_gradient for request in requests)
        for first in range(0, len(passes), world.size):
            mine = passes[first + world.rank] if first + world.rank < len(passes) else []
            if mine or self.base.is_partitioned:
                self._run_pass(requests, states, mine, found, needs_gradient)
        if world.size > 1:
            for others in all_gather_object(
                [(result.logprobs, result.metrics) for result in found]
            ):
                _merge(found, others)
        return found

    def _cut(self, requests: Sequence[ForwardRequest]) -> list[list[Entry]]:
        """Share out Datums over passes, those of like length together."""
        entries = [(w, d) for w, request in enumerate(requests) for d in range(len(request.data))]
        if any(request.is_whole for request in requests):
            return [entries]
        entries.sort(key=lambda entry: len(requests[entry[0]].data[entry[1]]))
        lengths = [len(requests[w].data[d]) for w, d in entries]
        most = self.max_tokens
        if self.world.size > 1:
            most = min(most, -(-sum(lengths) // self.world.size))
        plan = assign_batches(
            lengths, batch_size=None, batch_tokens=most, row_tokens=None, rng=None
        )
        return [sorted(entries[row[0]] for row in rows) for rows in plan]

    def _run_pass(
        self,
        requests: Sequence[ForwardRequest],
        states: States,
        entries: Sequence[Entry],
        found: list[_Found],
        needs_gradient: bool,
    ) -> None:
        by_work: dict[int, list[int]] = {}
        for w, d in entries:
            by_work.setdefault(w, []).append(d)
        base, pad = self.base, self.base.pad_token_id
        if by_work:
            micro_batches = [
                MicroBatch(
                    collate([[requests[w].data[d]] for d in ds], pad, base.images), requests[w].loss
                )
                for w, ds in by_work.items()
            ]
        else:  # a process without a pass takes part in that of the others
            micro_batches = [MicroBatch(idle_batch(pad), LOSSES["cross_entropy"])]
        state_of_row = [
            states[requests[w].model_id] for w, datums in by_work.items() for _ in datums
        ] or [states[requests[0].model_id]]
        joined = with_blank_image(
            base.model,
            join([micro_batch.batch for micro_batch in micro_batches], pad).to(base.device),
        )
        micro_batches = [
            MicroBatch(micro_batch.batch.to(base.device), micro_batch.loss)
            for micro_batch in micro_batches
        ]
        adapter_batch = _adapter_batch_of(state_of_row, joined.input_ids.shape[1], base.device)
        self.num_passes += bool(by_work)

        def compute() -> tuple[torch.Tensor, Any]:
            on_head = as_head_adapters(base.bank.on_head(adapter_batch, base.model.dtype))
            if (function := requests[0].vocabulary) is not None:
                numbers = by_work[0]  # of the Datums in this pass
                found = whole_distributions(
                    base.model, joined, lambda n, *rest: function(numbers[n], *rest), on_head
                )
                return found.loss_sum, [found]
            outputs = compute_losses(base.model, joined, micro_batches, on_head)
            wanted = [requests[w].needs_gradient for w in by_work] or [needs_gradient]
            losses = [
                output.loss_sum for output, wants in zip(outputs, wanted, strict=True) if wants
            ]
            return torch.stack(losses).sum() if losses else joined.weights.new_zeros(()), outputs

        with base.bank.active(adapter_batch), torch.set_grad_enabled(needs_gradient):
            total, outputs = base.run_pass(compute)
            for (w, datums), output, micro_batch in zip(
                by_work.items(), outputs, micro_batches, strict=False
            ):
                _keep(found[w], requests[w], datums, output, micro_batch)
            if needs_gradient:
                self._pull(requests, states, by_work, total, found, state_of_row[0])

    def _pull(
        self,
        requests: Sequence[ForwardRequest],
        states: States,
        by_work: dict[int, list[int]],
        total: torch.Tensor,
        found: list[_Found],
        idle: TrainingState,
    ) -> None:
        """The way back. The first of several requests of one adapter gets the gradient of all,
        which are added or dropped together.
        """
        first_of: dict[str, int] = {}
        for w in by_work:
            if requests[w].needs_gradient:
                first_of.setdefault(requests[w].model_id, w)
        leaves = {w: states[requests[w].model_id].adapter.leaves for w in first_of.values()} or {
            -1: idle.adapter.leaves
        }
        if not total.requires_grad:
            return
        flat = [leaf for own in leaves.values() for leaf in own]
        gradients = iter(
            torch.autograd.grad(total, flat, allow_unused=True, materialize_grads=True)
        )
        self.base.release()
        for w, own in leaves.items():
            mine = [next(gradients) for _ in own]
            if w >= 0:
                found[w].add_gradients(mine)


def _adapter_batch_of(
    state_of_row: Sequence[TrainingState], row_length: int, device: torch.device
) -> AdapterBatch:
    """The adapters of a pass, by the training state of each row."""
    distinct = list(dict.fromkeys(state_of_row))
    adapters = [state.adapter for state in distinct]
    if len(distinct) == 1:
        return AdapterBatch(adapters, None)
    rows = torch.tensor([distinct.index(state) for state in state_of_row], device=device)
    return AdapterBatch(adapters, rows.repeat_interleave(row_length), is_sorted=True)


def _keep(
    found: _Found,
    request: ForwardRequest,
    datums: Sequence[int],
    output: Any,
    micro_batch: MicroBatch,
) -> None:
    logprobs = output.logprobs.float().cpu().numpy()
    for (row, start, end), number in zip(micro_batch.batch.spans, datums, strict=True):
        own = as_targets(logprobs[row, start:end], request.data[number].targets.shape)
        found.logprobs[number] = TensorData(own)
    found.metrics["loss:sum"] = found.metrics.get("loss:sum", 0.0) + float(output.loss_sum.detach())
    found.metrics |= output.metrics  # of a custom loss, which has one pass


def _merge(
    found: list[_Found], others: list[tuple[dict[int, TensorData], dict[str, float]]]
) -> None:
    """Add what another process has found; this one's own, which comes back too, is there."""
    for result, (logprobs, metrics) in zip(found, others, strict=True):
        if logprobs and not logprobs.keys() <= result.logprobs.keys():
            result.logprobs |= logprobs
            for name, value in metrics.items():
                result.metrics[name] = result.metrics.get(name, 0.0) + value


def _output(request: ForwardRequest, found: _Found) -> ForwardBackwardOutput:
    outputs = [{"logprobs": found.logprobs[number]} for number in range(len(request.data))]
    knobs = {f"{name}:mean": float(value) for name, value in request.knobs.items()}
    return ForwardBackwardOutput(
        outputs, {**found.metrics, "tokens:sum": float(request.num_tokens), **knobs}
    )
