"""A frozen base with its bank of adapters: what an engine runs on."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from lorakit.data.images import ImageEncoder
from lorakit.errors import AdapterError, ConfigError, DataError
from lorakit.lora.bank import AdapterBank
from lorakit.lora.flat_parameters import FlatParameters, plan_layout
from lorakit.lora.spec import PER_EXPERT, SHARED_OUTER, LoRASpec
from lorakit.model.attention import attend_by_document
from lorakit.model.load import (
    base_name,
    load_config,
    load_image_processor,
    load_model,
    load_tokenizer,
)
from lorakit.sampling.check import decoding_problem
from lorakit.strategy.world import current_world
from lorakit.training.precision import base_dtype, resolve_accelerator, resolve_precision
from lorakit.types import Datum
from lorakit.weights.adapter import AdapterFiles

log = logging.getLogger("lorakit")

# what PEFT's configs may ask for, and adapters here do not have
NOT_LOADED = (
    "rank_pattern",
    "alpha_pattern",
    "use_dora",
    "modules_to_save",
    "trainable_token_indices",
)
STRATEGIES = ("single", "ddp", "zero1", "zero2", "zero3", "zero3_offload")


@dataclass
class Base:
    """A loaded base model. ``name`` is what adapters on it are said to be made for."""

    name: str
    model: Any
    tokenizer: Any
    precision: str
    bank: AdapterBank
    strategy: str = "single"
    sampling_problem: str | None = None  # why it cannot be sampled in rows
    _partitioned: Any = None  # strategy/partitioned.py:PartitionedBase
    images: ImageEncoder | None = None  # where it takes images
    _layouts: dict[LoRASpec, FlatParameters] = field(default_factory=dict)

    @classmethod
    def load(
        cls,
        path: str,
        *,
        accelerator: str = "auto",
        precision: str = "auto",
        attention: str = "auto",
        strategy: str = "auto",
    ) -> Base:
        """Read the model at ``path``; several processes all call this together.

        Args:
            precision: ``auto`` is bf16 on a GPU that has it, else float32.
            strategy: how several processes share the work: ``ddp`` has everything in each;
                ``zero1`` and ``zero2`` share the optimisers' state; ``zero3`` and ``zero3_offload``
                the base too. ``auto`` is ``zero2``, and ``single`` for one process.

        Raises:
            ConfigError: the model cannot be read, or a setting is unknown.
        """
        strategy = _resolve_strategy(strategy)
        device = resolve_accelerator(accelerator)
        if precision == "16-mixed":
            raise ConfigError(
                "precision=16-mixed is not offered here: its gradients need a scaled loss; choose"
                " bf16-mixed or 32-true"
            )
        resolved = (
            "32-true"
            if precision == "auto" and device == "cpu"
            else resolve_precision(precision, device)
        )
        precision = "32-true" if resolved == "16-mixed" else resolved
        where = f"cuda:{current_world().local_rank}" if device == "cuda" else device
        build = functools.partial(
            load_model, path, dtype=base_dtype("auto", precision), attention=attention, device=where
        )
        partitioned = None
        if strategy.startswith("zero3"):
            from lorakit.strategy.partitioned import PartitionedBase

            partitioned = PartitionedBase(build, offload=strategy.endswith("offload"))
        model = partitioned.model if partitioned else build()
        base = cls(
            base_name(path),
            model,
            load_tokenizer(path),
            precision,
            AdapterBank(model),
            strategy,
            None,
            partitioned,
            _images(path),
        )
        with torch.no_grad():
            _, base.sampling_problem = base.run_pass(
                lambda: (torch.zeros(()), attend_by_document(model) or decoding_problem(model))
            )
        return base

    def check_images(self, data: Sequence[Datum]) -> None:
        """Raise DataError, that names Datum and chunk, where images cannot go through this base,
        or text says that it is one.
        """
        for number, datum in enumerate(data):
            try:
                if self.images is not None:
                    self.images.check(datum.model_input)
                elif datum.model_input.images:
                    raise DataError("this model takes no images")
            except DataError as error:
                raise DataError(f"data[{number}].model_input: {error}") from error

    @property
    def is_partitioned(self) -> bool:
        """Whether each process holds a part of the base, so that all must run it together."""
        return self._partitioned is not None

    @property
    def shards_optimizer(self) -> bool:
        """Whether each process holds the optimisers' state for a share of every adapter."""
        return self.strategy.startswith("zero")

    def run_pass(self, compute: Callable[[], tuple[torch.Tensor, Any]]) -> tuple[torch.Tensor, Any]:
        """Run ``compute`` in the base's number format, with its parameters whole."""
        with self.autocast():
            return self._partitioned.run(compute) if self._partitioned else compute()

    def release(self) -> None:
        """To be called after each backward pass."""
        if self._partitioned:
            self._partitioned.release()

    @property
    def device(self) -> torch.device:
        # parts may be in the host's memory
        if self._partitioned is not None and torch.cuda.is_available():
            return torch.device("cuda", current_world().local_rank)
        return self.model.device

    @property
    def vocab_size(self) -> int:
        """Tokens that the embedding knows."""
        return int(self.model.config.get_text_config().vocab_size)

    @property
    def max_tokens(self) -> int | None:
        """Positions that the model was made for."""
        return getattr(self.model.config.get_text_config(), "max_position_embeddings", None)

    @property
    def pad_token_id(self) -> int:
        """Any token: padding is to the right of what it could change."""
        return int(self.tokenizer.pad_token_id or 0)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        """The number format that products run in, as in a run of the same precision."""
        if self.precision == "bf16-mixed":
            return torch.autocast(self.device.type, torch.bfloat16)
        return contextlib.nullcontext()

    def layout(self, spec: LoRASpec) -> FlatParameters:
        """Return where everything of an adapter of ``spec`` is. Raises ConfigError where it
        matches nothing.
        """
        if spec not in self._layouts:
            self._layouts[spec] = plan_layout(self.model, spec, base_name=self.name)
        return self._layouts[spec]

    def read_adapter(self, files: AdapterFiles) -> tuple[FlatParameters, torch.Tensor]:
        """Return the layout and the numbers of any PEFT adapter in a folder. Raises AdapterError
        where it does not fit.
        """
        spec = _spec_of(files, self.model)
        try:
            layout = self.layout(spec)
        except ConfigError as error:
            raise AdapterError(f"{files.folder} does not fit {self.name}: {error}") from error
        return layout, layout.from_file_tensors(files.tensors(), source=str(files.folder))


