"""Targets are found by looking at the model; routers, heads and vision towers are told apart."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers
from tiny_models import make_model, tiny_config

from lorakit.errors import ConfigError
from lorakit.model.families import (
    find_targets,
    packing_is_doubtful,
    router_modules,
    row_sharing_problem,
)
from lorakit.model.load import _check_kept_in_float32, load_model, load_tokenizer


def leaves(family: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for target in find_targets(make_model(family)):
        found.setdefault(target.family, set()).add(
            target.parameter or target.module.rsplit(".", 1)[-1]
        )
    return found


def test_a_mixture_of_experts_has_attention_experts_router_and_head() -> None:
    assert leaves("qwen3_moe") == {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "experts": {"gate_up_proj", "down_proj"},
        "router": {"weight"},
        "unembedding": {"lm_head"},
    }


@pytest.mark.parametrize("family", ["qwen3", "llama", "mistral", "gemma2"])
def test_a_dense_model_has_attention_mlp_and_head(family: str) -> None:
    assert leaves(family) == {
        "attention": {"q_proj", "k_proj", "v_proj", "o_proj"},
        "mlp": {"gate_proj", "up_proj", "down_proj"},
        "unembedding": {"lm_head"},
    }


def test_the_shapes_are_those_of_the_matrices() -> None:
    targets = {
        target.name.split("layers.0.")[-1]: target
        for target in find_targets(make_model("qwen3_moe"))
    }
    shapes = {
        name: (t.num_experts, t.in_features, t.out_features)
        for name, t in targets.items()
        if "layers.1" not in name
    }
    assert shapes == {
        "self_attn.q_proj": (1, 32, 32),
        "self_attn.k_proj": (1, 32, 16),
        "self_attn.v_proj": (1, 32, 16),
        "self_attn.o_proj": (1, 32, 32),
        "mlp.experts.gate_up_proj": (4, 32, 48),
        "mlp.experts.down_proj": (4, 24, 32),
        "mlp.gate.weight": (1, 32, 4),
        "lm_head": (1, 32, 64),
    }


def test_gpt2_keeps_its_matrices_transposed_and_the_target_says_so() -> None:
    config = transformers.GPT2Config(
        vocab_size=64, n_embd=32, n_layer=1, n_head=4, bos_token_id=1, eos_token_id=2
    )
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config)
    target = next(target for target in find_targets(model) if target.name.endswith("c_attn"))
    assert (target.family, target.in_features, target.out_features) == ("attention", 32, 96)


def test_routers_are_listed_in_the_models_order() -> None:
    assert [name for name, _ in router_modules(make_model("qwen3_moe"))] == [
        "model.layers.0.mlp.gate",
        "model.layers.1.mlp.gate",
    ]
    assert router_modules(make_model("qwen3")) == []


def test_the_gates_of_a_shared_expert_are_routers_and_its_matrices_an_mlp() -> None:
    targets = {
        target.name.removeprefix("model.layers.1."): target.family
        for target in find_targets(make_model("qwen3_next"))
    }
    assert targets["mlp.shared_expert_gate"] == targets["mlp.gate.weight"] == "router"
    assert targets["mlp.shared_expert.gate_proj"] == "mlp"
    assert targets["mlp.experts.gate_up_proj"] == "experts"


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "llama", "mistral", "gemma2"])
def test_full_and_sliding_attention_can_be_packed(family: str) -> None:
    assert packing_is_doubtful(tiny_config(family)) is None


def test_linear_attention_cannot() -> None:
    assert "linear_attention" in str(packing_is_doubtful(tiny_config("qwen3_next")))


@pytest.mark.parametrize("name", ["OPT", "Bloom", "Mpt", "GptOss"])
def test_models_that_look_past_their_positions_cannot(name: str) -> None:
    config = getattr(transformers, f"{name}Config")()
    assert "does not isolate documents" in str(packing_is_doubtful(config))


def test_a_convolutions_kernel_is_no_stack_of_experts() -> None:
    model = make_model("qwen3_next")
    kernels = [
        name
        for name, parameter in model.named_parameters()
        if "conv1d" in name and parameter.ndim == 3
    ]
    assert kernels
    assert not {target.name for target in find_targets(model)} & {
        *kernels,
        *(name.removesuffix(".weight") for name in kernels),
    }


def test_a_folder_without_a_tokenizer_or_with_lost_tensors_is_refused(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    model = make_model("llama")
    model.save_pretrained(tmp_path)
    with pytest.raises(ConfigError, match="no tokenizer in this folder"):
        load_tokenizer(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    del tensors["model.layers.1.self_attn.q_proj.weight"]
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(
        ConfigError, match=r"1 tensors are not in its files.*layers\.1\.self_attn\.q_proj"
    ):
        load_model(str(tmp_path))


@pytest.mark.parametrize(
    ("family", "changes", "parts", "said"),
    [
        ("qwen3", {}, 3, "4 attention heads cannot be divided"),
        ("qwen3_next", {}, 2, "layers of type linear_attention"),
        ("mistral", {}, 2, "a window of 6 positions"),
        (
            "llama",
            {"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}},
            2,
            "change with the length",
        ),
        (
            "llama",
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}},
            2,
            None,
        ),
        ("qwen3_moe", {}, 4, None),
        ("mistral", {"sliding_window": 4096}, 2, None),
    ],
)
def test_rows_are_shared_only_where_nothing_depends_on_the_length_of_a_part(
    family: str, changes: dict[str, object], parts: int, said: str | None
) -> None:
    problem = row_sharing_problem(tiny_config(family, **changes), parts, max_tokens=1024)
    assert problem is None if said is None else said in str(problem)


def test_a_tensor_that_must_stay_float32_and_was_rounded_is_an_error() -> None:
    model = make_model("llama")
    model._keep_in_fp32_modules_strict = {"layers.*.mlp.up_proj"}
    _check_kept_in_float32(model, "it", "bfloat16")
    model.bfloat16()
    with pytest.raises(
        ConfigError, match=r"ZeRO-3 would round model.layers.0.mlp.up_proj.weight to bfloat16"
    ):
        _check_kept_in_float32(model, "it", "bfloat16")
