"""The guard measures leaks where there are some, sees none where there is none, and turns
packing off.
"""

from __future__ import annotations

import logging
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tiny_models import make_model, tiny_config

from lorakit.callbacks.packing_guard import PackingGuard, measure_leak
from lorakit.model.families import packing_is_doubtful
from lorakit.model.load import load_model

FAMILIES = ["qwen3_moe", "qwen3", "llama", "mistral", "gemma2"]


class CountsOn(torch.nn.Module):
    """A model that ignores position ids, as a careless one would: packed documents leak."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model, self.config, self.device = model, model.config, model.device

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, **options: Any) -> Any:
        return self.model(input_ids=input_ids, **options)


def guard(model: Any) -> Any:
    datamodule = SimpleNamespace(is_packed=True)
    datamodule.pad_rows = lambda: setattr(datamodule, "is_packed", False)
    PackingGuard().on_fit_start(
        SimpleNamespace(datamodule=datamodule), SimpleNamespace(model=model)
    )
    return datamodule


@pytest.mark.parametrize("family", FAMILIES)
def test_these_families_do_not_leak(family: str) -> None:
    assert packing_is_doubtful(tiny_config(family)) is None
    assert measure_leak(make_model(family)) < 1e-4
    assert guard(make_model(family)).is_packed is True


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_bundled_model_does_not_leak(dtype: str) -> None:
    model = load_model("tiny", dtype=dtype)
    assert measure_leak(model) < 0.05
    assert guard(model).is_packed is True


def test_a_model_that_ignores_positions_leaks_wholly_and_packing_goes_off_with_a_word(
    caplog: Any,
) -> None:
    model = CountsOn(make_model("qwen3"))
    assert measure_leak(model) == pytest.approx(1.0)
    with caplog.at_level(logging.WARNING, logger="lorakit"):
        logging.getLogger("lorakit").propagate = True
        assert guard(model).is_packed is False
    assert "rows are padded instead" in caplog.text


def test_linear_attention_is_doubtful_and_does_leak() -> None:
    reason = packing_is_doubtful(tiny_config("qwen3_next"))
    assert reason is not None
    assert "linear_attention" in reason
    model = make_model("qwen3_next")
    assert measure_leak(model) > 0.05
    assert guard(model).is_packed is False


def test_recurrent_models_are_doubtful() -> None:
    import transformers

    assert packing_is_doubtful(transformers.MambaConfig(num_hidden_layers=1)) is not None


def test_the_measurement_leaves_mode_and_random_state_as_they_were() -> None:
    model = make_model("qwen3").train()
    before = torch.get_rng_state()
    measure_leak(model)
    assert model.training
    assert torch.equal(torch.get_rng_state(), before)


def test_a_run_without_packing_is_left_alone() -> None:
    datamodule = SimpleNamespace(is_packed=False)
    PackingGuard().on_fit_start(SimpleNamespace(datamodule=datamodule), SimpleNamespace(model=None))
    assert datamodule.is_packed is False
