"""The one LightningModule: a frozen base with LoRA, trained on weighted causal-LM batches."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import SingleDeviceStrategy

from lorakit.errors import CheckpointError, ConfigError, TrainingError
from lorakit.lora.spec import LoRASpec
from lorakit.loss import LOSSES
from lorakit.loss.inputs import inputs_of
from lorakit.model.partition import full_shape, whole
from lorakit.model.spec import ModelSpec
from lorakit.training.adapted_model import build_adapted_model
from lorakit.training.oom import OutOfMemoryRetry
from lorakit.training.step import compute_loss
from lorakit.training.window import AccumulationWindow, EvaluationSums, Sums
from lorakit.types import Batch, LossOutput


class LoRAModule(L.LightningModule):
    """Trains the adapter of a model.

    Args:
        model: the base, which is loaded and given an adapter in ``configure_model``, so that a
            strategy can shard it; a path or name of the hub is enough. Or a function that makes
            the PEFT-wrapped model; it is called there, once.
        lora: which matrices of the base get an adapter.
        activation_checkpointing: compute activations again in the backward pass.
        compile: torch.compile of each layer.
        optimizer: makes the optimiser of the trainable parameters, for instance
            ``partial(torch.optim.AdamW, lr=5e-4)``.
        schedule: makes its schedule from (optimizer, total_steps=…); None keeps the learning rate.
        total_steps: optimiser steps of the whole fit, for the schedule; None asks the trainer.
        loss: a name in ``LOSSES``, or a function of (logprobs, batch) that returns a
            ``LossOutput``; its metrics are logged.
        clip_norm: largest L2 norm of the gradient, 0 for none. The norm is logged before clipping.
        max_bad_steps: the run ends after this many steps in a row whose loss or gradient is not
            finite.

    The loss is ``sum(loss) / sum(|weight|)`` (of pairs: divided by their number) over the whole
    accumulation window of all processes: how the window is cut into micro-batches and shared out
    does not change the gradient. Whether a step is skipped is decided by all processes together.
    """

    def __init__(
        self,
        model: ModelSpec | str | Callable[[], Any],
        *,
        optimizer: Callable[..., torch.optim.Optimizer],
        lora: LoRASpec | None = None,
        activation_checkpointing: bool = False,
        compile: bool = False,
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
        self.model_spec = ModelSpec(model) if isinstance(model, str) else model
        self.lora = lora or LoRASpec()
        self._build_options = {
            "activation_checkpointing": activation_checkpointing,
            "compile": compile,
        }
        self._optimizer, self._schedule = optimizer, schedule
        self.total_steps, self.clip_norm, self.max_bad_steps = total_steps, clip_norm, max_bad_steps
        self.loss = LOSSES[loss] if isinstance(loss, str) else loss
        self._tokenizer = tokenizer
        self.model: Any = None
        self.num_bad_steps = self.num_bad_in_a_row = self.num_empty_windows = 0
        self.window, self.retry = AccumulationWindow(), OutOfMemoryRetry()
        self._evaluation = EvaluationSums()
        # of several sources of data, whose loss and share are logged, by stage
        self.source_names: dict[str, Sequence[str]] = {}

    # ---- model

    @property
    def tokenizer(self) -> Any:
        """The one that was given, else that of the model's spec; None where there is neither."""
        if self._tokenizer is None and isinstance(self.model_spec, ModelSpec):
            self._tokenizer = self.model_spec.load_tokenizer()
        return self._tokenizer

    def configure_model(self) -> None:
        """Build the base and inject LoRA, once."""
        if self.model is not None:
            return
        if callable(self.model_spec):
            self.model = self.model_spec()
            return
        self.model = build_adapted_model(
            self.model_spec,
            self.lora,
            precision=str(self.trainer.precision),
            device=self.trainer.strategy.root_device.type,
            **self._build_options,
        )

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
        self.window.batches.append(batch)
        return self.retry.forward(self, batch)

    def piece_loss(self, piece: Batch) -> torch.Tensor:
        """Run a piece of a micro-batch and count it; see ``training_step``."""
        output = self._compute(piece, "train", self.window)
        loss = output.loss_sum / (piece.window_weight or 1.0)
        self.window.loss = self.window.loss + loss.detach()
        # Lightning divides by both
        return loss * self.trainer.accumulate_grad_batches * self.trainer.world_size

    def uncounted_loss(self, piece: Batch) -> torch.Tensor:
        """The loss of ``piece`` with its graph, nothing counted or logged."""
        return compute_loss(self.model, piece, self.loss).loss_sum

    def backward(self, loss: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        """Lightning's hook: the backward pass of a micro-batch, then those of its pieces that wait
        where the memory was not enough for all of it.
        """
        super().backward(loss, *args, **kwargs)
        self.retry.backward(self)

    @property
    def can_repeat(self) -> bool:
        """Whether a step can be computed again: other processes would wait, and DDP and
        DeepSpeed take gradients as they come.
        """
        return isinstance(self.trainer.strategy, SingleDeviceStrategy)

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
        window, self.window = self.window, AccumulationWindow()
        loss = torch.as_tensor(window.loss, dtype=torch.float32, device=self.device)
        loss = strategy.reduce(loss, reduce_op="sum")
        is_empty = window.weight == 0
        # Here a step waits for the device; apart from an adapter on the unembedding, nowhere else.
        is_bad = not bool(torch.isfinite(norm) & torch.isfinite(loss))
        if is_empty or is_bad:
            if hasattr(strategy, "skip_step"):
                strategy.skip_step()
            else:
                optimizer.zero_grad(set_to_none=True)
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
        self._log_metrics("train", window, window.weight)
        self._log_by_source("train", window, shares=True)
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

    def _stop_for_bad_steps(self, window: AccumulationWindow) -> None:
        whose = f"_rank{self.trainer.global_rank}" if self.trainer.world_size > 1 else ""
        path = Path(self.trainer.default_root_dir) / f"bad_batches{whose}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(window.tensors(), path)
        error = TrainingError(
            f"loss or gradient not finite in {self.num_bad_in_a_row} steps in a row (step"
            f" {self.trainer.global_step}); the last window's batches are in {path}. Lower"
            " optim.lr, lengthen the warm-up, or set trainer.precision=32-true."
        )
        error.is_of_all = True  # decided by all processes together
        raise error

    def _compute(self, batch: Batch, stage: str, sums: Sums) -> LossOutput:
        """Run the model over ``batch``, and add to ``sums`` what the loss returns beside itself."""
        if inputs_of(self.loss).is_of_pairs and batch.weight and not batch.num_pairs:
            raise ConfigError("this loss is one of pairs: give it rows of chosen and rejected")
        if batch.num_pairs and not inputs_of(self.loss).is_of_pairs:
            raise ConfigError("rows of chosen and rejected need a loss of pairs: set loss=dpo")
        output = compute_loss(self.model, batch, self.loss)
        sums.add(output, batch, len(self.source_names.get(stage, ())))
        return output

    def _log_metrics(self, stage: str, sums: Sums, denominator: float) -> None:
        """Log what the loss returned beside itself: sums over all processes, divided alike."""
        if not sums.metrics:
            return
        kind: dict[str, Any] = {"dtype": torch.float32, "device": self.device}
        values = [torch.as_tensor(value, **kind) for value in sums.metrics.values()]
        strategy: Any = self.trainer.strategy
        reduced = strategy.reduce(torch.stack(values), reduce_op="sum")
        for name, value in zip(sums.metrics, reduced, strict=True):
            self.log(f"{stage}/{name}", value / (denominator or float("nan")))

    def _log_by_source(self, stage: str, sums: Sums, *, shares: bool = False) -> None:
        """Log each source's loss, NaN where it has no token, and its share of the weight."""
        if not (names := self.source_names.get(stage)):
            return
        by_source = torch.as_tensor(sums.by_source, dtype=torch.float32, device=self.device)
        strategy: Any = self.trainer.strategy
        losses, weights = strategy.reduce(by_source, reduce_op="sum").tolist()
        for name, loss, weight in zip(names, losses, weights, strict=True):
            self.log(f"{stage}/loss/{name}", loss / weight if weight else float("nan"))
            if shares:
                self.log(f"{stage}/share/{name}", weight / (sum(weights) or 1.0))

    # ---- evaluation

    def on_validation_epoch_start(self) -> None:
        self._evaluation = EvaluationSums()

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Add this batch to the loss over all evaluation tokens."""
        sums = self._evaluation
        for output, piece in self.retry.evaluate(
            self, batch, lambda piece: self._compute(piece, "val", sums)
        ):
            sums.loss_sum += float(output.loss_sum)
            sums.denominator += piece.denominator

    def on_validation_epoch_end(self) -> None:
        sums = self._evaluation
        loss_sum, weight = sums.loss_sum, sums.denominator
        if self.trainer.world_size > 1:
            own = torch.tensor([loss_sum, weight], device=self.device)
            loss_sum, weight = self.trainer.strategy.reduce(own, reduce_op="sum").tolist()
        mean = loss_sum / weight if weight else float("nan")
        self.log("val/loss", mean, prog_bar=True, sync_dist=True)
        self._log_metrics("val", sums, weight)
        self._log_by_source("val", sums)

    # ---- state: the adapter and nothing else

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: tensor for name, tensor in self.named_parameters() if tensor.requires_grad}

    # torch overloads it for a destination, which nobody gives
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The trainable tensors by name in this module, whole. All processes must ask together."""
        trained = self._trained()
        with whole(trained.values()) as is_copy:
            return {
                name: parameter.detach().clone() if is_copy else parameter.detach()
                for name, parameter in trained.items()
            }

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Load exactly the trainable tensors. Raises CheckpointError where names differ."""
        trained = self._trained()
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
        """Restore those counts. Lightning counts micro-batches, of which another number of
        processes has another number in a window.
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
