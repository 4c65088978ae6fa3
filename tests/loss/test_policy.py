"""Each loss equals its formula, computed here in float64 by hand, in value and in gradient to
the log-probabilities.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from tiny_models import VOCAB, gradients, make_model, randomise, relative_l2

from lorakit.data.batch.collate import collate
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss import LOSSES
from lorakit.loss.inputs import check_knobs, prepare
from lorakit.training.step import compute_loss
from lorakit.types import Batch, Datum, ModelInput

Arrays = list[np.ndarray]
Inputs = Mapping[str, np.ndarray]
Knobs = Mapping[str, float]
FILLER = -3.3  # the log-probability of padding
# Of Tinker's documentation; gspo's are those of its paper (arXiv 2507.18071, section 5.1), which
# writes 1 - 3e-4 and 1 + 4e-4.
DEFAULTS: dict[str, dict[str, float]] = {
    "importance_sampling": {},
    "ppo": {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2},
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": 0.05},
    "gspo": {"clip_low_threshold": 0.9997, "clip_high_threshold": 1.0004},
}


# ---- the formulas, of one Datum: lp the learner's log-probabilities, all float64


def clipped(ratio: np.ndarray, inputs: Inputs, knobs: Knobs) -> np.ndarray:
    low, high = (
        inputs.get(name, knobs[name]) for name in ("clip_low_threshold", "clip_high_threshold")
    )
    return np.where(ratio < low, low, np.where(ratio > high, high, ratio))


def is_cut(ratio: np.ndarray, inputs: Inputs, knobs: Knobs) -> np.ndarray:
    """Where min(r A, clamp(r) A) does not change with r: a good token that is likely enough, a
    bad one unlikely enough.
    """
    low, high = (
        inputs.get(name, knobs[name]) for name in ("clip_low_threshold", "clip_high_threshold")
    )
    return ((inputs["advantages"] > 0) & (ratio > high)) | (
        (inputs["advantages"] < 0) & (ratio < low)
    )


def sequence_ratio(lp: np.ndarray, inputs: Inputs) -> float:
    here = inputs["sequence_ratio_mask"] != 0
    return float(np.exp((lp - inputs["logprobs"])[here].mean())) if here.any() else 1.0


def importance_sampling_value(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> float:
    return -float(np.sum(np.exp(lp - inputs["logprobs"]) * inputs["advantages"]))


def ppo_value(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> float:
    ratio, advantages = np.exp(lp - inputs["logprobs"]), inputs["advantages"]
    return -float(
        np.sum(np.minimum(ratio * advantages, clipped(ratio, inputs, knobs) * advantages))
    )


def cispo_value(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> float:
    return -float(
        np.sum(clipped(np.exp(lp - inputs["logprobs"]), inputs, knobs) * lp * inputs["advantages"])
    )


def cispo_gradient(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> np.ndarray:
    """The clamped ratio is a constant."""
    return -clipped(np.exp(lp - inputs["logprobs"]), inputs, knobs) * inputs["advantages"]


def dro_value(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> float:
    return -float(
        np.sum(lp * inputs["advantages"] - 0.5 * knobs["beta"] * (lp - inputs["logprobs"]) ** 2)
    )


def gspo_value(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> float:
    ratio, advantages = np.full(len(lp), sequence_ratio(lp, inputs)), inputs["advantages"]
    return -float(
        np.sum(np.minimum(ratio * advantages, clipped(ratio, inputs, knobs) * advantages))
    )


def gspo_gradient(lp: np.ndarray, inputs: Inputs, knobs: Knobs) -> np.ndarray:
    """Token t has the ratio exp(constant + lp_t - constant), whose derivative by lp_t is the
    ratio, and by others' lp is 0.
    """
    ratio = np.full(len(lp), sequence_ratio(lp, inputs))
    return np.where(is_cut(ratio, inputs, knobs), 0.0, -ratio * inputs["advantages"])


def differences(
    value: Callable[[np.ndarray], float], lp: np.ndarray, step: float = 1e-6
) -> np.ndarray:
    """The gradient by central differences."""
    steps = np.eye(len(lp)) * step
    return np.array([(value(lp + one) - value(lp - one)) / (2 * step) for one in steps])


VALUES: dict[str, Callable[..., float]] = {
    "importance_sampling": importance_sampling_value,
    "ppo": ppo_value,
    "cispo": cispo_value,
    "dro": dro_value,
    "gspo": gspo_value,
}
GRADIENTS: dict[str, Callable[..., np.ndarray]] = {"cispo": cispo_gradient, "gspo": gspo_gradient}


def by_hand(
    name: str, logprobs: Arrays, inputs: Sequence[Inputs], knobs: Knobs
) -> tuple[float, Arrays]:
    """The loss over all Datums and, per Datum, its gradient."""
    total, found = 0.0, []
    for lp, own in zip(logprobs, inputs, strict=True):
        exact, lp64 = (
            {key: array.astype(np.float64) for key, array in own.items()},
            lp.astype(np.float64),
        )
        total += VALUES[name](lp64, exact, knobs)
        if name in GRADIENTS:
            found.append(GRADIENTS[name](lp64, exact, knobs))
        else:
            found.append(
                differences(functools.partial(VALUES[name], inputs=exact, knobs=knobs), lp64)
            )
    return total, found


# ---- the same by lorakit


def as_datum(inputs: Inputs) -> Datum:
    length = len(inputs["advantages"])
    return Datum(ModelInput.from_ints([3] * length), {"target_tokens": [4] * length, **inputs})


def by_lorakit(
    name: str,
    logprobs: Arrays,
    inputs: Sequence[Inputs],
    knobs: Knobs,
    *,
    rows: Sequence[Sequence[int]] | None = None,
    filler: float = FILLER,
) -> tuple[float, Arrays]:
    """The same as ``by_hand``, through ``prepare`` and ``collate``; ``rows`` says which Datums
    share a row.
    """
    loss = LOSSES[name]
    ready = prepare(
        list(map(as_datum, inputs)),
        name,
        loss,
        vocab_size=VOCAB,
        knobs=check_knobs(name, loss, knobs),
    )  # the defaults too, as the service does
    rows = [[number] for number in range(len(ready))] if rows is None else rows
    batch = collate([[ready[number] for number in row] for row in rows], pad_token_id=0)
    laid = torch.full(batch.input_ids.shape, filler)
    places: dict[int, tuple[int, slice]] = {}
    for r, row in enumerate(rows):
        start = 0
        for number in row:
            places[number] = (r, slice(start, start + len(logprobs[number])))
            laid[places[number]] = torch.from_numpy(logprobs[number])
            start += len(logprobs[number])
    leaf = laid.clone().requires_grad_()
    output = loss(leaf, batch, **knobs)
    assert output.loss_sum.shape == () and output.loss_sum.dtype == torch.float32
    assert torch.equal(output.logprobs, laid) and not output.logprobs.requires_grad
    output.loss_sum.backward()
    assert leaf.grad is not None
    gradient = leaf.grad.clone()
    found = [gradient[places[number]].numpy().copy() for number in range(len(ready))]
    for place in places.values():
        gradient[place] = 0.0
    assert not gradient.any()  # of padding
    return float(output.loss_sum.detach()), found


def assert_same(
    name: str,
    logprobs: Arrays,
    inputs: Sequence[Inputs],
    given: Knobs,
    *,
    rows: Sequence[Sequence[int]] | None = None,
) -> None:
    value, found = by_lorakit(name, logprobs, inputs, given, rows=rows)
    expected_value, expected = by_hand(name, logprobs, inputs, {**DEFAULTS[name], **given})
    assert value == pytest.approx(expected_value, rel=2e-6, abs=1e-5)
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=5e-6, atol=1e-6)


LOG_RATIOS = (-2.0, -0.4, -0.1, 0.05, 0.15, 0.6, 1.7)  # ratios from 0.135 to 5.47
ADVANTAGES = (-1.5, 0.0, 0.75, 2.0)
LENGTHS = (11, 4, 1, 12)


def every_case(seed: int = 0) -> tuple[Arrays, list[dict[str, np.ndarray]]]:
    """Each ratio with each advantage, shuffled, and cut into Datums of different lengths."""
    rng = np.random.default_rng(seed)
    pairs = np.array(list(itertools.product(LOG_RATIOS, ADVANTAGES)))[
        rng.permutation(len(LOG_RATIOS) * len(ADVANTAGES))
    ]
    assert len(pairs) == sum(LENGTHS)
    lp = rng.uniform(-6.0, -0.2, len(pairs)).astype(np.float32)
    q, advantages = (lp - pairs[:, 0]).astype(np.float32), pairs[:, 1].astype(np.float32)
    ends = np.cumsum(LENGTHS)[:-1]
    inputs = [
        {"logprobs": own, "advantages": its}
        for own, its in zip(np.split(q, ends), np.split(advantages, ends), strict=True)
    ]
    return np.split(lp, ends), inputs


PACKED = [[3, 1], [2], [0]]
PER_TOKEN: list[tuple[str, dict[str, float]]] = [
    ("importance_sampling", {}),
    ("ppo", {}),
    ("ppo", {"clip_low_threshold": 0.3, "clip_high_threshold": 3.0}),
    ("ppo", {"clip_high_threshold": 1.1}),
    ("ppo", {"clip_low_threshold": 0}),
    ("cispo", {}),
    ("cispo", {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}),
    ("cispo", {"clip_low_threshold": 0.5}),
    ("dro", {}),
    ("dro", {"beta": 0.7}),
    ("dro", {"beta": 0.0}),
]


@pytest.mark.parametrize("rows", [None, PACKED], ids=["padded", "packed"])
@pytest.mark.parametrize(("name", "knobs"), PER_TOKEN, ids=str)
def test_value_and_gradient_are_those_of_the_formula(
    name: str, knobs: dict[str, float], rows: list[list[int]] | None
) -> None:
    assert_same(name, *every_case(), knobs, rows=rows)


def test_the_cases_lie_below_within_and_above_the_bounds_for_each_sign() -> None:
    logprobs, inputs = every_case()
    ratio = np.exp(np.concatenate(logprobs) - np.concatenate([own["logprobs"] for own in inputs]))
    signs = np.sign(np.concatenate([own["advantages"] for own in inputs]))
    for low, high in ((0.8, 1.2), (0.3, 3.0), (0.5, 4.0)):
        regions = np.digitize(ratio, [low, high])
        assert set(zip(regions.tolist(), signs.tolist(), strict=True)) == set(
            itertools.product((0, 1, 2), (-1, 0, 1))
        )
        # differences are taken on one side of a bound
        assert min(abs(ratio - low).min(), abs(ratio - high).min()) > 1e-3


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro"])
def test_what_stands_in_the_padding_changes_nothing(name: str) -> None:
    logprobs, inputs = every_case()
    some, others = (
        by_lorakit(name, logprobs, inputs, {}, filler=filler) for filler in (-0.01, -200.0)
    )
    assert some[0] == others[0]
    assert all(np.array_equal(*pair) for pair in zip(some[1], others[1], strict=True))


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo", "dro"])
def test_the_loss_of_several_datums_is_the_sum_of_their_own(name: str) -> None:
    logprobs, inputs = every_case()
    together, found = by_lorakit(name, logprobs, inputs, {})
    alone = [by_lorakit(name, [lp], [own], {}) for lp, own in zip(logprobs, inputs, strict=True)]
    assert together == pytest.approx(sum(value for value, _ in alone), rel=1e-5)
    for ours, (_, (theirs,)) in zip(found, alone, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-6)


def with_bounds(
    inputs: Sequence[Inputs], bringing: Sequence[Sequence[str]], seed: int = 1
) -> list[dict[str, np.ndarray]]:
    """Some Datums with bounds of their own for each token, around the ratios that occur."""
    rng = np.random.default_rng(seed)
    ranges = {"clip_low_threshold": (0.1, 1.0), "clip_high_threshold": (1.01, 5.0)}
    return [
        {
            **own,
            **{
                name: rng.uniform(*ranges[name], len(own["advantages"])).astype(np.float32)
                for name in names
            },
        }
        for own, names in zip(inputs, bringing, strict=True)
    ]


LOW, HIGH = "clip_low_threshold", "clip_high_threshold"
BRINGING = {
    "all both": [(LOW, HIGH)] * 4,
    "all high": [(HIGH,)] * 4,
    "some": [(LOW, HIGH), (), (HIGH,), (LOW,)],
}


@pytest.mark.parametrize("knobs", [{}, {LOW: 0.6, HIGH: 2.0}], ids=str)
@pytest.mark.parametrize("bringing", BRINGING.values(), ids=list(BRINGING))
@pytest.mark.parametrize("name", ["ppo", "cispo"])
def test_bounds_that_datums_bring_hold_for_their_tokens_and_knobs_for_the_rest(
    name: str, bringing: list[tuple[str, ...]], knobs: dict[str, float]
) -> None:
    logprobs, inputs = every_case()
    own = with_bounds(inputs, bringing)
    assert_same(name, logprobs, own, knobs)
    ours, knobs_alone = (by_lorakit(name, logprobs, each, knobs)[0] for each in (own, inputs))
    assert abs(ours - knobs_alone) > 1e-2  # they do something


# ---- gspo


def sequences(
    means: Sequence[float | None], seed: int = 0
) -> tuple[Arrays, list[dict[str, np.ndarray]]]:
    """Datums whose lp - q has this mean within the mask; None: mask and advantages are all zero.
    Outside it lies anywhere.
    """
    rng = np.random.default_rng(seed)
    logprobs, inputs = [], []
    for number, mean in enumerate(means):
        length = 3 + 4 * number % 11
        mask = np.zeros(length, np.float32)
        if mean is not None:
            # what is not 0 counts, and counts once
            mask[1:-1] = rng.choice([0.5, 1.0, 2.0], length - 2)
        distance = rng.normal(0.0, 0.5, length)
        if mean is not None:
            distance[mask != 0] += mean - distance[mask != 0].mean()
        lp = rng.uniform(-3.0, -0.2, length).astype(np.float32)
        advantages = rng.choice([-1.5, 0.0, 0.75, 2.0], length).astype(np.float32)
        advantages[:3] = 2.0, -1.5, 0.0
        if mean is None:
            advantages[:] = 0.0
        q = (lp - distance).astype(np.float32)
        logprobs.append(lp)
        inputs.append({"logprobs": q, "advantages": advantages, "sequence_ratio_mask": mask})
    return logprobs, inputs


GSPO: list[tuple[dict[str, float], list[float | None]]] = [
    ({}, [-2e-3, 1.5e-4, 2e-3, None, -1.5e-4, 0.4]),
    ({LOW: 0.8, HIGH: 1.2}, [-0.5, 0.1, 0.5, None, -0.1, 0.02]),
    ({HIGH: 1.5}, [-0.5, 0.1, 0.5, None, 0.3]),
]


@pytest.mark.parametrize("rows", [None, [[3, 0, 2], [1, 4]]], ids=["padded", "packed"])
@pytest.mark.parametrize(("knobs", "means"), GSPO, ids=str)
def test_gspo_has_one_ratio_per_datum_and_the_gradient_of_each_token_s_own(
    knobs: dict[str, float], means: list[float | None], rows: list[list[int]] | None
) -> None:
    logprobs, inputs = sequences(means)
    if rows is not None:
        rows = [*rows, *([number] for number in range(5, len(means)))]
    assert_same("gspo", logprobs, inputs, knobs, rows=rows)
    bounds = {**DEFAULTS["gspo"], **knobs}
    ratios = np.array(
        [
            sequence_ratio(lp.astype(np.float64), own)
            for lp, own in zip(logprobs, inputs, strict=True)
        ]
    )
    assert set(np.digitize(ratios, [bounds[LOW], bounds[HIGH]]).tolist()) == {0, 1, 2}


@pytest.mark.parametrize("bringing", BRINGING.values(), ids=list(BRINGING))
def test_gspo_takes_bounds_of_each_token(bringing: list[tuple[str, ...]]) -> None:
    logprobs, inputs = sequences([-0.5, 0.1, 0.5, None])
    assert_same("gspo", logprobs, with_bounds(inputs, bringing), {LOW: 0.8, HIGH: 1.2})


def test_gspo_reads_no_log_probability_outside_the_mask() -> None:
    logprobs, inputs = sequences([-0.1, 0.1])
    value, found = by_lorakit("gspo", logprobs, inputs, {LOW: 0.5, HIGH: 2.0})
    elsewhere = [
        {
            **own,
            "logprobs": (
                np.where(own["sequence_ratio_mask"] != 0, own["logprobs"], -1.0).astype(np.float32)
            ),
        }
        for own in inputs
    ]
    again, found_again = by_lorakit("gspo", logprobs, elsewhere, {LOW: 0.5, HIGH: 2.0})
    assert value == again and all(
        np.array_equal(*pair) for pair in zip(found, found_again, strict=True)
    )


def test_a_datum_without_a_mask_leaves_no_trace_in_the_others_gspo() -> None:
    logprobs, inputs = sequences([0.1, None, -0.1])
    _, found = by_lorakit("gspo", logprobs, inputs, {LOW: 0.5, HIGH: 2.0})
    _, alone = by_lorakit("gspo", logprobs[::2], inputs[::2], {LOW: 0.5, HIGH: 2.0})
    assert not np.any(found[1])
    assert all(np.array_equal(*pair) for pair in zip(found[::2], alone, strict=True))


def test_the_ratio_of_a_sequence_is_the_same_at_each_of_its_tokens_to_rounding() -> None:
    """Its bounds are some 1e-4 from 1, and log-probabilities some tens: their rounding must not
    come in.
    """
    rng = np.random.default_rng(0)
    lp = rng.uniform(-30.0, 0.0, 400).astype(np.float32)
    q = (lp - 1.5e-4).astype(np.float32)
    own = {
        "logprobs": q,
        "advantages": np.ones(400, np.float32),
        "sequence_ratio_mask": np.ones(400, np.float32),
    }
    _, (gradient,) = by_lorakit("gspo", [lp], [own], {})
    assert np.ptp(gradient) <= 2.0**-23
    np.testing.assert_allclose(-gradient, sequence_ratio(lp.astype(np.float64), own), rtol=2e-7)


# ---- what is extreme


@pytest.mark.parametrize("name", ["ppo", "gspo"])
def test_a_ratio_beyond_float32_that_the_bound_cuts_has_no_gradient(name: str) -> None:
    """The policy that sampled thought a token all but impossible: r is infinite in float32,
    min(r A, 1.2 A) is not.
    """
    lp, q = np.full(3, -1.0, np.float32), np.array([-95.0, -95.0, -95.0], np.float32)
    own = {"logprobs": q, "advantages": np.array([1.0, 2.0, 0.5], np.float32)}
    if name == "gspo":
        own["sequence_ratio_mask"] = np.ones(3, np.float32)
    value, (gradient,) = by_lorakit(name, [lp], [own], {LOW: 0.8, HIGH: 1.2})
    assert value == pytest.approx(-1.2 * 3.5)
    np.testing.assert_array_equal(gradient, 0.0)


@pytest.mark.parametrize("name", ["importance_sampling", "ppo", "cispo"])
def test_a_token_without_advantage_adds_nothing_whatever_its_ratio(name: str) -> None:
    """Tinker writes -99999 where it has no log-probability."""
    lp, q = np.full(3, -1.0, np.float32), np.array([-99999.0, -1.0, -99999.0], np.float32)
    own = {"logprobs": q, "advantages": np.array([0.0, 1.5, 0.0], np.float32)}
    value, (gradient,) = by_lorakit(name, [lp], [own], {})
    assert value == pytest.approx(
        by_hand(name, [lp[1:2]], [{key: array[1:2] for key, array in own.items()}], DEFAULTS[name])[
            0
        ]
    )
    np.testing.assert_allclose(gradient, [0.0, -1.5, 0.0])


@pytest.mark.parametrize("knobs", [{HIGH: 1.0}, {LOW: 1.0}], ids=str)
def test_a_ratio_at_its_bound_counts_as_within(knobs: dict[str, float]) -> None:
    """As with torch.clamp. Where the policy that sampled is the one that learns, every ratio is
    1.
    """
    lp = np.full(2, -1.0, np.float32)
    own = {"logprobs": lp, "advantages": np.array([1.0, -1.0], np.float32)}
    leaf = torch.full((2,), -1.0, requires_grad=True)
    ratio, advantages, bounds = (
        (leaf - leaf.detach()).exp(),
        torch.tensor([1.0, -1.0]),
        {**DEFAULTS["ppo"], **knobs},
    )
    (
        -torch.minimum(
            ratio * advantages, ratio.clamp(bounds[LOW], bounds[HIGH]) * advantages
        ).sum()
    ).backward()
    _, (gradient,) = by_lorakit("ppo", [lp], [own], knobs)
    np.testing.assert_array_equal(gradient, leaf.grad)


# ---- cross_entropy


def soft_data() -> list[Datum]:
    """Datums of 1, 3, 1 (in two dimensions) and 2 targets per position, with weights of each
    sign.
    """
    rng = np.random.default_rng(0)
    data = []
    for shape in ((5,), (3, 3), (7, 1), (4, 2)):
        weights = rng.choice([-1.25, -0.5, 0.0, 0.125, 0.3, 1.0, 2.0], shape)
        inputs = {"target_tokens": rng.integers(3, VOCAB, shape), "weights": weights}
        data.append(Datum(ModelInput.from_ints(rng.integers(3, VOCAB, shape[0])), inputs))
    assert {-1, 0, 1} == set(np.sign(np.concatenate([datum.weights.ravel() for datum in data])))
    return data


def as_batch(data: Sequence[Datum], name: str, **knobs: float) -> Batch:
    ready = prepare(data, name, LOSSES[name], vocab_size=VOCAB, knobs=knobs)
    return collate([[datum] for datum in ready], pad_token_id=0)


def test_cross_entropy_sums_weighted_logprobs_of_one_and_of_several_targets_per_position() -> None:
    data = soft_data()
    batch = as_batch(data, "cross_entropy")
    assert batch.targets.shape == (4, 7, 3)
    logprobs = np.random.default_rng(1).uniform(-9.0, -0.1, (4, 7, 3)).astype(np.float32)
    leaf = torch.from_numpy(logprobs).requires_grad_()
    output = LOSSES["cross_entropy"](leaf, batch)
    output.loss_sum.backward()
    expected, gradient = 0.0, np.zeros((4, 7, 3))
    for row, datum in enumerate(data):
        for place in np.ndindex(datum.weights.shape):
            at = (row, *place, *([0] if datum.weights.ndim == 1 else []))
            expected -= float(datum.weights[place]) * float(logprobs[at])
            gradient[at] = -float(datum.weights[place])
    assert output.loss_sum.item() == pytest.approx(expected, rel=2e-6)
    np.testing.assert_array_equal(leaf.grad, gradient)


def test_cross_entropy_of_one_target_per_position_has_no_third_dimension() -> None:
    data = soft_data()[:1]
    batch = as_batch(data, "cross_entropy")
    assert batch.targets.shape == (1, 5)
    leaf = torch.linspace(-4.0, -1.0, 5)[None].requires_grad_()
    LOSSES["cross_entropy"](leaf, batch).loss_sum.backward()
    np.testing.assert_array_equal(leaf.grad, -data[0].weights[None])


# ---- through a model


def make() -> Any:
    return randomise(inject(make_model("qwen3_moe"), LoRASpec(rank=4, alpha=8, unembedding=True)))


def plain_logprobs(model: Any, datum: Datum) -> torch.Tensor:
    """Of a row by itself, without padding: log_softmax over all logits, gathered at the targets."""
    logits = model(input_ids=torch.tensor([datum.model_input.to_ints()])).logits[0]
    targets = datum.targets.to_torch()
    return logits.log_softmax(dim=-1).gather(-1, targets.view(len(targets), -1)).view(targets.shape)


def test_through_a_model_ppo_has_the_gradient_of_a_plain_implementation() -> None:
    ours, theirs, rng = make(), make(), np.random.default_rng(0)
    knobs, data = {LOW: 0.7, HIGH: 1.3}, []
    for length in (12, 3, 7, 1):
        read, targets = (
            ModelInput.from_ints(rng.integers(3, VOCAB, length)),
            rng.integers(3, VOCAB, length),
        )
        with torch.no_grad():
            q = plain_logprobs(theirs, Datum(read, {"target_tokens": targets})).numpy()
        q = q - rng.choice([-1.0, -0.2, 0.1, 0.2, 0.8], length)
        data.append(
            Datum(
                read,
                {
                    "target_tokens": targets,
                    "logprobs": q,
                    "advantages": rng.choice([-1.0, 0.0, 0.5, 2.0], length),
                },
            )
        )
    batch = as_batch(data, "ppo", **knobs)
    output = compute_loss(
        ours, batch, functools.partial(LOSSES["ppo"], **knobs), all_positions=True
    )
    output.loss_sum.backward()

    total, num_cut = torch.zeros(()), 0
    for datum in data:
        q, advantages = datum.loss_fn_inputs["logprobs"].to_torch(), datum.advantages.to_torch()
        ratio = (plain_logprobs(theirs, datum) - q).exp()
        gain, cut_gain = ratio * advantages, ratio.clamp(0.7, 1.3) * advantages
        total = total - torch.where(gain < cut_gain, gain, cut_gain).sum()
        num_cut += int((cut_gain < gain).sum())
    total.backward()
    assert 2 < num_cut < batch.num_tokens - 2
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-5, atol=1e-5)
    assert relative_l2(gradients(ours), gradients(theirs)) < 1e-6


def test_through_a_model_soft_targets_have_the_gradient_of_a_plain_implementation() -> None:
    ours, theirs, data = make(), make(), soft_data()
    output = compute_loss(
        ours, as_batch(data, "cross_entropy"), LOSSES["cross_entropy"], all_positions=True
    )
    output.loss_sum.backward()
    total = -torch.stack(
        [(plain_logprobs(theirs, datum) * datum.weights.to_torch()).sum() for datum in data]
    ).sum()
    total.backward()
    torch.testing.assert_close(output.loss_sum, total, rtol=1e-5, atol=1e-5)
    assert relative_l2(gradients(ours), gradients(theirs)) < 1e-6
