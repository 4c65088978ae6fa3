"""ZeRO through DeepSpeed, on GPUs, and on CPUs with gloo and without a compiler."""

from __future__ import annotations

import argparse
import contextlib
import copy
import datetime
import logging
import os
from collections.abc import Iterator, Mapping
from typing import Any, Literal, cast

import torch
from lightning.pytorch.plugins.precision import DeepSpeedPrecision
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, Strategy

from lorakit.errors import ConfigError
from lorakit.strategy.state import gather_optimizer_state, scatter_optimizer_state
from lorakit.strategy.world import current_world, join, lift_limits

_Precision = Literal["32-true", "bf16-mixed", "16-mixed"]  # what training/precision.py resolves to


class ZeroStrategy(DeepSpeedStrategy):
    """ZeRO stage 1, 2 or 3 over the processes, for a frozen base and a trained adapter.

    Stages 1 and 2 keep the whole base in every process and partition the adapter's optimiser state
    (2: its gradients too); only the adapter's gradients and parameters travel. Stage 3 partitions
    the base as well, which is gathered layer by layer.

    Checkpoints are not DeepSpeed's: optimiser state and adapter are gathered into what a run in one
    process writes, so that any stage, and any number of processes, continues from any other's
    checkpoint.

    Args:
        stage: of ZeRO.
        offload: hold the optimiser's state, and at stage 3 the base too, in the host's memory.
        precision: as Lightning names it; adapters and their optimiser stay in float32.
        timeout_seconds: how long a process waits for the others.
        bucket_elements: elements that are reduced, or gathered, at a time.
        persist_elements: at stage 3, larger tensors are partitioned, others stay whole.
        live_elements: at stage 3, layers are gathered ahead, and stay for the backward pass, up to
            this many elements.
        leaf_modules: names of further classes of modules whose parameters are gathered all at once
            at stage 3.
        sequence_parallel: how many processes share each row of tokens (``strategy/sequence.py``).
    """

    def __init__(
        self,
        *,
        stage: int,
        offload: bool = False,
        precision: _Precision = "32-true",
        timeout_seconds: float = 600.0,
        bucket_elements: int = 50_000_000,
        persist_elements: int = 100_000,
        live_elements: int = 100_000_000,
        leaf_modules: tuple[str, ...] | list[str] = (),
        sequence_parallel: int = 1,
    ) -> None:
        if precision == "16-mixed":
            raise ConfigError(
                f"strategy=zero{stage} has no trainer.precision=16-mixed: DeepSpeed's float16 would"
                " train the adapter itself in float16. Set bf16-mixed or 32-true, or strategy=ddp"
            )
        if stage not in (1, 2, 3):
            raise ConfigError(f"strategy.stage={stage} is unknown; choose 1, 2 or 3")
        prepare_deepspeed()
        super().__init__(
            config=zero_config(stage, offload, bucket_elements, persist_elements, live_elements),
            precision_plugin=ZeroPrecision(precision),
            timeout=datetime.timedelta(seconds=timeout_seconds),
        )
        self.stage = stage
        self.leaf_modules = tuple(leaf_modules)
        self.sequence_parallel = sequence_parallel
        self._timeout_seconds = timeout_seconds
        self._norm = torch.tensor(0.0)
        self._trained: list[list[torch.nn.Parameter]] = []  # by the optimiser's groups
        # transformers partitions what it loads for as long as this is alive
        self._hf_config: Any = None

    # ---- processes

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)  # DeepSpeedStrategy's own refuses everything but CUDA

    def setup_distributed(self) -> None:
        import deepspeed

        self.set_world_ranks()
        join(current_world(), device=self.root_device.type, timeout_seconds=self._timeout_seconds)
        self._set_node_environment_variables()  # DeepSpeed reads them
        os.environ.setdefault("LOCAL_WORLD_SIZE", str(self.num_processes))
        if not deepspeed.comm.is_initialized():
            deepspeed.init_distributed(
                torch.distributed.get_backend(), auto_mpi_discovery=False, verbose=False
            )

    # ---- model

    @contextlib.contextmanager
    def model_sharded_context(self) -> Iterator[None]:
        """Lightning's hook around ``configure_model``. At stage 3 transformers partitions each
        tensor of the base as it reads it.

        The adapter is made outside of DeepSpeed's own context, which would partition a tensor
        before it is filled: ``lora_B`` would stay what its memory held.
        """
        if self.stage == 3:
            from transformers.integrations import HfDeepSpeedConfig

            # model/load.py adds the base's number format
            self._hf_config = HfDeepSpeedConfig(copy.deepcopy(self.config))
        yield

    @property
    def handles_gradient_accumulation(self) -> bool:
        return False  # Lightning calls the optimiser at the end of a window only

    def block_backward_sync(self) -> Any:
        return contextlib.nullcontext()  # DeepSpeed gets the ends of windows from us

    def _format_config(self) -> None:
        """Keep the config as it is: precision is ours, and so are windows."""

    def _setup_model_and_optimizer(
        self, model: Any, optimizer: Any, lr_scheduler: Any = None
    ) -> tuple[Any, Any]:
        import deepspeed

        self._trained = [list(group["params"]) for group in optimizer.param_groups]
        if self.stage == 3:
            self._mark_leaves(model)
        self._fit_bucket(sum(parameter.numel() for group in self._trained for parameter in group))
        index = self.root_device.index
        with nothing_is_sent():
            engine, zero, _, _ = deepspeed.initialize(
                args=None if index is None else argparse.Namespace(device_rank=index),
                config=self.config,
                model=model,
                optimizer=optimizer,
                lr_scheduler=lr_scheduler,
                dist_init_required=False,
            )
        self._take_over_norm(zero)
        if cast(ZeroPrecision, self.precision_plugin).precision == "bf16-mixed":
            # On a GPU the engine switches off any autocast around it that is not its own.
            engine.torch_autocast_enabled = lambda: True
            engine.torch_autocast_dtype = lambda: torch.bfloat16
        lift_limits()  # of the groups that it has made
        return engine, zero

    def init_deepspeed(self) -> None:
        module = self.lightning_module
        if self.model is not None and module is not None and module.trainer.training:
            self._initialize_deepspeed_train(self.model)

    def _fit_bucket(self, num_trained: int) -> None:
        """Make the bucket no larger than the adapter: DeepSpeed allocates what the config says."""
        assert isinstance(self.config, dict)
        zero = self.config["zero_optimization"]
        zero["reduce_bucket_size"] = min(zero["reduce_bucket_size"], num_trained)

    def _mark_leaves(self, model: Any) -> None:
        """Gather a module of experts at once: which of them a process needs depends on its
        batch, and all must gather the same.
        """
        from deepspeed.utils import set_z3_leaf_modules

        kinds = {
            type(module)
            for module in model.modules()
            if _chooses_among_children(module) or type(module).__name__ in self.leaf_modules
        }
        if kinds:
            set_z3_leaf_modules(model, sorted(kinds, key=lambda kind: kind.__name__))

    # ---- step

    def clip_gradients(self, limit: float) -> torch.Tensor:
        """Return the norm of the whole gradient; the step that follows clips it to ``limit``.
        NaN where it is not finite.
        """
        zero: Any = self.optimizers[0]
        zero.clip_grad = limit if limit < float("inf") else 0.0
        self._norm = torch.as_tensor(self._measure_norm(), dtype=torch.float32)
        return torch.where(self._norm >= 0, self._norm, float("nan"))

    def skip_step(self) -> None:
        """Let the step that follows drop the gradients and change nothing."""
        # DeepSpeed's own sign of a norm that is not finite
        self._norm = torch.full_like(self._norm, -1.0)

    def _take_over_norm(self, zero: Any) -> None:
        """Measure the norm once, before the step: it is logged, and decides with the loss
        whether the step is made.
        """
        from deepspeed.runtime.zero import stage3

        if self.stage == 3:
            measure = zero._get_norm_groups
            self._measure_norm = lambda: stage3.combine_grad_norm_groups(measure())
            zero._get_norm_groups = lambda: [self._norm]
        else:
            self._measure_norm = zero.scaled_global_norm
            zero.scaled_global_norm = lambda norm_type=2: self._norm

    # ---- checkpoints, in the form of a run in one process

    @property
    def restore_checkpoint_after_setup(self) -> bool:
        return False  # the adapter is loaded before it is partitioned

    @property
    def lightning_restore_optimizer(self) -> bool:
        return True

    def optimizer_state(self, optimizer: Any) -> dict[str, Any]:
        return gather_optimizer_state(self.optimizers[0], self._trained, self.stage)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        scatter_optimizer_state(
            self.optimizers[0], self._trained, self.stage, checkpoint["optimizer_states"][0]
        )

    def load_checkpoint(
        self, checkpoint_path: Any, weights_only: bool | None = None
    ) -> dict[str, Any]:
        return Strategy.load_checkpoint(self, checkpoint_path, weights_only)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        assert self.lightning_module is not None
        self.lightning_module.load_state_dict(checkpoint["state_dict"], strict=strict)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None
    ) -> None:
        Strategy.save_checkpoint(self, checkpoint, filepath, storage_options)


