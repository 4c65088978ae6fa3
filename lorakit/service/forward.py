"""Calls of ``forward_backward``, checked and made into requests for the worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from lorakit.errors import DataError, fold
from lorakit.loss import LOSSES, Loss
from lorakit.loss.inputs import check_knobs, prepare
from lorakit.loss.preference import CustomLoss
from lorakit.loss.vocabulary import VocabularyLoss
from lorakit.service.custom import pull_back, with_unit_weights
from lorakit.service.forward_request import ForwardRequest
from lorakit.service.model import Model
from lorakit.types import Datum, ForwardBackwardOutput


def forward_request(
    model: Model,
    data: Sequence[Datum],
    loss_fn: str,
    loss_fn_config: Mapping[str, Any] | None,
    needs_gradient: bool,
) -> ForwardRequest:
    """Return the request of a loss by its name.

    Raises:
        DataError: the loss is unknown, or rows or numbers do not fit it.
        CheckpointError: the model could not be made.
    """
    if loss_fn not in LOSSES:
        raise DataError(f"loss_fn {loss_fn!r} is unknown; there are: {', '.join(LOSSES)}")
    loss = LOSSES[loss_fn]
    knobs = check_knobs(loss_fn, loss, loss_fn_config)
    ready = _prepare(model, data, loss_fn, loss, knobs)
    model.made()
    return ForwardRequest(model.id, ready, loss_fn, knobs, needs_gradient)


def custom_request(model: Model, data: Sequence[Datum], loss: CustomLoss) -> ForwardRequest:
    """Return the request of the caller's own loss of log-probabilities. Raises as above."""
    model.made()
    return ForwardRequest(model.id, _bare(model, data), custom=(loss, data))


def vocabulary_request(
    model: Model, data: Sequence[Datum], function: VocabularyLoss
) -> ForwardRequest:
    """Return the request of the caller's own loss of whole distributions. Raises as above."""
    model.made()
    return ForwardRequest(model.id, _bare(model, data), vocabulary=function)


def run_in_two_passes(
    model: Model, data: Sequence[Datum], loss: CustomLoss
) -> ForwardBackwardOutput:
    """Compute log-probabilities, the caller's ``loss``, then the gradient."""
    bare = _bare(model, data)
    found = _run(model, ForwardRequest(model.id, bare, needs_gradient=False))
    logprobs = [output["logprobs"] for output in found.loss_fn_outputs]
    weighted, value, metrics = pull_back(loss, data, logprobs)
    pulled = _run(model, ForwardRequest(model.id, weighted))
    return replace(pulled, metrics={**pulled.metrics, "loss:sum": value, **metrics})


def _run(model: Model, request: ForwardRequest) -> ForwardBackwardOutput:
    (found,) = model.engine.do("run", [request])
    if isinstance(found, BaseException):
        raise found
    return found


def _bare(model: Model, data: Sequence[Datum]) -> list[Datum]:
    """What a caller's own loss needs of ``data``: it reads the rest itself. Raises DataError."""
    if missing := [
        (f"data[{i}]", ".loss_fn_inputs['target_tokens'] is missing")
        for i, datum in enumerate(data)
        if "target_tokens" not in datum.loss_fn_inputs
    ]:
        raise DataError("\n".join(fold(missing, separator="")))
    bare = [with_unit_weights(datum) for datum in data]
    return _prepare(model, bare, "a custom loss", LOSSES["cross_entropy"], {})


def _prepare(
    model: Model, data: Sequence[Datum], name: str, loss: Loss, knobs: Mapping[str, float]
) -> list[Datum]:
    base = model.engine.base
    ready = prepare(
        data,
        name,
        loss,
        vocab_size=base.vocab_size,
        max_tokens=base.max_tokens,
        knobs=knobs,
    )
    base.check_images(ready)
    return ready
