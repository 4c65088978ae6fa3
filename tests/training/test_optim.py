"""Schedules by hand values, the published learning rate, and which number formats a run computes
in.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from lorakit.config.optimization import build_optimization
from lorakit.config.schema import RunConfig
from lorakit.errors import ConfigError
from lorakit.lora.spec import LoRASpec
from lorakit.training import precision
from lorakit.training.optim import auto_lr, constant, cosine, linear, lr_source, resolve_warmup


def rates(schedule: Any, count: int, **options: Any) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = schedule(optimizer, **options)
    values = []
    for _ in range(count):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return values


def test_constant_rises_and_stays() -> None:
    assert rates(constant, 4, total_steps=4, warmup_steps=2) == [1.0, 2.0, 2.0, 2.0]
    assert rates(constant, 2, total_steps=4) == [2.0, 2.0]


def test_linear_falls_on_a_line_to_its_final_ratio() -> None:
    assert rates(linear, 7, total_steps=6, warmup_steps=2) == pytest.approx(
        [1.0, 2.0, 2.0, 1.5, 1.0, 0.5, 0.0]
    )
    assert rates(linear, 6, total_steps=4, final_ratio=0.5) == pytest.approx(
        [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    )


def test_cosine_falls_on_half_a_cosine() -> None:
    root = 2**0.5 / 2
    assert rates(cosine, 6, total_steps=4) == pytest.approx(
        [2.0, 1 + root, 1.0, 1 - root, 0.0, 0.0]
    )
    assert rates(cosine, 6, total_steps=5, warmup_steps=1, final_ratio=0.1)[1:] == pytest.approx(
        [2.0, 0.2 + 0.9 * (1 + root), 1.1, 0.2 + 0.9 * (1 - root), 0.2]
    )


def test_a_warm_up_below_one_is_a_share() -> None:
    assert [resolve_warmup(value, 200) for value in (0, 0.05, 0.5, 1, 10)] == [0, 10, 100, 1, 10]


def config(model_type: str, hidden_size: int) -> Any:
    text = SimpleNamespace(model_type=model_type, hidden_size=hidden_size)
    return SimpleNamespace(get_text_config=lambda: text)


def test_auto_lr_is_tinker_cookbooks_rule() -> None:
    assert auto_lr(config("qwen3_moe", 2048), LoRASpec()) == pytest.approx(4.9908e-4, rel=1e-4)
    assert auto_lr(config("llama", 4096), LoRASpec(rank=8)) == pytest.approx(2.8566e-4, rel=1e-4)


def test_of_other_families_it_is_qloras_and_says_so() -> None:
    assert (
        auto_lr(config("gemma2", 3584), LoRASpec()) == 2e-4
        and auto_lr(config("mistral", 6656), LoRASpec()) == 1e-4
    )
    assert "no rule is published for gemma2" in lr_source(config("gemma2", 3584))
    assert "tinker-cookbook" in lr_source(config("qwen3", 1024))


@pytest.mark.parametrize(
    ("model_type", "spec"),
    [
        ("qwen3", LoRASpec(rslora=True)),
        ("qwen3", LoRASpec(alpha=16)),
        ("gemma2", LoRASpec(alpha=16)),
    ],
)
def test_auto_lr_refuses_rather_than_guesses(model_type: str, spec: LoRASpec) -> None:
    with pytest.raises(ConfigError, match=r"optim\.lr=auto.*set optim\.lr to a number"):
        auto_lr(config(model_type, 2048), spec)


@pytest.mark.parametrize(
    ("accelerator", "native", "expected"),
    [
        ("cpu", True, "bf16-mixed"),
        ("cpu", False, "32-true"),
        ("cuda", True, "bf16-mixed"),
        ("cuda", False, "16-mixed"),
        ("mps", True, "32-true"),
    ],
)
def test_auto_precision_is_bf16_where_it_is_native(
    accelerator: str, native: bool, expected: str, monkeypatch: Any
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: native)
    monkeypatch.setattr(
        torch.cuda,
        "is_bf16_supported",
        lambda including_emulation=True: native or including_emulation,
    )
    assert precision.resolve_precision("auto", accelerator) == expected


@pytest.mark.parametrize(
    ("precision", "step"), [("32-true", "fused"), ("bf16-mixed", "fused"), ("16-mixed", "foreach")]
)
def test_the_optimiser_steps_fused_except_where_gradients_are_scaled(
    precision: str, step: str
) -> None:
    optim = {
        "_target_": "torch.optim.AdamW",
        "_partial_": True,
        "lr": "auto",
        "fused": True,
        "clip_norm": 1.0,
    }
    schedule = {"_target_": "lorakit.training.optim.constant", "_partial_": True}
    rows = {"model": {"path": "tiny"}, "data": {"path": "pig_latin/train"}}
    config = RunConfig.from_dict({**rows, "optim": optim, "schedule": schedule})
    make, _ = build_optimization(config, lr=1e-3, total_steps=2, precision=precision)
    made = make([torch.nn.Parameter(torch.zeros(1))]).defaults
    assert made["lr"] == 1e-3
    assert [name for name in ("fused", "foreach") if made[name]] == [step]


def test_precisions_that_would_put_the_adapter_into_16_bit_are_refused() -> None:
    assert precision.resolve_precision("16-mixed", "cuda") == "16-mixed"
    with pytest.raises(ConfigError, match="needs a GPU"):
        precision.resolve_precision("16-mixed", "cpu")
    with pytest.raises(ConfigError, match=r"trainer\.precision=bf16-true.*bf16-mixed"):
        precision.resolve_precision("bf16-true", "cpu")


def test_the_bases_dtype_follows_the_precision_unless_it_is_set() -> None:
    assert [precision.base_dtype("auto", p) for p in ("bf16-mixed", "16-mixed", "32-true")] == [
        "bfloat16",
        "float16",
        "float32",
    ]
    assert precision.base_dtype("float32", "bf16-mixed") == "float32"


def test_an_accelerator_that_is_not_there_is_an_error(monkeypatch: Any) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert precision.resolve_accelerator("auto") == "cpu"
    with pytest.raises(ConfigError, match="sees no GPU"):
        precision.resolve_accelerator("cuda")
    with pytest.raises(ConfigError, match="tpu is unknown"):
        precision.resolve_accelerator("tpu")


@pytest.mark.parametrize("schedule", [constant, linear, cosine])
@pytest.mark.parametrize("warmup_steps", [-1, -0.1])
def test_a_negative_warm_up_is_an_error(schedule: Any, warmup_steps: float) -> None:
    with pytest.raises(ConfigError, match=rf"schedule\.warmup_steps={warmup_steps}"):
        rates(schedule, 1, total_steps=4, warmup_steps=warmup_steps)
