"""What a loss takes beside targets and log-probabilities, and whether Datums have it."""

from __future__ import annotations

import functools
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np

from lorakit.errors import DataError, fold, report
from lorakit.model_input import TensorData
from lorakit.types import Datum

Function = TypeVar("Function", bound=Callable[..., Any])


@dataclass(frozen=True)
class Inputs:
    """The loss_fn_inputs that a loss takes beside ``target_tokens``."""

    required: tuple[str, ...] = ()
    optional: tuple[str, ...] = ()
    # whether the loss is a multiple of the sum of weights times log-probabilities
    is_weighted_sum: bool = False
    is_of_pairs: bool = False  # whether each two spans of a batch are a better and a worse answer
    # whether it takes extras["reference_logprobs"], those of the base without the adapter
    needs_reference: bool = False


def inputs_of(loss: Callable[..., Any]) -> Inputs:
    """What ``takes`` said of ``loss``; nothing of a function that it never saw."""
    while isinstance(loss, functools.partial):
        loss = loss.func
    found = getattr(loss, "__dict__", {}).get("takes", Inputs())
    assert isinstance(found, Inputs)
    return found


def takes(
    *inputs: str,
    optional: Sequence[str] = (),
    linear: bool = False,
    pairs: bool = False,
    reference: bool = False,
) -> Callable[[Function], Function]:
    """Say which loss_fn_inputs a loss takes beside ``target_tokens``, and what else is true of
    it; see ``Inputs``.
    """

    def mark(loss: Function) -> Function:
        loss.__dict__["takes"] = Inputs(inputs, tuple(optional), linear, pairs, reference)
        return loss

    return mark


def knobs_of(loss: Callable[..., Any]) -> dict[str, float]:
    """The numbers that ``loss`` can be given by name, with their defaults."""
    parameters = inspect.signature(loss).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY}


def check_knobs(
    name: str, loss: Callable[..., Any], given: Mapping[str, Any] | None
) -> dict[str, float]:
    """Return the numbers for ``loss``, with its defaults. Raises DataError for others."""
    knobs, given = knobs_of(loss), given or {}
    problems = [f"{key}: unknown" for key in given if key not in knobs]
    used = dict(knobs)
    for key in (key for key in given if key in knobs):
        if _is_number(given[key]):
            used[key] = float(given[key])
        else:
            problems.append(f"{key}={given[key]!r} is not a finite number")
    if used.get("clip_low_threshold", 0.0) > used.get("clip_high_threshold", math.inf):
        problems.append("clip_low_threshold is above clip_high_threshold")
    if problems:
        there = ", ".join(f"{key} ({value:g})" for key, value in knobs.items()) or "none"
        raise DataError(report("loss_fn_config:", problems, remedy=f"{name} takes: {there}."))
    return used


def _is_number(value: Any) -> bool:
    try:
        return isinstance(value, (int, float, np.number)) and math.isfinite(value)
    except OverflowError:
        return False


def prepare(
    data: Sequence[Datum],
    name: str,
    loss: Callable[..., Any],
    *,
    vocab_size: int,
    max_tokens: int | None = None,
    knobs: Mapping[str, float] | None = None,
) -> list[Datum]:
    """Return ``data`` as ``collate`` needs it: every Datum with weights, and with each optional
    input that any of them has.

    Where a loss takes no weights, each position of a Datum has weight 1, so that padding can be
    told from it.

    Raises:
        DataError: with every problem, by number of the Datum and name of the field.
    """
    needs = inputs_of(loss)
    if not data:
        raise DataError("data is empty; give at least one Datum")
    problems = [
        (f"data[{i}]", text)
        for i, datum in enumerate(data)
        for text in _problems(datum, loss, vocab_size, max_tokens)
    ]
    if problems:
        taken = ", ".join(
            ("target_tokens", *needs.required, *(f"{name} (optional)" for name in needs.optional))
        )
        raise DataError(
            report(
                f"{name} cannot use this data:",
                fold(problems, separator=""),
                remedy=f"{name} takes: {taken}.",
            )
        )
    fillings = {} if "weights" in needs.required else {"weights": 1.0}
    for extra in needs.optional:
        if any(extra in datum.loss_fn_inputs for datum in data):
            fillings[extra] = {**knobs_of(loss), **(knobs or {})}[extra]
    return [_filled(datum, fillings) for datum in data]


def _filled(datum: Datum, fillings: Mapping[str, float]) -> Datum:
    missing = {name: value for name, value in fillings.items() if name not in datum.loss_fn_inputs}
    if not missing:
        return datum
    arrays = {name: np.full(len(datum), value, np.float32) for name, value in missing.items()}
    return Datum(datum.model_input, {**datum.loss_fn_inputs, **arrays})


def _problems(
    datum: Datum, loss: Callable[..., Any], vocab_size: int, max_tokens: int | None
) -> list[str]:
    """What is wrong with one Datum, each beginning with the field."""
    inputs = inputs_of(loss)
    given, required = datum.loss_fn_inputs, ("target_tokens", *inputs.required)
    known = {*required, *inputs.optional}
    problems = [f".loss_fn_inputs[{name!r}] is missing" for name in required if name not in given]
    problems += [f".loss_fn_inputs[{name!r}] is unknown" for name in given if name not in known]
    if not len(datum):
        return [*problems, ".model_input is empty"]
    if max_tokens is not None and len(datum) > max_tokens:
        problems.append(
            f".model_input has {len(datum):,} positions, and the model takes {max_tokens:,}"
        )
    if tokens := datum.model_input.text_tokens():  # as they are: one may be beyond 64 bit
        problems += _outside(".model_input", np.asarray(tokens), vocab_size)
    if "target_tokens" in given:
        targets, field = given["target_tokens"], ".loss_fn_inputs['target_tokens']"
        problems += _outside(field, targets, vocab_size)
        if targets.ndim > 1 and not inputs.is_weighted_sum:
            problems.append(f"{field} has shape {targets.shape}; one per position, please")
        elif targets.ndim > 1 and not targets.shape[1]:
            problems.append(f"{field} has shape {targets.shape}: no target at all")
        elif "weights" in given and given["weights"].shape != targets.shape:
            shapes = f"{given['weights'].shape}, target_tokens {targets.shape}"
            problems.append(f".loss_fn_inputs['weights'] has shape {shapes}")
    mask = given.get("sequence_ratio_mask")
    if mask is not None and not mask.any() and np.any(given.get("advantages", 0)):
        problems.append(
            ".loss_fn_inputs['sequence_ratio_mask'] is 0 everywhere: there is no ratio of this"
            " sequence"
        )
    for name, array in given.items():
        if name != "target_tokens" and not np.isfinite(array).all():
            where = np.argwhere(~np.isfinite(array))[0].tolist()
            problems.append(f".loss_fn_inputs[{name!r}]{where} is {array[tuple(where)]}")
    return problems


def _outside(field: str, tokens: np.ndarray | TensorData, vocab_size: int) -> list[str]:
    wrong = np.argwhere((tokens < 0) | (tokens >= vocab_size))
    if not len(wrong):
        return []
    where = wrong[0].tolist()
    return [
        f"{field}{where} is token {int(tokens[tuple(where)])}, and the vocabulary has"
        f" {vocab_size:,}"
    ]
