"""From a run's config to a plan of its memory; what a run does with it."""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import weakref
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

import torch
import yaml
from rich.console import Console

from lorakit.config.paths import conf_dir
from lorakit.config.schema import RunConfig
from lorakit.config.settings import Component
from lorakit.data.examples import DatasetReport
from lorakit.data.specs import DEFAULT_BATCH_SIZE
from lorakit.lora.plan import LoRAPlan
from lorakit.model.vision import find_tower
from lorakit.planner.fake_images import SampleShapes
from lorakit.planner.memory import (
    ONEDNN_BYTES,
    STRATEGIES,
    WARN_SHARE,
    Memory,
    Settings,
    available_bytes,
    memory_of,
    rough_bound,
)
from lorakit.planner.trace import StepShape, StepTrace, keeps_scores, trace_forward, trace_step
from lorakit.sampling.generate import MAX_BATCH
from lorakit.strategy.world import World, all_gather_object, current_world
from lorakit.training.precision import base_dtype

log = logging.getLogger("lorakit")


# What was traced of a model without weights: settings are chosen by it, then the run is planned.
_TRACES: weakref.WeakKeyDictionary[Any, dict[str, Any]] = weakref.WeakKeyDictionary()
Traced = TypeVar("Traced")


class StepPlan:
    """The memory of a run's step under any strategy. The step is traced at the first question,
    which takes some seconds.

    Args:
        optimizer: makes the optimiser of the adapter; its learning rate does not matter here.
        rows, val_rows: how large the examples are that are trained, or evaluated.
    """

    def __init__(
        self,
        config: RunConfig,
        skeleton: Any,
        planned: LoRAPlan,
        *,
        accelerator: str,
        precision: str,
        optimizer: Callable[..., torch.optim.Optimizer],
        rows: SampleShapes | None = None,
        val_rows: SampleShapes | None = None,
    ) -> None:
        self.optimizer = optimizer
        self.config, self.skeleton, self.planned = config, skeleton, planned
        self.rows, self.val_rows = rows or SampleShapes(), val_rows or SampleShapes()
        self.accelerator = "cpu" if accelerator == "cpu" else "cuda"
        self.shape = step_shape(
            config, accelerator=self.accelerator, precision=precision, rows=self.rows
        )
        self._evaluation_bytes: int | None = None

    @property
    def trace(self) -> StepTrace:
        """Raises ConfigError for a model whose step depends on values."""
        arguments = (self.skeleton, self.planned.spec, self.shape, self.optimizer)
        return self._once((self.shape, self.optimizer), partial(trace_step, *arguments))

    def _once(self, key: tuple[Any, ...], trace: Callable[[], Traced]) -> Traced:
        """What ``trace`` returns, of this model and these adapters, the first time it is asked."""
        known = _TRACES.setdefault(self.skeleton, {})
        if (text := repr((self.planned.spec, *key))) not in known:
            with _at_work():
                known[text] = trace()
        found: Traced = known[text]
        return found

    @property
    def base_bytes(self) -> int:
        """What the frozen base takes."""
        return self.planned.num_base_params * (4 if self.shape.dtype == "float32" else 2)

    def memory(self, strategy: str, num_processes: int) -> Memory:
        """What each process holds under ``strategy``, one of ``STRATEGIES``."""
        settings = Settings(
            accumulates=self.config.trainer.accumulate_grad_batches > 1,
            is_cuda=self.accelerator == "cuda",
            keeps_products=self._keeps_products,
            **_zero_settings(strategy, self.config.strategy),
        )
        memory = memory_of(strategy, num_processes, self.trace, settings)
        most = max(memory.activations, self.evaluation_bytes - memory.head)
        return dataclasses.replace(memory, activations=most)

    @property
    def _keeps_products(self) -> bool:
        """Whether a CPU's library keeps something for each shape of a product of experts."""
        is_16_bit_on_cpu = self.accelerator == "cpu" and self.shape.dtype != "float32"
        return is_16_bit_on_cpu and any(target.outer for target in self.planned.targets)

    @property
    def evaluation_bytes(self) -> int:
        """What evaluating, or sampling, holds at its peak, where it has more positions at a time
        than a step; else 0.
        """
        if self._evaluation_bytes is None:
            spec = self.planned.spec
            found = [
                self._kept_bytes(one)
                + self._once((one.shape,), partial(trace_forward, self.skeleton, spec, one.shape))
                for one in self.passes
            ]
            self._evaluation_bytes = max(found, default=0)
        return self._evaluation_bytes

    @property
    def passes(self) -> list[Pass]:
        """The run's evaluation and sampling, where they have more positions than a step."""
        return passes_without_gradients(self.config, self.shape, self.val_rows)

    def _kept_bytes(self, one: Pass) -> int:
        return one.num_kept * cache_bytes(self.skeleton.config, self.shape.dtype)

    def is_small_for(self, num_bytes: int) -> bool:
        """Whether the step surely fits into ``num_bytes``, by a bound that costs no trace."""
        shapes = [self.shape, *(one.shape for one in self.passes)]
        kept = max((self._kept_bytes(one) for one in self.passes), default=0)
        kept += ONEDNN_BYTES if self._keeps_products else 0
        vision = getattr(self.skeleton.config, "vision_config", None)
        patches = getattr(vision, "spatial_merge_size", 1) ** 2  # of a position
        num_tokens = num_positions = 0
        for shape in shapes:
            of_images = [patches * count for count in shape.image_tokens]
            num_tokens = max(num_tokens, shape.num_rows * shape.num_positions + sum(of_images))
            num_positions = max(num_positions, shape.num_positions, *of_images)
        bound = rough_bound(
            self.skeleton,
            self.planned.num_params,
            bytes_each=4 if self.shape.dtype == "float32" else 2,
            num_tokens=num_tokens,
            num_positions=num_positions,
            checkpointing=self.shape.checkpointing,
            keeps_scores=keeps_scores(self.skeleton, self.shape),
        )
        return bound + kept < WARN_SHARE * num_bytes

    def first_that_fits(
        self, num_processes: int, num_bytes: int, *, offloads: bool = True
    ) -> str | None:
        """The strategy that costs least time among those that fit into ``num_bytes``, or None."""
        is_cuda = self.accelerator == "cuda"
        names = STRATEGIES[:1] if num_processes == 1 else STRATEGIES[2 if is_cuda else 1 : -1]
        if offloads and is_cuda:
            names += STRATEGIES[-1:]
        for name in names:
            if self.memory(name, num_processes).total <= WARN_SHARE * num_bytes:
                return name
        return None


