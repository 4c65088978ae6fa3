"""What happens when the memory is not enough: less goes through the model at a time, and what was
computed of the step is computed again.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable
from typing import Any

import torch

from lorakit.data.batch.split import halve_batch, split_batch
from lorakit.errors import TrainingError, is_out_of_memory
from lorakit.types import Batch, LossOutput

log = logging.getLogger("lorakit")


class MicroBatchSplitter:
    """How many positions of a micro-batch go through the model at a time: all, until there was
    no memory for them.
    """

    def __init__(self) -> None:
        self.max_positions: int | None = None

    def split(self, batch: Batch) -> list[Batch]:
        """Return ``batch`` in pieces for which there is memory."""
        return split_batch(batch, self.max_positions)

    def shrink(self, batch: Batch) -> None:
        """Halve what goes through the model at a time, after ``batch`` did not.

        Raises:
            TrainingError: one document is too much already.
        """
        largest = max(self.split(batch), key=lambda piece: piece.input_ids.numel())
        positions, halves = largest.input_ids.numel(), halve_batch(largest)
        free_memory()
        if len(halves) == 1:
            raise TrainingError(
                f"out of memory with a single row of {positions:,} positions; set data.max_tokens"
                " or lora.rank lower, trainer.activation_checkpointing=true or"
                " model.dtype=bfloat16 (`lorakit plan` says what each would take)"
            )
        self.max_positions = max(half.input_ids.numel() for half in halves)
        log.warning(
            "out of memory with %d positions at a time: now at most %d, and what was computed of"
            " this step is computed again. The step and its gradient stay the same;"
            " data.tokens_per_batch=%d would spare the try",
            positions,
            self.max_positions,
            self.max_positions,
        )


class OutOfMemoryRetry:
    """Forward and backward of a ``LoRAModule``'s micro-batches, in pieces where memory runs out.

    It asks the module for ``piece_loss``, ``window``, ``can_repeat`` and its trainer.
    """

    def __init__(self) -> None:
        self.splitter = MicroBatchSplitter()
        self._waiting: list[Batch] = []  # pieces of the micro-batch whose first has gone forward
        # its loss, in whose place Lightning is given another leaf
        self._graph: torch.Tensor | None = None
        self._given = torch.zeros(())

    def forward(self, module: Any, batch: Batch) -> torch.Tensor:
        """Return the loss of the first piece of ``batch``; the others wait for ``backward``."""
        while True:
            try:
                self._waiting = self.splitter.split(batch)
                loss: torch.Tensor = module.piece_loss(self._waiting.pop(0))
                break
            except RuntimeError as error:
                _refuse_unless_possible(module, error)
            self.splitter.shrink(batch)  # here, where the error holds no tensor any more
        if not module.can_repeat:
            return loss
        # Lightning holds what it is given until the step is over: with its graph there would
        # be no memory to repeat it.
        self._graph, self._given = loss, loss.detach().requires_grad_()
        return self._given

    def backward(self, module: Any) -> None:
        """Run the backward pass of ``forward``'s loss, and both passes of the pieces that wait.

        Where the memory is not enough, the window's gradient is made anew, from batches of half the
        size.
        """
        if self._graph is None:
            return
        try:
            self._take_graph().backward(self._given.grad)
            while self._waiting:
                self._run_piece(module, self._waiting.pop(0))
            return
        except RuntimeError as error:
            _refuse_unless_possible(module, error)
        while True:
            self.splitter.shrink(module.window.batches[-1])
            try:
                self._repeat_window(module)
                return
            except RuntimeError as error:
                _refuse_unless_possible(module, error)

    def evaluate(
        self, module: Any, batch: Batch, compute: Callable[[Batch], LossOutput]
    ) -> list[tuple[LossOutput, Batch]]:
        """Return the outputs of ``batch``'s pieces, with the pieces."""
        waiting, found = self.splitter.split(batch), list[tuple[LossOutput, Batch]]()
        while waiting:
            try:
                found.append((compute(waiting[0]), waiting[0]))
                waiting.pop(0)
                continue
            except RuntimeError as error:
                _refuse_unless_possible(module, error)
            self.splitter.shrink(waiting[0])
            waiting = [piece for one in waiting for piece in self.splitter.split(one)]
        return found

    def _take_graph(self) -> torch.Tensor:
        """The loss with its graph, which nothing else holds then."""
        graph, self._graph = self._graph, None
        assert graph is not None
        return graph

    def _run_piece(self, module: Any, piece: Batch) -> None:
        """Forward and backward of a piece, scaled as Lightning scales the loss of a step."""
        trainer = module.trainer
        with trainer.precision_plugin.train_step_context():
            loss = module.piece_loss(piece) / trainer.accumulate_grad_batches
        trainer.precision_plugin.pre_backward(loss, module).backward()

    def _repeat_window(self, module: Any) -> None:
        """Make the gradient of all batches that the window had so far, from nothing."""
        for parameter in module.parameters():
            parameter.grad = None
        module.window.restart()
        for batch in module.window.batches:
            for piece in self.splitter.split(batch):
                self._run_piece(module, piece)


def _refuse_unless_possible(module: Any, error: RuntimeError) -> None:
    """Raise ``error`` where it is of another kind, or where a step cannot be computed again."""
    if not is_out_of_memory(error):
        raise error
    if not module.can_repeat:
        raise TrainingError(
            f"out of memory in process {module.trainer.global_rank} with"
            f" {module.window.positions:,} positions at a time, and neither joined processes nor"
            " DeepSpeed can repeat a step: halve"
            " data.tokens_per_batch or data.batch_size, or set"
            " trainer.activation_checkpointing=true"
        ) from error


def free_memory() -> None:
    """Give back what nothing refers to any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
