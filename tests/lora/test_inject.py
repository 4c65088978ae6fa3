"""After injection exactly the planned adapters are trainable, and the model computes what it
did.
"""

from __future__ import annotations

from typing import Any

import peft
import pytest
import torch
from tiny_models import make_model, plain_peft_config, randomise, relative_l2, trainable

from lorakit.lora.inject import inject
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapter_state
from lorakit.model.load import load_model

INPUT_IDS = torch.tensor([[3, 8, 44, 16, 23, 42, 50, 6, 19]])


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=INPUT_IDS, use_cache=False).logits


def largest_difference(ours: torch.Tensor, theirs: torch.Tensor) -> float:
    """As a share of the largest logit: products in another order round otherwise."""
    return float((ours - theirs).abs().max() / theirs.abs().max())


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "llama"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_only_lora_is_trainable_in_float32_and_the_logits_are_the_bases(
    family: str, dtype: str
) -> None:
    base = make_model(family, dtype)
    before = logits(base)
    model = inject(base, LoRASpec(rank=4, unembedding=True))
    own = {
        name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad
    }
    assert own
    assert all("lora_A" in name or "lora_B" in name for name in own)
    assert {name for name, _ in model.named_parameters() if "lora_" in name} == own.keys()
    assert {parameter.dtype for parameter in own.values()} == {torch.float32}
    assert (
        sum(parameter.numel() for parameter in own.values())
        == plan_lora(make_model(family), LoRASpec(rank=4, unembedding=True)).num_params
    )
    assert (
        max(parameter.abs().max().item() for name, parameter in own.items() if "lora_B" in name)
        == 0
    )
    assert (
        min(parameter.abs().max().item() for name, parameter in own.items() if "lora_A" in name) > 0
    )
    # bf16 may round at each product
    assert largest_difference(logits(model), before) < (2e-6 if dtype == "float32" else 0.02)
    assert largest_difference(logits(randomise(model)), before) > (
        1e-3 if dtype == "float32" else 0.02
    )


def test_the_bundled_model_computes_what_it_did() -> None:
    base = load_model("tiny")
    before = logits(base)
    assert largest_difference(logits(inject(base, LoRASpec(rank=8))), before) < 2e-6


def test_lora_dtype_changes_the_adapter_alone() -> None:
    model = inject(make_model("llama"), LoRASpec(rank=4, dtype="bfloat16"))
    assert {parameter.dtype for parameter in trainable(model).values()} == {torch.bfloat16}
    assert {p.dtype for name, p in model.named_parameters() if "lora_" not in name} == {
        torch.float32
    }


def test_the_global_random_state_is_untouched_and_the_seed_decides() -> None:
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = trainable(inject(make_model(), LoRASpec(rank=4, seed=3)))
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    second = trainable(inject(make_model(), LoRASpec(rank=4, seed=3)))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert relative_l2(trainable(inject(make_model(), LoRASpec(rank=4, seed=4))), first) > 0.1


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen3", "qwen3_vl_moe", "qwen3_5_moe"])
def test_state_and_logits_are_those_of_plain_peft(family: str) -> None:
    theirs = randomise(peft.get_peft_model(make_model(family), plain_peft_config(family)))
    ours = randomise(inject(make_model(family), LoRASpec(rank=4, alpha=8)))
    expected = peft.get_peft_model_state_dict(theirs)
    assert adapter_state(ours).keys() == expected.keys()
    assert all(torch.equal(adapter_state(ours)[name], expected[name]) for name in expected)
    torch.testing.assert_close(logits(ours), logits(theirs), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("targets", "wrapped"),
    [(["q_proj"], False), (["experts"], False), (["mlp.gate", "q_proj"], True)],
)
def test_the_router_is_wrapped_only_when_named(targets: list[str], wrapped: bool) -> None:
    names = trainable(inject(make_model(), LoRASpec(rank=4, targets=targets)))
    assert any("mlp.gate." in name for name in names) is wrapped


