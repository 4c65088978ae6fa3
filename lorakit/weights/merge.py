"""Merge an adapter into its base, all or nothing: plan, apply, check before and after rounding."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from lorakit.errors import AdapterError, CheckpointError
from lorakit.lora.layouts import split_a, split_b
from lorakit.model.load import load_model, quiet_transformers, resolve_model_path
from lorakit.runs.files import whole_folder, write_json
from lorakit.weights.adapter import AdapterFiles
from lorakit.weights.hub_layout import copy_processor, save_as_hub

TOLERANCE = 1e-4  # of the largest logit, between merged and adapter form in float32


@dataclass
class MergedTensor:
    """One matrix or stack that the adapter changed."""

    name: str
    shape: tuple[int, ...]
    relative_change: float  # L2 norm of the change over that of the matrix
    # of s B A against PEFT's own computation of it, relative to the largest entry
    largest_error: float


@dataclass
class MergeReport:
    """What a merge did. Logit differences are the largest over all positions of the probe; None
    where it was not run.
    """

    tensors: list[MergedTensor] = field(default_factory=list)
    dtype: str = ""
    untied: bool = False
    largest_logit: float | None = None
    float32_difference: float | None = None  # merged against adapter form, both float32
    rounded_difference: float | None = None  # merged and rounded against adapter form
    # the same at the median position; one flipped expert makes a large maximum
    rounded_median_difference: float | None = None
    base_rounding_difference: float | None = None  # rounding the base alone
    # the files, read again by transformers, against what was written
    reloaded_difference: float | None = None
    check: str = ""


@torch.no_grad()
def merge_into(model: Any, report: MergeReport) -> Any:
    """Add the adapter of the PEFT ``model`` to its base in place and return the base, unwrapped.

    Each tensor is computed in float32 and rounded once, to the base's dtype. Nothing is changed
    before every target is known.
    """
    _refuse_what_no_matrix_holds(model)
    planned = list(_plan(model))
    if not planned:
        raise AdapterError("the adapter changes no tensor of this base")
    head = model.get_base_model().get_output_embeddings()
    for name, module, parameter_name, delta, reference in planned:
        weight = getattr(module, parameter_name)
        if name.endswith("lm_head.weight") or module is head:
            weight = _untie(model, module, report)
        change = delta()
        if change.shape != weight.shape:
            raise AdapterError(
                f"{name}: the adapter's product has shape {tuple(change.shape)}, the base"
                f" {tuple(weight.shape)}"
            )
        merged = weight.float() + change
        report.tensors.append(_describe(name, weight, change, reference() if reference else None))
        weight.copy_(merged.to(weight.dtype))
    base = model.unload()
    if report.untied:
        base.config.tie_word_embeddings = False
        base.config.get_text_config().tie_word_embeddings = False
    return base


def merge_adapter(
    base_path: str,
    load: Any,
    adapter_folder: Path,
    out: Path,
    *,
    dtype: torch.dtype,
    tokenizer: Any,
    can_compare: bool,
    stored: torch.dtype | None = None,
    revision: str | None = None,
    pixel_bounds: tuple[int | None, int | None] = (None, None),
    trust_remote_code: bool = False,
    base_name: str | None = None,
    finish: Callable[[Path], None] | None = None,
) -> MergeReport:
    """Write base and adapter as one model to ``out``, which plain transformers loads.

    Args:
        load: returns the base in a dtype given by name.
        dtype: of the merged files.
        stored: dtype of the base's files, to round only once from; None is ``dtype``.
        revision: of the base, for what is copied beside the weights.
        pixel_bounds: see ``copy_processor``.
        trust_remote_code: run code that comes with the model, when its files are read again.
        base_name: what the report calls the base; None is ``base_path``.
        finish: writes whatever else belongs to the folder.
        can_compare: whether two forms in float32 fit into memory; else each tensor is checked by
            itself.

    Raises:
        AdapterError: the float32 logits of merged and adapter form differ by more than 1e-4 of the
            largest logit.
        CheckpointError: ``out`` exists.
    """
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise CheckpointError(f"{out} exists and is not empty; choose another --out")
    report = MergeReport(dtype=str(dtype).removeprefix("torch."))
    loaded = str(stored or dtype).removeprefix("torch.")
    model = attach(load("float32" if can_compare else loaded), adapter_folder)
    probe, rounded_logits = make_probe(model), None
    if can_compare:
        merged, rounded_logits = _merge_and_compare(model, probe, load, dtype, report)
    else:
        merged = _cast(merge_into(model, report), dtype)
        report.check = (
            "both forms do not fit into memory: each tensor was checked against W + s B A by PEFT's"
            " own code instead"
        )
    bad = [tensor.name for tensor in report.tensors if not tensor.largest_error < 1e-4]
    if bad:
        raise AdapterError(
            f"these tensors are not W + s B A: {', '.join(bad[:5])}; nothing was written"
        )
    out.parent.mkdir(parents=True, exist_ok=True)
    with whole_folder(out) as aside, quiet_transformers():
        save_as_hub(merged, aside)
        tokenizer.save_pretrained(aside)
        if getattr(merged.config, "vision_config", None) is not None:
            copy_processor(
                resolve_model_path(base_path, revision), aside, pixel_bounds=pixel_bounds
            )
        if rounded_logits is not None:
            del merged
            reloaded = load_model(str(aside), trust_remote_code=trust_remote_code)
            _check_reloaded(reloaded, probe, rounded_logits, report)
        write_json(aside / "merge_report.json", {"base": base_name or base_path, **asdict(report)})
        if finish:
            finish(aside)
    return report


def _merge_and_compare(
    model: Any, probe: torch.Tensor, load: Any, dtype: torch.dtype, report: MergeReport
) -> tuple[Any, torch.Tensor]:
    """Merge in float32, compare logits of both forms, and round; return the model, and its logits
    as it will be written. Raises AdapterError where the forms differ.
    """
    adapter_logits = compute_logits(model, probe)
    with model.disable_adapter():
        base_logits = compute_logits(model, probe)
    merged = merge_into(model, report)
    report.largest_logit = float(adapter_logits.abs().max())
    report.float32_difference = _difference(compute_logits(merged, probe), adapter_logits)
    if not report.float32_difference <= TOLERANCE * report.largest_logit:
        raise AdapterError(
            f"merged and adapter form differ by {report.float32_difference:.2e} in float32,"
            f" more than {TOLERANCE:g} of the largest logit ({report.largest_logit:.2f});"
            " nothing was written"
        )
    round_parameters(merged, dtype)
    rounded_logits = compute_logits(merged, probe)
    per_position = (rounded_logits - adapter_logits).abs().amax(dim=-1)
    report.rounded_difference = float(per_position.max())
    report.rounded_median_difference = float(per_position.median())
    report.base_rounding_difference = _difference(
        compute_logits(round_parameters(load("float32"), dtype), probe), base_logits
    )
    report.check = (
        "logits of merged and adapter form compared in float32, and those of the files, read"
        " again, with what was written"
    )
    return _cast(merged, dtype), rounded_logits  # an exact cast: it was rounded already


def _check_reloaded(
    reloaded: Any, probe: torch.Tensor, expected: torch.Tensor, report: MergeReport
) -> None:
    """Raise AdapterError where transformers makes of the files other logits than were written."""
    report.reloaded_difference = _difference(compute_logits(reloaded, probe), expected)
    if not report.reloaded_difference <= TOLERANCE * float(expected.abs().max()):
        raise AdapterError(
            "the merged files, read again, give logits that differ by"
            f" {report.reloaded_difference:.2e}; nothing was written"
        )


def attach(base: Any, adapter_folder: Path) -> Any:
    """Return ``base`` with the adapter of ``adapter_folder``, in evaluation mode. Raises
    AdapterError where it does not fit.
    """
    import peft

    from lorakit.lora.inject import as_expert_config
    from lorakit.lora.state import load_adapter_state
    from lorakit.lora.tokens import use_token_rows

    files = AdapterFiles.open(adapter_folder)
    if problem := files.find_init_problem():
        raise AdapterError(f"{adapter_folder}: {problem}")
    config: Any = peft.PeftConfig.from_pretrained(str(adapter_folder))
    config = as_expert_config(config, base, files.expert_matrices())
    # the tensors follow; variants that decompose the base would do so for nothing
    config.init_lora_weights = True
    try:
        model = peft.get_peft_model(base, config, autocast_adapter_dtype=False)
    except ValueError as error:
        raise AdapterError(f"{adapter_folder} does not fit this base: {error}") from error
    for name, parameter in model.named_parameters():
        # by name: an adapter for inference is frozen from the start
        if "lora_" in name or "trainable_tokens" in name:
            parameter.data = parameter.data.float()
    use_token_rows(model)
    load_adapter_state(model, files.tensors(), source=str(adapter_folder))
    base_name = files.config.get("base_model_name_or_path")
    model.peft_config["default"].base_model_name_or_path = base_name
    return model.requires_grad_(False).eval()


def make_probe(model: Any, num_rows: int = 2, length: int = 48) -> torch.Tensor:
    """Token ids to compare logits on, (2, 48), always the same."""
    vocab_size = model.config.get_text_config().vocab_size
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, vocab_size, (num_rows, length), generator=generator)


def _cast(model: Any, dtype: torch.dtype) -> Any:
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    return model


def can_hold_twice(num_params: int, available_bytes: int) -> bool:
    """Whether two float32 copies of the model fit into ``available_bytes``."""
    return num_params * 4 * 2 < available_bytes


def _refuse_what_no_matrix_holds(model: Any) -> None:
    config = model.peft_config[model.active_adapter]
    extras = [name for name in ("lora_bias", "modules_to_save") if getattr(config, name, None)]
    if getattr(config, "bias", "none") != "none":
        extras.append("bias")
    if extras:
        raise AdapterError(
            f"the adapter has {', '.join(extras)}, which this merge would drop; merge it with"
            " peft's own code"
        )


def round_parameters(model: Any, dtype: torch.dtype) -> Any:
    """Round each parameter of a float32 model to what ``dtype`` can hold; it stays float32, and
    so do rotary tables, which ``model.to`` would round.
    """
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype).float()
    return model


def _plan(model: Any) -> Iterator[tuple[str, nn.Module, str, Any, Any]]:
    """Yield (name, module that owns the weight, its name there, what makes s B A in float32,
    what makes it by PEFT's own code).
    """
    from peft.tuners.lora.layer import LoraLayer, ParamWrapper

    from lorakit.lora.experts import ExpertLora
    from lorakit.lora.tokens import token_layers

    base = model.get_base_model()
    adapter = model.active_adapter
    for name, rows in token_layers(base):
        delta = functools.partial(_row_delta, rows, adapter)
        yield f"{name}.weight", rows.base_layer, "weight", delta, None
    layers: list[tuple[str, Any]] = [
        (name, layer) for name, layer in base.named_modules() if isinstance(layer, LoraLayer)
    ]
    reference: Any
    for name, layer in layers:
        if adapter not in layer.lora_A:
            continue
        clean, module = name.replace(".base_layer", ""), layer.get_base_layer()
        if isinstance(layer, ExpertLora):
            for parameter in layer.adapted_parameters(adapter):
                delta = functools.partial(layer.delta_weight, adapter, parameter)
                reference = functools.partial(_peft_delta, layer, adapter, parameter)
                yield f"{clean}.{parameter}", module, parameter, delta, reference
            continue
        parameter = "weight"
        reference = functools.partial(layer.get_delta_weight, adapter)
        if getattr(layer, "use_dora", {}).get(adapter):
            delta, reference = functools.partial(_dora_delta, layer, clean), None
        elif isinstance(layer, ParamWrapper):
            parameter = layer.parameter_name
            delta = functools.partial(_param_delta, layer, adapter, module)
        else:
            delta = functools.partial(_linear_delta, layer, adapter)
        yield f"{clean}.{parameter}", module, parameter, delta, reference


def _peft_delta(layer: Any, adapter: str, parameter: str) -> torch.Tensor:
    """s B A of a stack from the flat form that PEFT reads, by PEFT's own formula
    (`ParamWrapper.get_delta_weight`).
    """
    a, b, scale = layer.peft_factors(adapter, parameter)
    num_experts = layer.stack.num_experts
    b_ORE = b.reshape(b.shape[0], -1, num_experts)
    a_ERI = a.reshape(num_experts, -1, a.shape[1])
    return layer.stack.as_EOI(torch.einsum("ore,eri->eoi", b_ORE, a_ERI) * scale)


def _row_delta(layer: Any, adapter: str) -> torch.Tensor:
    """Trained rows less those in their place."""
    weight, ids = layer.base_layer.weight, torch.tensor(layer.token_indices[adapter])
    change = torch.zeros_like(weight, dtype=torch.float32)
    change[ids] = layer.trainable_tokens_delta[adapter].float() - weight[ids].float()
    return change


def _linear_delta(layer: Any, adapter: str) -> torch.Tensor:
    product = layer.scaling[adapter] * (
        layer.lora_B[adapter].weight.float() @ layer.lora_A[adapter].weight.float()
    )
    return product.T if layer.fan_in_fan_out else product


def _dora_delta(layer: Any, name: str) -> torch.Tensor:
    """DoRA rescales rows of W + s B A: the change is PEFT's merge of a copy less the weight."""
    weight = layer.get_base_layer().weight
    if weight.dtype != torch.float32:
        raise AdapterError(
            f"{name} is a DoRA layer, which is merged in float32 only; this base does not fit in it"
        )
    before = weight.clone()
    layer.merge()
    merged = weight.clone()
    weight.copy_(before)
    layer.merged_adapters.clear()
    return merged - before


def _param_delta(layer: Any, adapter: str, module: nn.Module) -> torch.Tensor:
    weight = getattr(module, layer.parameter_name)
    a, b = layer.lora_A[adapter].weight.float(), layer.lora_B[adapter].weight.float()
    if weight.ndim == 2:
        return layer.scaling[adapter] * (b @ a)
    num_experts = weight.shape[0]
    product = layer.scaling[adapter] * torch.bmm(split_b(b, num_experts), split_a(a, num_experts))
    # By what the family says, never by shape: a square stack would be left the wrong way round.
    return product.transpose(1, 2) if getattr(module, "is_transposed", False) else product


def _untie(model: Any, head: Any, report: MergeReport) -> torch.Tensor:
    embedding = model.get_base_model().get_input_embeddings()
    if head.weight is embedding.weight:
        head.weight = nn.Parameter(head.weight.clone(), requires_grad=False)
        report.untied = True
    return head.weight


def _describe(
    name: str, weight: torch.Tensor, change: torch.Tensor, reference: torch.Tensor | None
) -> MergedTensor:
    error = 0.0
    if reference is not None:
        scale = reference.abs().max().clamp(min=1e-30)
        expected = reference.float().reshape(change.shape)
        # PEFT rounds its product to the base's dtype
        rounding = torch.finfo(reference.dtype).eps * expected.abs()
        error = float(((change - expected).abs() - rounding).max().clamp(min=0) / scale)
    norm = float(weight.float().norm())
    return MergedTensor(name, tuple(weight.shape), float(change.norm()) / max(norm, 1e-30), error)


@torch.no_grad()
def compute_logits(model: Any, probe: torch.Tensor) -> torch.Tensor:
    """The logits of ``probe``, (B, L, V) float32."""
    return model(input_ids=probe.to(model.device), use_cache=False).logits.float()


def _difference(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())
