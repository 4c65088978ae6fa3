"""One optimiser step of a model without values: what it would hold at its peak, and the products it
would compute.

The step that trains (the model with its adapters, ``training/step.py``, the optimiser) runs on
tensors that have shape, dtype and device and no memory (`torch._subclasses.FakeTensorMode`), while
every tensor that comes and goes is counted. So there is no formula for activations that a new
family of models, a setting or a change of our own code could make wrong.

What has no values cannot say which expert a token goes to (`lora/grouped.py` then shares them out
evenly). A model whose step depends on values in another way cannot be traced, and is said so.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from torch.utils.flop_counter import flop_registry
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from lorakit.errors import ConfigError
from lorakit.lora.experts import ExpertLora
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss.cross_entropy import cross_entropy
from lorakit.loss.head import BLOCK_BYTES
from lorakit.loss.logprobs import trust_head
from lorakit.model.layers import enable_checkpointing
from lorakit.model.vision import is_tower_needed
from lorakit.planner.fake_images import images_without_values, pick_of_images, sizes_known
from lorakit.training.step import compute_loss
from lorakit.types import Batch

aten = torch.ops.aten

WEIGHTS, ADAPTER, GRADIENTS, OPTIMIZER = "weights", "adapter", "gradients", "optimizer"
ACTIVATIONS, HEAD = "activations", "head"
_ATTENTION = "attention_of_a_plan"


@dataclass(frozen=True)
class StepTrace:
    """Bytes in one process that holds the whole model, at the step's peak; and multiplications.

    ``activations`` and ``head`` are what forward and backward hold at their peak, split by whether
    the unembedding and the loss made it, ``gradients`` those of the adapter that are there at that
    moment.
    """

    weights: int  # the frozen base, buffers too
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    head: int
    step: int  # more than that is held for a moment inside of the optimiser's step
    num_params: int  # trainable
    num_base_params: int
    # bytes of the frozen weights of the module that has most of its own, or of an expert module
    largest_layer: int
    num_flops: int  # of forward and backward, a multiplication and an addition being two
    num_tokens: int


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A step apart from its model: micro-batch, number formats, what is computed again."""

    num_rows: int
    num_positions: int  # in each process
    dtype: str  # of the frozen base
    precision: str  # as Lightning names it
    device: str  # cpu or cuda
    checkpointing: bool = False
    attention: str = "auto"
    # processes that share each row: each attends over whole rows, with as many times fewer heads
    sp_size: int = 1
    image_tokens: tuple[int, ...] = ()  # positions of each image, of all rows


def trace_step(
    skeleton: Any,
    spec: LoRASpec,
    shape: StepShape,
    make_optimizer: Callable[..., torch.optim.Optimizer],
) -> StepTrace:
    """Return what a step of ``skeleton``, a model on the meta device, holds and computes. The
    skeleton stays as it is.

    Raises:
        ConfigError: what the model computes depends on values in a way that no plan can know.
    """
    with _tracing(skeleton, spec, shape) as (model, ledger, batch):
        return _run(model.train(), batch, shape, make_optimizer, ledger)


def trace_forward(skeleton: Any, spec: LoRASpec, shape: StepShape) -> int:
    """Return the bytes that an evaluation of ``shape`` holds at its peak, above the model itself.

    Raises:
        ConfigError: as ``trace_step``.
    """
    with _tracing(skeleton, spec, shape) as (model, ledger, batch):
        before = sum(ledger.live.values())
        if batch.images is not None:
            ledger.add(batch.images.patches_PD, ACTIVATIONS)
        with torch.no_grad(), ledger, _autocast(shape.precision):
            compute_loss(model.eval(), batch, cross_entropy)
        return ledger.peak - before