class ZeroPrecision(DeepSpeedPrecision):
    """Autocast around the forward, as Lightning has it elsewhere; DeepSpeed's own bf16 would
    train the adapter itself in bf16.
    """

    def convert_input(self, data: Any) -> Any:
        return data  # autocast chooses; weights of the loss stay in float32

    def forward_context(self) -> contextlib.AbstractContextManager[Any]:
        if self.precision != "bf16-mixed":
            return contextlib.nullcontext()
        return torch.autocast("cuda" if torch.cuda.is_available() else "cpu", dtype=torch.bfloat16)

    def backward(
        self, tensor: torch.Tensor, model: Any, optimizer: Any, *args: Any, **kwargs: Any
    ) -> None:
        """DeepSpeed divides by the window's length once more unless it is prevented."""
        engine = model.trainer.strategy.deepspeed_engine
        engine.set_gradient_accumulation_boundary(not model.trainer.fit_loop._should_accumulate())
        engine.backward(tensor, *args, scale_wrt_gas=False, **kwargs)


def zero_config(
    stage: int,
    offload: bool,
    bucket_elements: int = 50_000_000,
    persist_elements: int = 100_000,
    live_elements: int = 100_000_000,
) -> dict[str, Any]:
    """DeepSpeed's config of a stage."""
    zero: dict[str, Any] = {
        "stage": stage,
        "reduce_bucket_size": bucket_elements,
        "allgather_bucket_size": bucket_elements,
        "overlap_comm": torch.cuda.is_available(),
        "contiguous_gradients": True,
    }
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": bucket_elements,
            "stage3_param_persistence_threshold": persist_elements,
            # DeepSpeed's own 10^9 would hold a base of that size whole in every process.
            "stage3_max_live_parameters": live_elements,
            "stage3_max_reuse_distance": live_elements,
        }
    if offload:
        zero["offload_optimizer"] = {"device": "cpu"}
        if stage == 3:
            zero["offload_param"] = {"device": "cpu"}
    return {
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        # it needs a compiler; the run's own optimiser is used
        "zero_force_ds_cpu_optimizer": False,
        "train_micro_batch_size_per_gpu": 1,  # of no effect: batches are ours
        "gradient_accumulation_steps": 1,
        "steps_per_print": None,
    }


def prepare_deepspeed() -> None:
    """Import DeepSpeed so that it works without a compiler and keeps quiet. Raises ConfigError
    where it is missing.
    """
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    try:
        import deepspeed
    except ImportError as error:
        raise ConfigError(
            "this strategy needs deepspeed: pip install deepspeed, or set strategy=ddp"
        ) from error
    deepspeed.utils.logger.setLevel(logging.ERROR)
    # On a CPU it would compile an operation for shared memory at the first use: 40 s, or an error
    # without a compiler.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


@contextlib.contextmanager
def nothing_is_sent() -> Iterator[None]:
    """Keep DeepSpeed from sending the whole base to every process, which has read it already."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    send, DeepSpeedEngine._broadcast_model = DeepSpeedEngine._broadcast_model, lambda engine: None
    try:
        yield
    finally:
        DeepSpeedEngine._broadcast_model = send


def _chooses_among_children(module: torch.nn.Module) -> bool:
    """Whether ``module`` holds experts, as children of which it runs some or as stacks that an
    adapter reads past their owner.
    """
    if type(module).__name__ == "ExpertLora":
        return True
    experts = getattr(module, "experts", None)
    return isinstance(experts, torch.nn.ModuleList)