def test_a_wrapped_router_changes_the_routing() -> None:
    model = inject(make_model(), LoRASpec(rank=4, targets=["mlp.gate"]))
    before = logits(model)
    assert not torch.allclose(logits(randomise(model, std=1.0)), before, atol=1e-3)


def test_a_pattern_over_one_layer_wraps_that_layer_alone() -> None:
    model = inject(make_model("llama"), LoRASpec(rank=4, targets=["*.layers.1.*"]))
    assert all(".layers.1." in name for name in trainable(model))
    assert len(trainable(model)) == 2 * 7


def test_lora_on_a_tied_unembedding_adapts_the_output_alone() -> None:
    base = make_model("qwen3")
    assert plan_lora(base, LoRASpec()).is_tied
    embedded, before = base.get_input_embeddings()(INPUT_IDS).clone(), logits(base)
    hidden = base.model(input_ids=INPUT_IDS).last_hidden_state
    model = randomise(inject(base, LoRASpec(rank=4, alpha=4, targets=["lm_head"])))
    assert len(trainable(model)) == 2
    assert torch.equal(model.get_input_embeddings()(INPUT_IDS), embedded)
    down, up = (tensor for _, tensor in sorted(trainable(model).items()))
    torch.testing.assert_close(logits(model), before + hidden @ down.T @ up.T, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("change", "scale"), [({}, 2.0), ({"rslora": True}, 4.0)])
def test_the_output_is_scaled_by_alpha_over_rank_or_its_root(change: dict, scale: float) -> None:
    base = make_model("llama")
    hidden, before = base.model(input_ids=INPUT_IDS).last_hidden_state, logits(base)
    model = randomise(inject(base, LoRASpec(rank=4, alpha=8, targets=["lm_head"], **change)))
    down, up = (tensor for _, tensor in sorted(trainable(model).items()))
    torch.testing.assert_close(
        logits(model), before + scale * hidden @ down.T @ up.T, atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("change", [{"dora": True}, {"init": "gaussian"}])
def test_variants_of_peft_start_at_the_base_too(change: dict) -> None:
    base = make_model("llama")
    before = logits(base)
    torch.testing.assert_close(
        logits(inject(base, LoRASpec(rank=4, **change))), before, atol=1e-5, rtol=1e-5
    )


def test_the_config_names_the_base_it_was_given() -> None:
    model = inject(make_model(), LoRASpec(rank=4), base_name="some/base")
    assert model.peft_config["default"].base_model_name_or_path == "some/base"


@pytest.mark.parametrize("family", ["llama", "qwen3_moe"])
def test_the_adapter_is_drawn_on_the_cpu_in_float32_whatever_the_default_device_and_the_base(
    family: str,
) -> None:
    """Lightning makes the GPU the default device while a model is built; ZeRO-3 does not."""
    expected = inject(make_model(family), LoRASpec(rank=4)).state_dict()
    with torch.device("meta"):
        elsewhere = inject(make_model_on_cpu(family), LoRASpec(rank=4)).state_dict()
    rounded = inject(make_model(family).bfloat16(), LoRASpec(rank=4)).state_dict()
    for name in (name for name in expected if "lora_" in name):
        assert torch.equal(elsewhere[name], expected[name])
        torch.testing.assert_close(rounded[name], expected[name], atol=0, rtol=2**-8)


def make_model_on_cpu(family: str) -> Any:
    with torch.device("cpu"):
        return make_model(family)


def test_random_numbers_of_gpus_are_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each process has started its own, from which its dropout is drawn."""
    seeds: list[int] = []
    monkeypatch.setattr(torch.cuda, "manual_seed_all", seeds.append)
    inject(make_model("llama"), LoRASpec(rank=4, seed=3))
    assert seeds == []
    torch.manual_seed(3)  # what it would have done
    assert seeds == [3]
