"""The architectures that the presets name, from their published configs on the meta device: every shape, no weight."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import yaml

from lorakit.cli.conf import conf_dir
from lorakit.lora.inject import plan, to_peft_config
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import model_class

TEXT: dict[str, Any] = {
    "vocab_size": 151936,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "moe_intermediate_size": 768,
    "num_hidden_layers": 48,
    "num_attention_heads": 32,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "decoder_sparse_step": 1,
    "tie_word_embeddings": False,
}
# In each of 48 layers: in + out of q, k, v, o; and of gate_up and down, for each of 128 experts ...
ATTENTION_PER_RANK = 48 * ((2048 + 4096) + 2 * (2048 + 512) + (4096 + 2048))
EXPERTS_PER_RANK = 48 * 128 * ((2048 + 1536) + (768 + 2048))
# ... or of gate, up and down, with one factor on the hidden width (2048) for all experts: the figure that Tinker publishes.
SHARED_EXPERTS_PER_RANK = 14_450_688


def _config(name: str) -> Any:
    if name == "qwen3_30b_a3b":
        return transformers.Qwen3MoeConfig(**TEXT)
    return transformers.Qwen3VLMoeConfig(text_config=TEXT, vision_config={"depth": 2, "out_hidden_size": 2048})


def _spec(name: str) -> LoRASpec:
    defaults, preset = (
        yaml.safe_load(Path(conf_dir(), file).read_text()) for file in ("lora/default.yaml", f"experiment/{name}.yaml")
    )
    return LoRASpec(**{k: v for k, v in {**defaults, **preset["lora"]}.items() if k not in ("_target_", "seed")})


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_vl_30b_a3b"])
def test_the_preset_adapts_the_language_model_and_counts_as_by_hand(name: str) -> None:
    config = _config(name)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    spec = _spec(name)
    planned = plan(model, spec)
    assert SHARED_EXPERTS_PER_RANK == 48 * (2 * (2048 + 128 * 768) + (2048 + 128 * 768))
    assert planned.num_params == 8 * (SHARED_EXPERTS_PER_RANK + ATTENTION_PER_RANK)
    assert planned.megabytes(2) == pytest.approx(244.6, abs=0.1)
    fused = 48 * 128 * (2 * (2048 + 1536) + (768 + 2048))  # gate and up as one pair of rank 2r
    assert planned.num_peft_params == 8 * (fused + ATTENTION_PER_RANK)
    assert [plan(model, replace(spec, rank=rank)).megabytes(2) <= 300 for rank in (9, 10)] == [True, False]
    per_expert = [plan(model, replace(spec, rank=rank, expert_layout="per_expert")) for rank in (3, 4)]
    assert [found.num_params for found in per_expert] == [rank * (EXPERTS_PER_RANK + ATTENTION_PER_RANK) for rank in (3, 4)]
    assert [found.megabytes(2) <= 300 for found in per_expert] == [True, False]
    assert {target.family for target in planned.targets} == {"attention", "experts"}
    assert not [target.name for target in planned.targets if "visual" in target.name or target.module.endswith("gate")]
    assert len(planned.targets) == 48 * 6
    assert sum(p.numel() for p in model.parameters()) > 30e9
    config = to_peft_config(per_expert[0])
    assert config.to_dict()["target_parameters"] == ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]
