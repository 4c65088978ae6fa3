"""DPO over pairs equals its formula, computed here in float64 by hand, in value, metrics and
gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from lorakit.errors import DataError
from lorakit.loss.preference import dpo
from lorakit.types import Datum, ModelInput, TensorData

LENGTHS = (4, 7, 1, 3, 6, 6)


def make_pairs(
    lengths: Sequence[int] = LENGTHS, seed: int = 0
) -> tuple[list[Datum], list[np.ndarray], list[np.ndarray]]:
    """Datums with a prompt of weight 0, the policy's log-probabilities, and the reference's."""
    rng = np.random.default_rng(seed)
    data = []
    for length in lengths:
        weights = rng.choice([1.0, 1.0, 0.5], length)
        weights[: length // 3] = 0.0
        data.append(
            Datum(
                ModelInput.from_ints([3] * length),
                {"target_tokens": [4] * length, "weights": weights},
            )
        )
    ours, theirs = (
        [rng.uniform(-5.0, -0.1, length).astype(np.float32) for length in lengths] for _ in range(2)
    )
    return data, ours, theirs


def margins_of(
    data: Sequence[Datum], ours: Sequence[np.ndarray], theirs: Sequence[np.ndarray], beta: float
) -> np.ndarray:
    distances = [
        float(
            np.sum(
                datum.weights.astype(np.float64)
                * (lp.astype(np.float64) - reference.astype(np.float64))
            )
        )
        for datum, lp, reference in zip(data, ours, theirs, strict=True)
    ]
    return np.array([beta * (distances[i] - distances[i + 1]) for i in range(0, len(data), 2)])


def run(
    data: Sequence[Datum], ours: Sequence[np.ndarray], theirs: Sequence[Any], **knobs: float
) -> tuple[float, dict[str, float], list[np.ndarray]]:
    leaves = [torch.from_numpy(lp).requires_grad_() for lp in ours]
    loss, metrics = dpo(theirs, **knobs)(data, leaves)
    assert loss.shape == ()
    loss.backward()
    return (
        float(loss.detach()),
        metrics,
        [leaf.grad.numpy() for leaf in leaves if leaf.grad is not None],
    )


@pytest.mark.parametrize("beta", [None, 0.02, 1.5])
def test_value_metrics_and_gradient_are_those_of_the_formula(beta: float | None) -> None:
    data, ours, theirs = make_pairs()
    value, metrics, found = run(data, ours, theirs, **({} if beta is None else {"beta": beta}))
    beta = 0.1 if beta is None else beta
    margins = margins_of(data, ours, theirs, beta)
    assert min(margins) < 0 < max(margins)
    assert value == pytest.approx(float(np.mean(np.log1p(np.exp(-margins)))), rel=1e-5)
    assert metrics == {
        "accuracy:mean": pytest.approx(float(np.mean(margins > 0))),
        "margin:mean": pytest.approx(float(np.mean(margins)), rel=1e-5, abs=1e-6),
    }
    # of the loss by each pair's difference of distances
    slopes = -beta / (1 + np.exp(margins)) / len(margins)
    for number, (datum, gradient) in enumerate(zip(data, found, strict=True)):
        sign = -1.0 if number % 2 else 1.0
        np.testing.assert_allclose(
            gradient, sign * slopes[number // 2] * datum.weights, rtol=1e-5, atol=1e-8
        )


def test_at_the_reference_itself_the_loss_is_log_2_and_no_pair_is_right() -> None:
    data, ours, _ = make_pairs()
    value, metrics, _ = run(data, ours, ours)
    assert value == pytest.approx(float(np.log(2.0)))
    assert metrics == {"accuracy:mean": 0.0, "margin:mean": 0.0}


def test_a_margin_that_is_very_negative_is_finite() -> None:
    data, ours, theirs = make_pairs((4, 4))
    value, _, found = run(data, [ours[0] - 2000.0, ours[1]], theirs, beta=1.0)
    margin = margins_of(data, [ours[0] - 2000.0, ours[1]], theirs, 1.0)[0]
    assert margin < -1000 and value == pytest.approx(-margin, rel=1e-5)
    np.testing.assert_allclose(found[0], -data[0].weights)


@pytest.mark.parametrize(
    "kind",
    [
        list,
        torch.from_numpy,
        TensorData,
        lambda a: TensorData(a.astype(np.float64)),
        np.ndarray.tolist,
    ],
)
def test_the_reference_may_be_lists_arrays_and_tensors(kind: Callable[[np.ndarray], Any]) -> None:
    data, ours, theirs = make_pairs()
    expected = run(data, ours, theirs)
    found = run(data, ours, [kind(reference) for reference in theirs])
    assert found[0] == pytest.approx(expected[0], rel=1e-6)


def test_several_targets_per_position_are_summed_by_their_weights() -> None:
    rng = np.random.default_rng(0)
    data = [
        Datum(
            ModelInput.from_ints([3] * 3),
            {"target_tokens": np.full((3, 2), 4), "weights": rng.uniform(0, 1, (3, 2))},
        )
        for _ in range(2)
    ]
    ours, theirs = (
        [rng.uniform(-5.0, -0.1, (3, 2)).astype(np.float32) for _ in range(2)] for _ in range(2)
    )
    value, _, _ = run(data, ours, theirs)
    assert value == pytest.approx(
        float(np.log1p(np.exp(-margins_of(data, ours, theirs, 0.1)[0]))), rel=1e-5
    )


def refused(data: Sequence[Datum], ours: Sequence[np.ndarray], theirs: Sequence[Any]) -> str:
    with pytest.raises(DataError) as caught:
        run(data, ours, theirs)
    return str(caught.value)


def test_an_odd_number_of_datums_is_refused() -> None:
    data, ours, theirs = make_pairs()
    found = refused(data[:3], ours[:3], theirs[:3])
    assert "pairs" in found and "3 Datums" in found


def test_more_or_fewer_references_than_datums_are_refused() -> None:
    data, ours, theirs = make_pairs()
    assert "6 Datums, 4 reference_logprobs" in refused(data, ours, theirs[:4])
    assert "4 Datums, 6 reference_logprobs" in refused(data[:4], ours[:4], theirs)


def test_no_datums_are_refused() -> None:
    refused([], [], [])


@pytest.mark.parametrize("length", [0, 1, 2, 4])
def test_a_reference_of_another_length_is_refused_by_number(length: int) -> None:
    """One number for a whole sequence would be taken for each of its tokens."""
    data, ours, theirs = make_pairs((3, 3, 3, 3))
    theirs[2] = np.full(length, -1.0, np.float32)
    assert "[2]" in refused(data, ours, theirs)


def test_a_datum_without_weights_is_refused() -> None:
    data, ours, theirs = make_pairs((3, 3))
    data[1] = Datum(data[1].model_input, {"target_tokens": [4, 4, 4]})
    assert "weights" in refused(data, ours, theirs)