def _images(path: str) -> ImageEncoder | None:
    """What encodes images for the model at ``path``; None where it takes none, or is of a family
    whose images are not known.
    """
    config = load_config(path)
    if getattr(config, "vision_config", None) is None:
        return None
    try:
        return ImageEncoder(load_image_processor(path), config)
    except ConfigError as error:
        log.warning("%s: images cannot be sent to it: %s", path, error)
        return None


def _resolve_strategy(strategy: str) -> str:
    several = current_world().size > 1
    if strategy == "auto":
        return "zero2" if several else "single"
    if strategy not in STRATEGIES:
        raise ConfigError(f"strategy={strategy} is unknown; choose auto, {', '.join(STRATEGIES)}")
    if strategy == "single" and several:
        raise ConfigError("strategy=single is for one process; choose ddp, zero1, zero2 or zero3")
    return strategy


def _spec_of(files: AdapterFiles, model: Any) -> LoRASpec:
    """What an adapter's config and tensors say of it."""
    config = files.config
    if problem := files.find_init_problem():
        raise AdapterError(f"{files.folder}: {problem}")
    if refused := [name for name in NOT_LOADED if config.get(name)]:
        raise AdapterError(f"{files.folder} has {', '.join(refused)}, which cannot be loaded here")
    names = {name.removeprefix("base_model.model.").split(".lora_")[0] for name in files.tensors()}
    modules, targets = dict(model.named_modules()), []
    shared = files.expert_matrices()
    for name in sorted(names - set(shared)):
        module = name.removesuffix(".base_layer")
        parameters = config.get("target_parameters") or ()
        own = [p for p in parameters if f"{p.rpartition('.')[0]}." in f"{module}."]
        is_stack = any(hasattr(modules.get(module), p.rpartition(".")[2]) for p in own)
        targets += [f"{module}.{p.rpartition('.')[2]}" for p in own] if is_stack else [name]
    targets += [_stack_of(name, modules) for name in shared]
    return LoRASpec(
        rank=int(config["r"]),
        alpha=float(config["lora_alpha"]),
        rslora=bool(config.get("use_rslora")),
        targets=tuple(dict.fromkeys(targets)),
        expert_layout=SHARED_OUTER if shared else PER_EXPERT,
    )


def _stack_of(matrix: str, modules: dict[str, Any]) -> str:
    """The stacked parameter that holds an expert matrix, ``…experts.gate_proj`` say."""
    module, _, leaf = matrix.rpartition(".")
    fused = hasattr(modules.get(module), "gate_up_proj") and leaf in ("gate_proj", "up_proj")
    return f"{module}.{'gate_up_proj' if fused else leaf}"