@contextlib.contextmanager
def _tracing(
    skeleton: Any, spec: LoRASpec, shape: StepShape
) -> Iterator[tuple[Any, _Ledger, Batch]]:
    """A copy of ``skeleton`` with its adapters that runs without values, the ledger that holds
    it, a batch. Raises ConfigError.
    """
    model = inject(_with_causal_attention(copy.deepcopy(skeleton), shape.attention), spec)
    if shape.checkpointing:
        enable_checkpointing(model)
    for module in model.modules():
        if isinstance(module, ExpertLora) and shape.device != "cpu":
            module.products = "grouped"
    trust_head(model)
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    # float16 takes as much as bfloat16, under whose autocast the step runs here.
    dtype = "bfloat16" if shape.dtype == "float16" else shape.dtype
    _materialize(model, mode, getattr(torch, dtype))
    if not shape.image_tokens and is_tower_needed(model):
        shape = replace(shape, image_tokens=(1,))  # the blank image of `with_blank_image`
    ledger = _Ledger(shape.sp_size, sum(shape.image_tokens))
    for parameter in model.parameters():
        ledger.add(parameter, ADAPTER if parameter.requires_grad else WEIGHTS)
    for buffer in model.buffers():
        ledger.add(buffer, WEIGHTS)
    try:
        with mode, _as_on(shape.device), _attention_kernel(model, shape), sizes_known(model, mode):
            yield model, ledger, _batch(shape, model)
    except Exception as error:
        # whatever a model does where nothing has values; a run need not end for want of a plan
        is_known = isinstance(error, DataDependentOutputException | DynamicOutputShapeException)
        why = "depends on values" if is_known else "does not run without values"
        raise ConfigError(
            f"no plan can be made of this model's memory: what {type(skeleton).__name__} computes"
            f" {why} ({type(error).__name__}: {str(error)[:200]})"
        ) from error


def _with_causal_attention(model: Any, attention: str) -> Any:
    """Let ``model`` attend as in a run. transformers, where nothing has values, makes a mask
    over all pairs that a run never has.
    """
    if "eager" in (attention, model.config._attn_implementation):
        return model
    AttentionInterface.register(_ATTENTION, sdpa_attention_forward)
    AttentionMaskInterface.register(_ATTENTION, _mask_where_needed)
    model.set_attn_implementation(_ATTENTION)
    return model


def _attention_kernel(model: Any, shape: StepShape) -> contextlib.AbstractContextManager[Any]:
    if _has_no_kernel(model, shape):
        return torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH)
    return contextlib.nullcontext()


def _has_no_kernel(model: Any, shape: StepShape) -> bool:
    """On a GPU in float32 no kernel of torch serves fewer heads of keys than of queries; all
    scores are held then.
    """
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", 1)
    has_groups = (getattr(config, "num_key_value_heads", None) or heads) < heads
    is_float32_on_gpu = shape.device == "cuda" and shape.precision == "32-true"
    return is_float32_on_gpu and has_groups and shape.sp_size == 1


def keeps_scores(model: Any, shape: StepShape) -> bool:
    """Whether attention keeps the scores of all pairs of positions until the backward pass."""
    is_eager = "eager" in (shape.attention, model.config._attn_implementation)
    return is_eager or _has_no_kernel(model, shape)


def _mask_where_needed(**kwargs: Any) -> torch.Tensor | None:
    return sdpa_mask(**{**kwargs, "allow_is_causal_skip": True})


def _run(
    model: Any,
    batch: Batch,
    shape: StepShape,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    ledger: _Ledger,
) -> StepTrace:
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = make_optimizer(trained)
    weights, adapter = ledger.live[WEIGHTS], ledger.live[ADAPTER]
    if batch.images is not None:
        ledger.add(batch.images.patches_PD, ACTIVATIONS)
    with _phases(model, ledger, trained), ledger:
        with _autocast(shape.precision):
            output = compute_loss(model, batch, cross_entropy)
        output.loss_sum.backward()
    at_peak, num_flops = dict(ledger.at_peak), ledger.num_flops
    del output
    ledger.restart(OPTIMIZER)
    with ledger:
        optimizer.step()
    state = sum(
        t.untyped_storage().nbytes()
        for t in tree_iter(list(optimizer.state.values()))
        if isinstance(t, torch.Tensor)
    )
    held_before = weights + adapter + ledger.live.get(GRADIENTS, 0)
    return StepTrace(
        weights=weights,
        adapter=adapter,
        gradients=at_peak.get(GRADIENTS, 0),
        optimizer=state,
        activations=at_peak.get(ACTIVATIONS, 0),
        head=at_peak.get(HEAD, 0),
        step=max(0, ledger.peak - held_before - state),
        num_params=sum(parameter.numel() for parameter in trained),
        num_base_params=sum(
            parameter.numel() for parameter in model.parameters() if not parameter.requires_grad
        ),
        largest_layer=_largest_layer(model),
        num_flops=num_flops,
        num_tokens=shape.num_rows * shape.num_positions,
    )


