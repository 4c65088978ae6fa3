"""The architectures that the presets name, from their published configs on the meta device:
every shape, no weight.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path
from typing import Any

import hydra
import pytest
import torch
import transformers
import yaml

from lorakit.config.paths import conf_dir
from lorakit.config.resolve import to_plain
from lorakit.config.schema import RunConfig
from lorakit.lora.inject import to_peft_config
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import model_class, skeleton_of
from lorakit.pipeline.build import build_step_plan
from lorakit.planner.presets import preset_config
from lorakit.planner.step_plan import StepPlan, row_sizes_without_data

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
# ... or of gate, up and down, with one factor on the hidden width (2048) for all experts: the
# figure that Tinker publishes.
SHARED_EXPERTS_PER_RANK = 14_450_688


VISION: dict[str, Any] = {
    "depth": 27,
    "hidden_size": 1152,
    "intermediate_size": 4304,
    "num_heads": 16,
    "out_hidden_size": 2048,
    "deepstack_visual_indexes": [8, 16, 24],
}
# In each of 27 layers: in + out of qkv, proj, fc1, fc2; and of two layers of each merger, of which
# DeepStack has three.
VISION_PER_RANK = 27 * ((1152 + 3 * 1152) + 2 * 1152 + 2 * (1152 + 4304))
MERGER_PER_RANK = 4 * (2 * 4 * 1152 + (4 * 1152 + 2048))


def _config(name: str) -> Any:
    if name == "qwen3_30b_a3b":
        return transformers.Qwen3MoeConfig(**TEXT)
    return transformers.Qwen3VLMoeConfig(text_config=TEXT, vision_config=VISION)


def _spec(name: str) -> LoRASpec:
    defaults, preset = (
        yaml.safe_load(Path(conf_dir(), file).read_text())
        for file in ("lora/default.yaml", f"experiment/{name}.yaml")
    )
    return LoRASpec(
        **{k: v for k, v in {**defaults, **preset["lora"]}.items() if k not in ("_target_", "seed")}
    )


@pytest.mark.parametrize("name", ["qwen3_30b_a3b", "qwen3_vl_30b_a3b"])
def test_the_preset_adapts_the_language_model_and_counts_as_by_hand(name: str) -> None:
    config = _config(name)
    with torch.device("meta"):
        model = model_class(config).from_config(config)
    spec = _spec(name)
    planned = plan_lora(model, spec)
    assert SHARED_EXPERTS_PER_RANK == 48 * (2 * (2048 + 128 * 768) + (2048 + 128 * 768))
    assert planned.num_params == 8 * (SHARED_EXPERTS_PER_RANK + ATTENTION_PER_RANK)
    assert planned.megabytes(2) == pytest.approx(244.6, abs=0.1)
    fused = 48 * 128 * (2 * (2048 + 1536) + (768 + 2048))  # gate and up as one pair of rank 2r
    assert planned.num_peft_params == 8 * (fused + ATTENTION_PER_RANK)
    assert [plan_lora(model, replace(spec, rank=rank)).megabytes(2) <= 300 for rank in (9, 10)] == [
        True,
        False,
    ]
    per_expert = [
        plan_lora(model, replace(spec, rank=rank, expert_layout="per_expert")) for rank in (3, 4)
    ]
    assert [found.num_params for found in per_expert] == [
        rank * (EXPERTS_PER_RANK + ATTENTION_PER_RANK) for rank in (3, 4)
    ]
    assert [found.megabytes(2) <= 300 for found in per_expert] == [True, False]
    assert {target.family for target in planned.targets} == {"attention", "experts"}
    assert not [
        target.name
        for target in planned.targets
        if "visual" in target.name or target.module.endswith("gate")
    ]
    assert len(planned.targets) == 48 * 6
    assert sum(p.numel() for p in model.parameters()) > 30e9
    config = to_peft_config(per_expert[0])
    assert config.to_dict()["target_parameters"] == [
        "mlp.experts.down_proj",
        "mlp.experts.gate_up_proj",
    ]


def test_images_of_the_named_model_have_their_own_switches_and_ranks_that_keep_the_file_small() -> (
    None
):
    model = skeleton_of(_config("qwen3_vl_30b_a3b"))
    spec = _spec("qwen3_vl_30b_a3b")
    assert not spec.vision and not spec.merger
    alone = {"attention": False, "experts": False, "expert_layout": "per_expert"}
    for name, per_rank in (("vision", VISION_PER_RANK), ("merger", MERGER_PER_RANK)):
        planned = plan_lora(model, replace(spec, **{name: True}, **alone))
        assert planned.num_params == 8 * per_rank and {
            target.family for target in planned.targets
        } == {name}
    both = plan_lora(model, replace(spec, vision=True, merger=True))
    text_only = plan_lora(model, spec)
    assert both.num_params == text_only.num_params + 8 * (VISION_PER_RANK + MERGER_PER_RANK)
    assert text_only.num_params == 122_290_176 and text_only.megabytes(2) == pytest.approx(
        244.6, abs=0.1
    )

    def fits(rank: int, **changes: Any) -> bool:  # what the preset says of ranks
        return 10 <= plan_lora(model, replace(spec, rank=rank, **changes)).megabytes(2) <= 300

    without = {"experts": False, "expert_layout": "per_expert"}
    ranges = {
        "shared_outer": (1, 9, {}),
        "per_expert": (1, 3, {"expert_layout": "per_expert"}),
        "none": (6, 179, without),
    }
    for first, last, changes in ranges.values():
        assert fits(first, **changes) and fits(last, **changes) and not fits(last + 1, **changes)
    assert not fits(5, **without)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("gpus", "gigabytes", "strategy", "most"),
    [(1, 80, "single", 70), (8, 80, "zero1", 70), (2, 48, "zero3", 40.5), (8, 24, "zero3", 16)],
)
def test_the_preset_fits_where_it_says(
    gpus: int, gigabytes: int, strategy: str, most: float
) -> None:
    step = _step_plan()
    assert step.shape.image_tokens == (1024,) * 4  # a row as full of images as it can be
    assert step.first_that_fits(gpus, gigabytes * 10**9, offloads=False) == strategy
    assert step.memory(strategy, gpus).total < most * 1e9


@functools.cache
def _step_plan() -> StepPlan:
    """The preset's plan, of the config that lorakit brings; nothing is read and no weight made."""
    with hydra.initialize_config_dir(str(conf_dir()), version_base="1.3"):
        composed = hydra.compose(
            "train",
            overrides=["experiment=qwen3_vl_30b_a3b", "data.path=none", "trainer.accelerator=cuda"],
        )
    config = RunConfig.from_dict(to_plain(composed))
    skeleton = skeleton_of(preset_config(config.model.path))
    planned = plan_lora(skeleton, config.lora)
    rows = row_sizes_without_data(config, skeleton)
    return build_step_plan(
        config, skeleton, planned, accelerator="cuda", precision="bf16-mixed", rows=rows
    )
