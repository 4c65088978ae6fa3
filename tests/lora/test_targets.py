"""Targets that look like others: routers behind wildcards, convolutions, shared experts that
PEFT takes for stacked ones.
"""

from __future__ import annotations

import pytest
from tiny_models import make_model

from lorakit.errors import ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec


@pytest.mark.parametrize("pattern", ["*", "*.layers.0.*", "*mlp*"])
def test_a_wildcard_never_wraps_the_router(pattern: str) -> None:
    assert not [
        target
        for target in plan_lora(make_model(), LoRASpec(targets=[pattern])).targets
        if target.family == "router"
    ]
    for name in ("*.mlp.gate", "*.gate", "mlp.gate"):
        assert {
            target.family for target in plan_lora(make_model(), LoRASpec(targets=[name])).targets
        } == {"router"}


def test_a_convolution_is_no_expert() -> None:
    planned = plan_lora(make_model("qwen3_next"), LoRASpec(rank=2))
    assert not [target.name for target in planned.targets if "conv" in target.name]
    wrapped = inject(make_model("qwen3_next"), LoRASpec(rank=2))
    assert sum(p.numel() for p in wrapped.parameters() if p.requires_grad) == planned.num_params


def test_shared_experts_that_peft_would_misread_are_left_out_and_named() -> None:
    planned = plan_lora(make_model("qwen3_next"), LoRASpec(rank=2))
    assert "shared_expert" in planned.note
    assert not [target.name for target in planned.targets if "shared_expert" in target.name]
    for spec in (LoRASpec(mlp=True), LoRASpec(targets=["shared_expert.up_proj"])):
        with pytest.raises(ConfigError, match="not possible"):
            plan_lora(make_model("qwen3_next"), spec)
    # the same names in a dense model are themselves
    assert plan_lora(make_model("qwen3"), LoRASpec(mlp=True)).note == ""