class _Ledger(TorchDispatchMode):
    """Counts operations, and the bytes of all storages that live, by what they were made for;
    remembers them at their peak. (torch's FlopCounterMode keeps alive what a backward computes.)
    """

    def __init__(self, sp_size: int = 1, num_image_positions: int = 0) -> None:
        super().__init__()
        self.sp_size, self.num_image_positions = sp_size, num_image_positions
        self.live: dict[str, int] = {}
        # storage -> what it is counted as
        self._tags: weakref.WeakKeyDictionary[Any, list[str]] = weakref.WeakKeyDictionary()
        self.restart(ACTIVATIONS)

    def restart(self, tag: str) -> None:
        """Forget the peak; what is made from now on is of ``tag``."""
        self.tag = tag
        self.peak = sum(self.live.values())
        self.at_peak = dict(self.live)
        self.num_flops = 0

    def add(self, tensor: torch.Tensor, tag: str) -> None:
        """Count ``tensor``'s storage under ``tag``, whatever it was counted as."""
        storage = tensor.untyped_storage()
        num_bytes, cell = storage.nbytes(), self._tags.get(storage)
        if cell is None:
            cell = self._tags[storage] = [tag]
            weakref.finalize(storage, self._remove, cell, num_bytes)
        else:
            self.live[cell[0]] -= num_bytes
            cell[0] = tag
        self.live[tag] = self.live.get(tag, 0) + num_bytes

    def _remove(self, cell: list[str], num_bytes: int) -> None:
        self.live[cell[0]] -= num_bytes

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = None
        if func is aten._grouped_mm.default:
            out = _grouped(*args, **kwargs)
        elif self.num_image_positions:
            out = pick_of_images(func, args, self.num_image_positions)
        if out is None:
            out = func(*args, **kwargs)
        if (count := _FLOPS.get(func.overloadpacket)) is not None:
            is_attention = "scaled_dot_product" in str(func.overloadpacket)
            sp_size = self.sp_size if is_attention else 1
            self.num_flops += sp_size * count(*args, **kwargs, out_val=out)
        for value in tree_iter(out):
            if isinstance(value, torch.Tensor) and value.untyped_storage() not in self._tags:
                self.add(value, self.tag)
        if (total := sum(self.live.values())) > self.peak:
            self.peak, self.at_peak = total, dict(self.live)
        return out


def _grouped(
    a: torch.Tensor, b: torch.Tensor, offs: torch.Tensor, bias: Any = None, out_dtype: Any = None
) -> torch.Tensor:
    """The shape of a grouped product; torch's own, without values, knows bfloat16 only."""
    size = (a.shape[0], b.shape[-1]) if b.dim() == 3 else (len(offs), a.shape[0], b.shape[1])
    return a.new_empty(size)


def _count_grouped(a: torch.Tensor, b: torch.Tensor, *args: Any, **kwargs: Any) -> int:
    # (S, K) by expert times (E, K, N), or (M, S) times (S, N) by expert
    return 2 * a.shape[0] * a.shape[1] * b.shape[-1]


def _count_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any
) -> int:
    """Scores and their product with the values, every pair counted; torch 2.11's own count
    refuses fewer heads of keys.
    """
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (width + value.shape[3])


