"""The one LightningModule: a frozen base with LoRA, trained on weighted causal-LM batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lorakit.errors import CheckpointError, ConfigError, TrainingError, is_out_of_memory
from lorakit.loss import LOSSES
from lorakit.loss.inputs import inputs_of
from lorakit.model.partition import full_shape, whole
from lorakit.training.oom import MicroBatchSplitter
from lorakit.training.step import compute_loss, sums_by_origin
from lorakit.types import Batch, LossOutput


class LoRAModule(L.LightningModule):
    """Trains the adapter of a model.

    Args:
        build_model: makes the PEFT-wrapped model; called once, in ``configure_model``, so that a
            strategy can shard it.
        optimizer: makes the optimiser of the trainable parameters, for instance
            ``partial(torch.optim.AdamW, lr=5e-4)``.
        schedule: makes its schedule from (optimizer, total_steps=…); None keeps the learning rate.
        total_steps: optimiser steps of the whole fit, for the schedule; None asks the trainer.
        loss: a name in ``LOSSES``, or a function of (logprobs, batch) that returns a
            ``LossOutput``; its metrics are logged.
        clip_norm: largest L2 norm of the gradient, 0 for none. The norm is logged before clipping.
        max_bad_steps: so many steps in a row with a loss or gradient that is not finite end the
            run.

    The loss is ``sum(loss) / sum(|weight|)`` (of pairs: divided by their number) over the whole
    accumulation window of all
    processes: how the window is cut into micro-batches and shared out does not change the gradient.
    Whether a step is skipped is decided by all processes together.
    """

    def __init__(
        self,
        build_model: Callable[[], Any],
        *,
        optimizer: Callable[..., torch.optim.Optimizer],
        schedule: Callable[..., Any] | None = None,
        total_steps: int | None = None,
        loss: str | Callable[..., LossOutput] = "cross_entropy",
        clip_norm: float = 1.0,
        max_bad_steps: int = 5,
        tokenizer: Any = None,
    ) -> None:
        super().__init__()
        # a checkpoint holds the adapter only; load_state_dict below checks it both ways
        self.strict_loading = False
        self._build_model, self._optimizer, self._schedule = build_model, optimizer, schedule
        self.total_steps, self.clip_norm, self.max_bad_steps = total_steps, clip_norm, max_bad_steps
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self.tokenizer = tokenizer
        self.model: Any = None
        self.num_bad_steps = self.num_bad_in_a_row = self.num_empty_windows = 0
        self.room = MicroBatchSplitter()
        self._window: list[Batch] = []
        self._waiting: list[Batch] = []  # parts of the micro-batch whose first has gone forward
        # its loss, in whose place Lightning is given another leaf
        self._graph: torch.Tensor | None = None
        self._given = torch.zeros(())
        self._window_loss: torch.Tensor | float = 0.0
        self._val_sums = [0.0, 0.0]
        # sums of what the loss returns beside itself
        self._metrics: dict[str, torch.Tensor | float] = {}
        self.source_names: dict[
            str, Sequence[str]
        ] = {}  # of several sources of data, whose loss and share are logged, by stage
        # of the window, or of the evaluation; see sums_by_origin
        self._by_source: torch.Tensor | float = 0.0

    # ---- model

    def configure_model(self) -> None:
        """Build the base and inject LoRA, once."""
        if self.model is None:
            self.model = self._build_model()

    def on_fit_start(self) -> None:
        self.model.train()
        datamodule = getattr(self.trainer, "datamodule", None)
        self.source_names = {
            "train": getattr(datamodule, "source_names", ()),
            "val": getattr(datamodule, "val_source_names", ()),
        }

    def configure_optimizers(self) -> Any:
        """One optimiser over the adapter, one schedule that is stepped with it."""
        parameters = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = self._optimizer(parameters)
        if self._schedule is None:
            return optimizer
        total_steps = self.total_steps or int(self.trainer.estimated_stepping_batches)
        schedule = self._schedule(optimizer, total_steps=total_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    # ---- training

    def training_step(self, batch: Batch, batch_idx: int) -> torch.Tensor:
        """Return this micro-batch's share of the window's loss, times what is divided by later.

        Lightning divides by the window's length, and every strategy takes the mean of the
        processes' gradients.
        """
        if batch.window_weight == 0 and batch.denominator > 0:
            raise ValueError(
                "Batch.window_weight is 0, but the batch has weights; set it to the weight of the"
                " accumulation window"
            )
        self._window.append(batch)
        while True:
            try:
                self._waiting = self.room.parts(batch)
                loss = self._share_of(self._waiting.pop(0))
                break
            except RuntimeError as error:
                self._refuse_unless_room_can_be_made(error)
            self.room.shrink(batch)  # here, where the error holds no tensor any more
        if not self.can_repeat:
            return loss
        # Lightning holds what it is given until the step is over: with the graph behind it there
        # would be no room to repeat it.
        self._graph, self._given = loss, loss.detach().requires_grad_()
        return self._given

    def loss_of(self, part: Batch) -> torch.Tensor:
        """The loss of ``part`` with its graph, nothing counted or logged."""
        return compute_loss(self.model, part, self.loss).loss_sum

    def _share_of(self, part: Batch) -> torch.Tensor:
        """Run a part of a micro-batch; see ``training_step``."""
        output = self._compute(part, "train")
        loss = output.loss_sum / (part.window_weight or 1.0)
        self._window_loss = self._window_loss + loss.detach()
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the backward pass of a micro-batch, then those of its parts that wait.

        Where the memory is not enough, the window's gradient is made anew, from batches of half the
        size.
        """
        super().backward(loss, *args, **kwargs)
        if self._graph is None:
            return
        try:
            self._take_graph().backward(self._given.grad)
            while self._waiting:
                self._run_part(self._waiting.pop(0))
            return
        except RuntimeError as error:
            self._refuse_unless_room_can_be_made(error)
        while True:
            self.room.shrink(self._window[-1])
            try:
                self._repeat_window()
                return
            except RuntimeError as error:
                self._refuse_unless_room_can_be_made(error)

    def _take_graph(self) -> torch.Tensor:
        """The loss with its graph, which nothing else holds then."""
        graph, self._graph = self._graph, None
        assert graph is not None
        return graph

    @property
    def can_repeat(self) -> bool:
        """Whether a step can be computed again: other processes would wait, and DDP and
        DeepSpeed take gradients as they come.
        """
        return isinstance(self.trainer.strategy, SingleDeviceStrategy)

    def _run_part(self, part: Batch) -> None:
        """Forward and backward of a part, scaled as Lightning scales the loss of a step."""
        precision: Any = self.trainer.precision_plugin
        with precision.train_step_context():
            loss = self._share_of(part) / self.trainer.accumulate_grad_batches
        precision.pre_backward(loss, self).backward()

    def _repeat_window(self) -> None:
        """Make the gradient of all batches that the window had so far, from nothing."""
        for parameter in self.parameters():
            parameter.grad = None
        self._window_loss, self._by_source, self._metrics = 0.0, 0.0, {}
        for batch in self._window:
            for part in self.room.parts(batch):
                self._run_part(part)

    def _refuse_unless_room_can_be_made(self, error: RuntimeError) -> None:
        """Raise ``error`` where it is of another kind, or where a step cannot be computed again."""
        if not is_out_of_memory(error):
            raise error
        if not self.can_repeat:
            positions = self._window[-1].input_ids.numel() if self._window else 0
            raise TrainingError(
                f"out of memory in process {self.trainer.global_rank} with {positions:,} positions"
                " at a time, and neither joined processes nor DeepSpeed can repeat a step: halve"
                " data.tokens_per_batch or data.batch_size, or set"
                " trainer.activation_checkpointing=true"
            ) from error

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip, log, and skip the step where nothing is trained or something is not finite.

        A skipped step leaves every gradient None, so that the optimiser changes neither parameters
        nor its own state.
        """
        strategy: Any = self.trainer.strategy
        norm = self._clip(optimizer)
        window, loss = (
            self._window,
            torch.as_tensor(self._window_loss, dtype=torch.float32, device=self.device),
        )
        self._window, self._window_loss = [], 0.0
        loss = strategy.reduce(loss, reduce_op="sum")
        is_empty = window[-1].window_weight == 0
        # Here a step waits for the device; apart from an adapter on the unembedding, nowhere else.
        is_bad = not bool(torch.isfinite(norm) & torch.isfinite(loss))
        if is_empty or is_bad:
            (
                strategy.skip_step()
                if hasattr(strategy, "skip_step")
                else optimizer.zero_grad(set_to_none=True)
            )
        if is_empty:
            self.num_empty_windows += 1
            self.log("train/empty_windows", float(self.num_empty_windows))
            return
        self.num_bad_in_a_row = self.num_bad_in_a_row + 1 if is_bad else 0
        self.num_bad_steps += is_bad
        if is_bad:
            self.log("train/bad_steps", float(self.num_bad_steps))
        self.log("train/loss", loss, prog_bar=True)
        self.log("train/grad_norm", norm)
        self._log_metrics("train", window[-1].window_weight)
        self._log_by_source("train", shares=True)
        self.log("train/lr", optimizer.param_groups[0]["lr"], prog_bar=True)
        if self.num_bad_in_a_row >= self.max_bad_steps:
            self._stop_for_bad_steps(window)

    def _clip(self, optimizer: torch.optim.Optimizer) -> torch.Tensor:
        """Return the norm of the whole gradient before it is clipped; a strategy that partitions
        gradients does this itself.
        """
        limit = self.clip_norm or float("inf")
        strategy: Any = self.trainer.strategy
        if hasattr(strategy, "clip_gradients"):
            return strategy.clip_gradients(limit)
        return torch.nn.utils.clip_grad_norm_(
            (p for group in optimizer.param_groups for p in group["params"]), limit
        )

    def _stop_for_bad_steps(self, window: list[Batch]) -> None:
        name = (
            "bad_batches.pt"
            if self.trainer.world_size == 1
            else f"bad_batches_rank{self.trainer.global_rank}.pt"
        )
        path = Path(self.trainer.default_root_dir) / name
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save([batch.tensors() for batch in window], path)
        error = TrainingError(
            f"loss or gradient not finite in {self.num_bad_in_a_row} steps in a row (step"
            f" {self.trainer.global_step}); the last window's batches are in {path}. Lower"
            " optim.lr, lengthen the warm-up, or set trainer.precision=32-true."
        )
        error.is_of_all = True  # decided by all processes together
        raise error

    def _compute(self, batch: Batch, stage: str) -> LossOutput:
        """Run the model over ``batch``, and add up what the loss returns beside itself."""
        if inputs_of(self.loss).is_of_pairs and batch.weight and not batch.num_pairs:
            raise ConfigError("this loss is one of pairs: give it rows of chosen and rejected")
        if batch.num_pairs and not inputs_of(self.loss).is_of_pairs:
            raise ConfigError("rows of chosen and rejected need a loss of pairs: set loss=dpo")
        output = compute_loss(self.model, batch, self.loss)
        if names := self.source_names.get(stage):
            self._by_source = self._by_source + sums_by_origin(output, batch, len(names)).detach()
        for name, value in output.metrics.items():
            self._metrics[name] = self._metrics.get(name, 0.0) + value
        return output

    def _log_metrics(self, stage: str, denominator: float) -> None:
        """Log what the loss returned beside itself: sums over all processes, divided as the loss
        is.
        """
        if not self._metrics:
            return
        sums = torch.stack(
            [
                torch.as_tensor(value, dtype=torch.float32, device=self.device)
                for value in self._metrics.values()
            ]
        )
        strategy: Any = self.trainer.strategy
        for name, value in zip(self._metrics, strategy.reduce(sums, reduce_op="sum"), strict=True):
            self.log(f"{stage}/{name}", value / (denominator or float("nan")))
        self._metrics = {}

    def _log_by_source(self, stage: str, *, shares: bool = False) -> None:
        """Log the loss of each source of data, NaN where it has no token, and its share of the
        weight.
        """
        if not (names := self.source_names.get(stage)):
            return
        sums = torch.as_tensor(self._by_source, dtype=torch.float32, device=self.device)
        strategy: Any = self.trainer.strategy
        (losses, weights), self._by_source = strategy.reduce(sums, reduce_op="sum").tolist(), 0.0
        for name, loss, weight in zip(names, losses, weights, strict=True):
            self.log(f"{stage}/loss/{name}", loss / weight if weight else float("nan"))
            if shares:
                self.log(f"{stage}/share/{name}", weight / (sum(weights) or 1.0))

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        self._val_sums, self._by_source, self._metrics = [0.0, 0.0], 0.0, {}

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch to the loss over all evaluation tokens."""
        waiting = self.room.parts(batch)
        while waiting:
            try:
                output = self._compute(waiting[0], "val")
            except RuntimeError as error:
                self._refuse_unless_room_can_be_made(error)
                output = None
            if output is None:
                self.room.shrink(waiting[0])
                waiting = [part for one in waiting for part in self.room.parts(one)]
                continue
            part = waiting.pop(0)
            self._val_sums[0] += float(output.loss_sum)
            self._val_sums[1] += part.denominator

    def on_validation_epoch_end(self) -> None:
        sums = self._val_sums
        if self.trainer.world_size > 1:
            sums = self.trainer.strategy.reduce(
                torch.tensor(sums, device=self.device), reduce_op="sum"
            ).tolist()
        loss_sum, weight = sums
        self.log(
            "val/loss", loss_sum / weight if weight else float("nan"), prog_bar=True, sync_dist=True
        )
        self._log_metrics("val", weight)
        self._log_by_source("val")

    # ---- state: the adapter and nothing else

    # torch overloads it for a destination, which nobody gives
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable tensors by their names in this module, whole. All processes must ask
        together.
        """
        trained = {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        with whole(trained.values()) as is_copy:
            return {
                name: parameter.detach().clone() if is_copy else parameter.detach()
                for name, parameter in trained.items()
            }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load exactly the trainable tensors. Raises CheckpointError where names differ."""
        trained = {
            name: parameter
            for name, parameter in self.named_parameters()
            if parameter.requires_grad
        }
        if trained.keys() != state_dict.keys():
            differing = sorted(trained.keys() ^ state_dict.keys())
            raise CheckpointError(
                f"the checkpoint's adapter does not fit this run's: {', '.join(differing[:5])} …"
            )
        shapes = [
            name for name, tensor in trained.items() if full_shape(tensor) != state_dict[name].shape
        ]
        if shapes:
            raise CheckpointError(
                "the checkpoint's adapter has other shapes than this run's:"
                f" {', '.join(shapes[:5])} …"
            )
        with torch.no_grad(), whole(trained.values(), changes=True):
            for name, tensor in trained.items():
                tensor.copy_(state_dict[name])
        return torch.nn.modules.module._IncompatibleKeys([], [])

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the counts of skipped steps, and the window's length."""
        checkpoint["lorakit_counts"] = [
            self.num_bad_steps,
            self.num_bad_in_a_row,
            self.num_empty_windows,
        ]
        checkpoint["lorakit_accumulate"] = self.trainer.accumulate_grad_batches

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take them up. Lightning counts micro-batches, of which another number of processes has
        another number in a window.
        """
        counts = checkpoint.get("lorakit_counts", [0, 0, 0])
        self.num_bad_steps, self.num_bad_in_a_row, self.num_empty_windows = counts
        now = self.trainer.accumulate_grad_batches
        then = checkpoint.get("lorakit_accumulate", now)
        if then != now:
            for counters in checkpoint["loops"]["fit_loop"]["epoch_loop.batch_progress"].values():
                if isinstance(counters, dict):  # a batch that is begun and not done stays one
                    more = counters["ready"] * now // then - counters["ready"]
                    counters.update({name: count + more for name, count in counters.items()})