def _at_work() -> contextlib.AbstractContextManager[Any]:
    """A sign of life on a terminal: tracing 30 billion parameters takes twenty seconds."""
    if not current_world().is_rank_zero:
        return contextlib.nullcontext()
    return Console(stderr=True).status("planning memory: going through a step without weights …")


def step_shape(
    config: RunConfig, *, accelerator: str, precision: str, rows: SampleShapes | None = None
) -> StepShape:
    """The largest micro-batch that a run of ``config`` will see."""
    batches, rows, sp_size = config.data.batches, rows or SampleShapes(), config.sequence_parallel
    max_tokens = config.data.rendering.max_tokens
    num_positions = config.row_tokens or min(max_tokens, rows.longest or 1 << 62)
    num_rows = config.rows_per_example * (batches.batch_size or DEFAULT_BATCH_SIZE)
    if not batches.packing:
        num_rows = min(num_rows, rows.count or num_rows)
    if batches.tokens_per_batch:
        num_rows = max(1, batches.tokens_per_batch // num_positions)
    return StepShape(
        num_rows=num_rows,
        num_positions=-(-num_positions // sp_size),
        sp_size=sp_size,
        dtype=base_dtype(config.model.dtype, precision),
        precision=precision,
        device=accelerator,
        checkpointing=config.trainer.activation_checkpointing,
        attention=config.model.attention,
        image_tokens=rows.images_in(num_rows, num_positions) if sp_size == 1 else (),
    )


@dataclasses.dataclass(frozen=True)
class Pass:
    """A pass without gradients: its shape, and the tokens whose keys and values are kept."""

    shape: StepShape
    num_kept: int = 0


def passes_without_gradients(
    config: RunConfig, training: StepShape, rows: SampleShapes
) -> list[Pass]:
    """Return the evaluation and the sampling of a run of ``config``, those of them that have more
    positions than a step.

    Args:
        rows: how large the rows are that are evaluated.
    """
    data, samples = config.data, config.callbacks.get("samples") or Component("", {})
    if not (data.rows.val_path or data.rows.val_fraction):
        return []
    num_positions = min(data.rendering.max_tokens, rows.longest or 1 << 62)
    most = data.rows.val_rows or 1 << 62
    num_rows = config.rows_per_example * min(data.batches.val_batch_size or 0, most)
    asked = len(samples.get("prompts") or ()) or min(samples.get("num_prompts", 0), most)
    num_prompts = min(asked, MAX_BATCH)
    kept = num_prompts * (num_positions + samples.get("max_tokens", 0))
    shared = _without_gradients(
        training, rows, num_rows, -(-num_positions // training.sp_size), training.sp_size
    )
    # each process samples whole rows
    sampled = _without_gradients(training, rows, num_prompts, num_positions, sp_size=1)
    in_step = training.num_rows * training.num_positions
    found = ((Pass(shared), num_rows * shared.num_positions), (Pass(sampled, kept), kept))
    return [one for one, num_positions in found if num_positions > in_step]


def _without_gradients(
    training: StepShape, rows: SampleShapes, num_rows: int, num_positions: int, sp_size: int
) -> StepShape:
    return dataclasses.replace(
        training,
        checkpointing=False,
        num_rows=num_rows,
        num_positions=num_positions,
        sp_size=sp_size,
        image_tokens=rows.images_in(num_rows, num_positions) if training.sp_size == 1 else (),
    )


def row_sizes(report: DatasetReport | None) -> SampleShapes:
    """What ``report`` says of its rows."""
    if report is None:
        return SampleShapes()
    count = report.num_examples if report.num_rows_profiled >= report.num_rows else None
    return SampleShapes(report.longest, report.largest_image, report.image_share, count)


def row_sizes_without_data(config: RunConfig, skeleton: Any) -> SampleShapes:
    """Of rows that nobody has named yet: full of images of ``data.max_pixels``, where that is
    set and the model takes images.
    """
    most, vision = config.data.images.max_pixels, getattr(skeleton.config, "vision_config", None)
    if not most or vision is None or find_tower(skeleton) is None:
        return SampleShapes()
    side = vision.patch_size * vision.spatial_merge_size
    return SampleShapes(largest_image=max(1, most // side**2))


def cache_bytes(model_config: Any, dtype: str) -> int:
    """Bytes of keys and values of a token, where every layer attends to all tokens."""
    config = model_config.get_text_config()
    all_heads = getattr(config, "num_attention_heads", None) or 0
    if not all_heads:
        return 0
    heads = getattr(config, "num_key_value_heads", None) or all_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // all_heads
    return 2 * config.num_hidden_layers * heads * width * (4 if dtype == "float32" else 2)


def agree_on_memory(gigabytes: float | None, accelerator: str, world: World) -> int:
    """Return the bytes that every process of the run has: ``plan.memory_gb``, or the least of
    what each finds. All call together.
    """
    if gigabytes:
        return round(gigabytes * 1e9)
    return min(all_gather_object(available_bytes(accelerator, world.local_size)))


def strategy_name(strategy: Component) -> str:
    """The name of the file in conf/strategy that ``strategy`` is, as far as memory is concerned."""
    if stage := strategy.get("stage"):
        return f"zero{stage}{'_offload' if stage == 3 and strategy.get('offload') else ''}"
    return "single" if strategy.target.endswith("single") else "ddp"


def describe(memory: Memory) -> str:
    """The parts of ``memory``, largest first."""
    parts = sorted(vars(memory).items(), key=lambda part: -part[1])
    return ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts if size >= 5e7)


def _zero_settings(strategy: str, chosen: Component) -> dict[str, Any]:
    """The sizes that the config sets for ``strategy``, of another one what its file says."""
    if not strategy.startswith("zero"):
        return {}
    file = conf_dir() / "strategy" / f"{strategy}.yaml"
    found = yaml.safe_load(file.read_text(encoding="utf-8"))
    stage = {"stage", "offload"}
    if {k: chosen.get(k) for k in stage} == {k: found.get(k) for k in stage}:
        found = {**found, **chosen.arguments}
    return {key: found[key] for key in ("bucket_elements", "live_elements") if key in found}