def _count_attention_backward(
    grad: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *args: Any,
    **kwargs: Any,
) -> int:
    """The scores again, and the gradients of scores, values, queries and keys."""
    batch, heads, length, width = query.shape
    return 2 * batch * heads * length * key.shape[2] * (3 * width + 2 * value.shape[3])


_FLOPS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten._grouped_mm: _count_grouped,
    aten._scaled_dot_product_flash_attention_for_cpu: _count_attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _count_attention_backward,
}


@contextlib.contextmanager
def _phases(model: Any, ledger: _Ledger, trained: list[torch.nn.Parameter]) -> Iterator[None]:
    """Count as the head's what is made between the last hidden states and their gradient; as
    gradients those of the adapter.
    """

    def enter_head(module: Any, args: tuple[Any, ...]) -> None:
        ledger.tag = HEAD
        if args[0].requires_grad:
            args[0].register_hook(leave_head)

    def leave_head(gradient: torch.Tensor) -> None:
        ledger.tag = ACTIVATIONS

    handles: list[Any] = []
    if (unembedding := model.get_output_embeddings()) is not None:
        handles.append(unembedding.register_forward_pre_hook(enter_head))
    handles += [
        p.register_post_accumulate_grad_hook(lambda p: ledger.add(p.grad, GRADIENTS))
        for p in trained
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _materialize(model: torch.nn.Module, mode: FakeTensorMode, dtype: torch.dtype) -> None:
    """Give every parameter and buffer of ``model`` a place on a CPU that is not there; the
    frozen ones in ``dtype``.
    """
    made: dict[int, Any] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None and id(parameter) not in made:
                is_frozen = not parameter.requires_grad and parameter.is_floating_point()
                own = dtype if is_frozen else parameter.dtype
                with mode:
                    empty = torch.empty(parameter.shape, dtype=own)
                made[id(parameter)] = torch.nn.Parameter(empty, parameter.requires_grad)
            module._parameters[name] = made.get(id(parameter))
        for name, buffer in module._buffers.items():
            if buffer is not None and id(buffer) not in made:
                with mode:
                    made[id(buffer)] = torch.empty(buffer.shape, dtype=buffer.dtype)
            module._buffers[name] = made.get(id(buffer))


@contextlib.contextmanager
def _as_on(device: str) -> Iterator[None]:
    """Cut the vocabulary into the head's blocks as on ``device``."""
    own = BLOCK_BYTES["cpu"]
    BLOCK_BYTES["cpu"] = BLOCK_BYTES[device]
    try:
        yield
    finally:
        BLOCK_BYTES["cpu"] = own


def _batch(shape: StepShape, model: Any) -> Batch:
    """Rows without padding, every position of which is trained: what costs most."""
    size = (shape.num_rows, shape.num_positions)
    spans = tuple((row, 0, shape.num_positions) for row in range(shape.num_rows))
    tokens = torch.zeros(size, dtype=torch.long)
    # a model of images would make its own from the tokens
    positions = torch.arange(shape.num_positions).expand(size)
    images = None
    if shape.image_tokens:
        images = images_without_values(model.config.vision_config, shape.image_tokens)
        positions = positions.expand(4, *size)
    batch = Batch(tokens, tokens.clone(), torch.ones(size), positions, spans, images=images)
    # Which positions have a weight is a question of values: all of them.
    batch.__dict__["trained_positions"] = torch.arange(tokens.numel())
    return batch


def _autocast(precision: str) -> contextlib.AbstractContextManager[Any]:
    if precision in ("bf16-mixed", "16-mixed"):  # either has two bytes
        return torch.autocast("cpu", dtype=torch.bfloat16)
    return contextlib.nullcontext()


def _largest_layer(model: torch.nn.Module) -> int:
    """Bytes of the frozen weights that are whole at once where each layer's are gathered for it."""
    sizes = []
    for module in model.modules():
        tensors = list(module.parameters(recurse=isinstance(module, ExpertLora)))
        sizes.append(sum(t.untyped_storage().nbytes() for t in tensors if not t.requires_grad))
    return max(sizes, default=0)
