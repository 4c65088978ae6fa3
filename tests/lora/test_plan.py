"""The plan lists what a spec adapts, counted by hand, and refuses what matches nothing."""

from __future__ import annotations

import io

import pytest
from rich.console import Console
from tiny_models import make_model

from lorakit.errors import ConfigError
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.model.load import load_config, load_model, load_skeleton

# One layer of the tiny models, rank 1: q 32+32, k 32+16, v 32+16, o 32+32; MLP 3 x (32+48); 4
# experts: 32+48 and 24+32.
ATTENTION, MLP, EXPERTS, UNEMBEDDING = 64 + 48 + 48 + 64, 3 * 80, 4 * (80 + 56), 32 + 64


@pytest.mark.parametrize(
    ("family", "switches", "expected"),
    [
        ("qwen3_moe", {}, ATTENTION + EXPERTS),
        ("qwen3_moe", {"experts": False}, ATTENTION),
        ("qwen3_moe", {"attention": False}, EXPERTS),
        ("qwen3_moe", {"experts": True, "unembedding": True}, ATTENTION + EXPERTS),
        ("qwen3", {}, ATTENTION + MLP),
        ("qwen3", {"mlp": False}, ATTENTION),
        ("llama", {"attention": False, "mlp": True}, MLP),
        ("llama", {"unembedding": True}, ATTENTION + MLP),
    ],
)
def test_families_are_switched_on_and_off(family: str, switches: dict, expected: int) -> None:
    unembedding = UNEMBEDDING if switches.get("unembedding") else 0
    planned = plan_lora(make_model(family), LoRASpec(rank=3, **switches))
    assert planned.num_params == 3 * (2 * expected + unembedding)


def test_the_bundled_model_is_counted_by_hand_and_alike_on_the_meta_device() -> None:
    config = load_config("tiny")
    hidden, heads, groups = (
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
    )
    width = config.head_dim
    attention = 2 * (hidden + heads * width) + 2 * (hidden + groups * width)
    experts = config.num_experts * (2 * hidden + 3 * config.moe_intermediate_size)
    skeleton, model = load_skeleton("tiny"), load_model("tiny")
    assert {parameter.device.type for parameter in skeleton.parameters()} == {"meta"}
    planned = plan_lora(skeleton, LoRASpec(rank=8))
    assert planned.num_params == 8 * config.num_hidden_layers * (attention + experts)
    assert planned == plan_lora(model, LoRASpec(rank=8))
    assert planned.num_base_params == sum(parameter.numel() for parameter in model.parameters())
    assert planned.is_tied is config.tie_word_embeddings


def test_share_and_megabytes_are_those_of_the_adapter() -> None:
    planned = plan_lora(make_model("qwen3"), LoRASpec(rank=2))
    num = 2 * 2 * (ATTENTION + MLP)
    assert planned.megabytes(4) == pytest.approx(num * 4 / 1e6)
    assert planned.trainable_share == pytest.approx(num / (num + planned.num_base_params))


def test_the_table_shows_each_kind_of_matrix_with_its_count() -> None:
    out = io.StringIO()
    Console(file=out, width=160).print(plan_lora(make_model("qwen3_moe"), LoRASpec(rank=2)).table())
    rows = [line for line in out.getvalue().splitlines() if "gate_up_proj" in line]
    assert list(rows[0].replace("│", " ").split()) == [
        "experts",
        "gate_up_proj",
        "2",
        "4",
        "32",
        "48",
        "1,280",
    ]


@pytest.mark.parametrize(
    ("family", "missing"), [("qwen3_moe", "mlp"), ("qwen3", "experts"), ("llama", "experts")]
)
def test_a_family_that_matches_nothing_is_an_error_that_says_what_there_is(
    family: str, missing: str
) -> None:
    with pytest.raises(ConfigError, match=rf"lora\.{missing}=true.*attention.*unembedding"):
        plan_lora(make_model(family), LoRASpec(**{missing: True}))


def test_nothing_switched_on_is_an_error() -> None:
    with pytest.raises(ConfigError, match="adapt nothing"):
        plan_lora(make_model("qwen3"), LoRASpec(attention=False, mlp=False))


@pytest.mark.parametrize(
    ("pattern", "near"),
    [("q_prj", "q_proj"), ("mlp.experts.gateup_proj", "gate_up_proj"), ("lmhead", "lm_head")],
)
def test_a_pattern_that_matches_nothing_is_an_error_with_near_names(
    pattern: str, near: str
) -> None:
    with pytest.raises(ConfigError, match=f"{pattern}.*matches nothing.*{near}"):
        plan_lora(make_model("qwen3_moe"), LoRASpec(targets=["k_proj", pattern]))


def test_names_suffixes_and_patterns_choose_alone() -> None:
    model = make_model("qwen3_moe")

    def names(*targets: str) -> list[str]:
        return [target.name for target in plan_lora(model, LoRASpec(targets=targets)).targets]

    assert names("q_proj") == ["model.layers.0.self_attn.q_proj", "model.layers.1.self_attn.q_proj"]
    assert names("model.layers.1.self_attn.v_proj") == ["model.layers.1.self_attn.v_proj"]
    assert names("*.layers.0.*.k_proj", "lm_head") == ["model.layers.0.self_attn.k_proj", "lm_head"]
    assert names("experts") == [
        f"model.layers.{i}.mlp.experts.{leaf}_proj" for i in (0, 1) for leaf in ("gate_up", "down")
    ]


@pytest.mark.parametrize(
    "switches", [{}, {"experts": True, "unembedding": True}, {"attention": False}]
)
def test_no_family_takes_the_router(switches: dict) -> None:
    planned = plan_lora(make_model("qwen3_moe"), LoRASpec(**switches))
    assert "router" not in planned.by_family()
    assert not any(
        ".gate" in target.name and "gate_up" not in target.name for target in planned.targets
    )


@pytest.mark.parametrize("name", ["mlp.gate", "gate", "mlp.gate.weight"])
def test_a_router_that_is_named_is_planned(name: str) -> None:
    targets = plan_lora(make_model("qwen3_moe"), LoRASpec(targets=[name])).targets
    assert [(target.family, target.in_features, target.out_features) for target in targets] == [
        ("router", 32, 4)
    ] * 2


@pytest.mark.parametrize("change", [{"dora": True}, {"init": "orthogonal"}])
def test_what_stacked_experts_have_not_is_refused(change: dict) -> None:
    with pytest.raises(ConfigError, match=r"stacked experts.*lora\.experts=false"):
        plan_lora(make_model("qwen3_moe"), LoRASpec(**change))
    plan_lora(make_model("qwen3_moe"), LoRASpec(**change, experts=False))


def test_all_problems_of_a_spec_come_in_one_report() -> None:
    with pytest.raises(ConfigError) as caught:
        LoRASpec(
            rank=0, alpha=-1, dropout=1.0, init="zero", dtype="int8", mlp="yes", targets="q_proj"
        )
    for word in ("rank", "alpha", "dropout", "init", "dtype", "mlp", "targets"):
        assert f"lora.{word}=" in str(caught.value)
