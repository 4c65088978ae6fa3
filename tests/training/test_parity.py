"""A device is used by itself only where it computes what the CPU does. No other device is here:
the CPU stands for it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import pytest
import torch

from lorakit.training import parity
from lorakit.training.precision import resolve_accelerator


@pytest.fixture
def mac(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[[float, torch.Tensor], Any]], None]:
    """A machine with MPS that computes what the CPU does, changed by a function."""

    def make(change: Callable[[float, torch.Tensor], Any]) -> None:
        parity.find_parity_problem.cache_clear()
        right = parity.loss_and_gradient
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
        monkeypatch.setattr(
            parity,
            "loss_and_gradient",
            lambda device, batch: (
                right("cpu", batch) if device == "cpu" else change(*right("cpu", batch))
            ),
        )

    return make


def test_it_is_used_where_loss_and_gradient_are_the_same(mac: Any) -> None:
    mac(
        lambda loss, gradient: (
            loss * (1 + 1e-5),
            gradient + 1e-6 * gradient.norm() / len(gradient) ** 0.5,
        )
    )
    assert resolve_accelerator("auto") == "mps"


@pytest.mark.parametrize(
    "change",
    [
        lambda loss, gradient: (loss, gradient.flip(0)),
        lambda loss, gradient: (loss * 1.01, gradient),
        lambda loss, gradient: (loss, gradient * float("nan")),
    ],
)
def test_it_is_left_where_they_differ(
    change: Any, mac: Any, caplog: pytest.LogCaptureFixture
) -> None:
    mac(change)
    with caplog.at_level(logging.WARNING):
        assert resolve_accelerator("auto") == "cpu"
    assert (
        "takes the CPU: mps computes another loss" in caplog.text
        and resolve_accelerator("mps") == "mps"
    )


def test_it_is_left_where_it_cannot_compute(mac: Any, caplog: pytest.LogCaptureFixture) -> None:
    def fails(loss: float, gradient: torch.Tensor) -> Any:
        # as torch says it, by a kind of RuntimeError
        raise RuntimeError("aten::_grouped_mm is not implemented for MPS")

    mac(fails)
    assert (
        resolve_accelerator("auto") == "cpu"
        and "cannot compute padded rows: aten::_grouped_mm" in caplog.text
    )


def test_the_gradient_is_one_that_is_not_nothing() -> None:
    loss, gradient = parity.loss_and_gradient("cpu", parity._batches()["packed"])
    assert loss > 10 and float(gradient.norm()) > 0.1
