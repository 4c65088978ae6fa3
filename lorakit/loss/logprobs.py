"""Log-probabilities of a batch's targets under a model: the model up to its unembedding, then
the head in chunks.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from lorakit.errors import ConfigError
from lorakit.loss.head import Head, HeadAdapter, head_logprobs
from lorakit.loss.vocabulary import VocabularyLoss, vocabulary_loss
from lorakit.model.attention import packed_documents
from lorakit.model.partition import full_shape, is_partitioned, own_weight
from lorakit.model.vision import with_blank_image
from lorakit.types import Batch, LossOutput

log = logging.getLogger("lorakit")
# unembedding -> whether Head describes it
_CHECKED: weakref.WeakKeyDictionary[nn.Module, bool] = weakref.WeakKeyDictionary()


def target_logprobs(
    model: Any,
    batch: Batch,
    *,
    all_positions: bool = False,
    is_weighted_sum: bool = False,
    head_adapters: Sequence[HeadAdapter] = (),
) -> torch.Tensor:
    """Return log p(target | what comes before it) for each target, shaped as the targets, float32,
    with graph.

    Where the weight is 0 it is 0 and costs nothing after the last layer, unless ``all_positions``.
    No attention mask and no cache are given, and position ids only for packed rows: this is what
    isolates packed documents from one another in transformers.

    Args:
        is_weighted_sum: the loss will sum them by the batch's weights, which spares a trained
            unembedding its logits a second time.
        head_adapters: on the unembedding, beside what the model itself has there; their gates have
            a row for each position.
    """
    shape, length = batch.targets.shape, batch.input_ids.shape[1]
    batch = with_blank_image(model, batch)
    hidden_BLH, head = hidden_states(model, lambda: _run(model, batch))
    logits_BLV = _run(model, batch).logits if hidden_BLH is None else None
    num_positions = batch.input_ids.numel()
    if all_positions:
        places_N = torch.arange(num_positions, device=batch.weights.device)
    else:
        places_N = batch.trained_positions
    targets_NK = batch.targets.reshape(num_positions, -1)[places_N]
    if hidden_BLH is not None and head is not None:
        weights_NK = batch.weights.reshape(num_positions, -1)[places_N] if is_weighted_sum else None
        hidden_NH = hidden_BLH.flatten(0, 1).index_select(0, places_N)
        gated = (
            one if one.gate_NR is None else one._replace(gate_NR=one.gate_NR[places_N])
            for one in head_adapters
        )
        head = replace(head, adapters=(*head.adapters, *gated))
        logprobs_NK = head_logprobs(hidden_NH, head, targets_NK, weights_NK=weights_NK)
    else:
        assert logits_BLV is not None
        if head_adapters:
            raise ConfigError(
                f"LoRA on the unembedding of {type(model).__name__} is not possible; set"
                " train_unembed=False"
            )
        logits_NV = logits_BLV.flatten(0, 1).index_select(0, places_N).float()
        logprobs_NK = logits_NV.log_softmax(dim=-1).gather(1, targets_NK)
    logprobs = logprobs_NK.new_zeros((num_positions, targets_NK.shape[1]))
    logprobs = logprobs.index_copy(0, places_N, logprobs_NK).view(batch.targets.shape)
    return logprobs[:, :length].reshape(shape)


def whole_distributions(
    model: Any, batch: Batch, function: VocabularyLoss, head_adapters: Sequence[HeadAdapter] = ()
) -> LossOutput:
    """Run ``model`` and return the loss of ``function``, which is given the log-probabilities of
    the whole vocabulary in chunks.

    Raises:
        ConfigError: the model's unembedding is none that ``Head`` describes.
    """
    hidden_BLH, head = hidden_states(model, lambda: _run(model, batch))
    if hidden_BLH is None or head is None:
        raise ConfigError(
            f"{type(model).__name__} has no unembedding whose distributions could be given out in"
            " chunks"
        )
    head = replace(head, adapters=(*head.adapters, *head_adapters))
    return vocabulary_loss(hidden_BLH, head, batch.spans, batch.targets, function)


def hidden_states(model: Any, run: Callable[[], Any]) -> tuple[torch.Tensor | None, Head | None]:
    """Return what the unembedding is given when ``run`` runs the model, (B, L, H), and the
    unembedding.

    None for both where no ``Head`` describes it.
    """
    unembedding = model.get_output_embeddings()
    if unembedding is None or _CHECKED.get(unembedding) is False:
        return None, None
    head = describe_head(model, unembedding)
    if head is None:
        _warn_of_all_logits(type(model).__name__)
        return None, None
    given: list[torch.Tensor] = []
    is_new = unembedding not in _CHECKED
    dropouts = [module for module in unembedding.modules() if _drops(module)] if is_new else []
    # positions that the model's own unembedding gets: to compare, once
    num_seen = 2 if is_new else 0

    def intercept(module: nn.Module, args: tuple[Any, ...]) -> tuple[Any, ...]:
        given.append(args[0])
        # Contiguous: of a slice torch makes a product in batches, for which it may copy the whole
        # unembedding for every row.
        return (args[0][:, :num_seen].contiguous(), *args[1:])

    handle = unembedding.register_forward_pre_hook(intercept)
    try:
        for dropout in dropouts:
            dropout.eval()  # in what is compared
        logits = run().logits
    finally:
        handle.remove()
        for dropout in dropouts:
            dropout.train()
    if is_new and bool(logits.isfinite().all()):  # else it says nothing of the head
        without_dropout = replace(
            head, adapters=tuple(adapter._replace(dropout=None) for adapter in head.adapters)
        )
        _CHECKED[unembedding] = _agrees(without_dropout, given[0][:, :num_seen], logits)
        if not _CHECKED[unembedding]:
            _warn_of_all_logits(type(model).__name__)
            return None, None
    return given[0], head


def trust_head(model: Any) -> None:
    """Trust ``describe_head`` for ``model``, which has no values to compare."""
    if (unembedding := model.get_output_embeddings()) is not None:
        _CHECKED[unembedding] = True


@functools.cache  # once
def _warn_of_all_logits(model_name: str) -> None:
    log.warning(
        "the unembedding of %s is not one that lorakit knows (DoRA on it, or another computation,"
        " or an adapter on it under ZeRO-3): all logits are held",
        model_name,
    )


def describe_head(model: Any, unembedding: Any) -> Head | None:
    """Return what the unembedding computes, or None where it has what ``Head`` has not (DoRA, a
    bias of LoRA, trained weights).
    """
    adapters: tuple[HeadAdapter, ...] = ()
    base = unembedding
    if hasattr(unembedding, "lora_A"):
        base = unembedding.get_base_layer()
        is_off = unembedding.disable_adapters or unembedding.merged
        active = [] if is_off else unembedding.active_adapters
        names = [name for name in active if name in unembedding.lora_A]
        if any(
            name in unembedding.lora_variant or unembedding.lora_B[name].bias is not None
            for name in names
        ):
            return None
        adapters = tuple(
            HeadAdapter(
                unembedding.lora_A[name].weight,
                unembedding.lora_B[name].weight,
                unembedding.scaling[name],
                unembedding.lora_dropout[name] if _drops(unembedding.lora_dropout[name]) else None,
            )
            for name in names
        )
    elif hasattr(unembedding, "token_adapter"):
        base = unembedding.token_adapter.base_layer
        adapters = _as_adapters(unembedding.token_adapter)
    own = dict(base.named_parameters(recurse=False))  # not by attribute, see own_weight
    if type(base) is not nn.Linear or any(p.requires_grad for p in own.values()):
        return None
    # its factors' gradients would come when they are in parts again
    if adapters and is_partitioned(own["weight"]):
        return None
    config = model.config.get_text_config()
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    multiplier = scale / float(getattr(config, "logits_scaling", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return Head(own["weight"], own.get("bias"), adapters, multiplier, softcap)


def _as_adapters(layer: Any) -> tuple[HeadAdapter, ...]:
    """Rows that are trained instead of the unembedding's own, as adapters: A is what they
    differ by, B puts it where they are.
    """
    if layer.disable_adapters or layer.merged:
        return ()
    num_tokens, found = full_shape(own_weight(layer.base_layer))[0], []
    for name in (name for name in layer.active_adapters if name in layer.token_indices):
        rows_RH, own_RH = layer.trainable_tokens_delta[name], layer.trainable_tokens_original[name]
        ids, columns = torch.tensor(layer.token_indices[name]), torch.arange(len(own_RH))
        places = (ids.to(own_RH.device), columns.to(own_RH.device))
        b_VR = own_RH.new_zeros((num_tokens, len(own_RH)))
        b_VR = b_VR.index_put(places, own_RH.new_ones(()))
        found.append(HeadAdapter(rows_RH - own_RH.to(rows_RH.dtype), b_VR, 1.0))
    return tuple(found)


def _run(model: Any, batch: Batch) -> Any:
    if batch.position_ids is None:
        return model(input_ids=batch.input_ids, use_cache=False)
    seen = {}
    if batch.images is not None:
        seen = {"pixel_values": batch.images.patches_PD, "image_grid_thw": batch.images.grids_N3}
    with packed_documents(batch.spans, is_shared=batch.position_range is not None):
        return model(
            input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **seen
        )


def _drops(dropout: nn.Module) -> bool:
    return isinstance(dropout, nn.Dropout) and dropout.p > 0 and dropout.training


@torch.no_grad()
def _agrees(head: Head, hidden_BLH: torch.Tensor, logits_BLV: torch.Tensor) -> bool:
    """Whether ``head`` gives the log-probabilities that the model itself gives."""
    expected = logits_BLV.float().log_softmax(dim=-1).flatten(0, 1)
    targets = expected.topk(8).indices
    ours = head_logprobs(hidden_BLH.flatten(0, 1), head, targets)
    is_exact = head.weight_VH.dtype == torch.float32 and not torch.is_autocast_enabled(
        hidden_BLH.device.type
    )
    return bool((ours - expected.gather(1, targets)).abs().max() < (1e-3 if is_exact else 0.1))
