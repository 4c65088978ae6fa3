"""The factored experts as a PEFT layer: on, off, several, saved, read back, expanded."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import gradients, make_model, randomise, relative_l2, trainable

from lorakit.lora.experts import ExpertLora
from lorakit.lora.inject import inject, to_peft_config
from lorakit.lora.plan import plan_lora
from lorakit.lora.spec import LoRASpec
from lorakit.weights.adapter import AdapterFiles, save_adapter, start_from
from lorakit.weights.export import write_peft
from lorakit.weights.merge import MergeReport, attach, merge_into

INPUT_IDS = torch.tensor([[3, 8, 44, 16, 23, 42, 50, 6, 19]])
SPEC = LoRASpec(rank=3, alpha=8)
SHARED = replace(SPEC, expert_layout="shared_outer")


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=INPUT_IDS, use_cache=False).logits


def close(ours: torch.Tensor, theirs: torch.Tensor) -> bool:
    return bool(torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5))


def layers(model: Any) -> list[ExpertLora]:
    return [module for module in model.modules() if isinstance(module, ExpertLora)]


def test_peft_switches_the_adapter_off_and_on_and_takes_it_off() -> None:
    base = logits(make_model())
    model = randomise(inject(make_model(), SPEC))
    adapted = logits(model)
    assert not close(adapted, base)
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    assert torch.equal(logits(model), adapted)
    assert torch.equal(logits(model.unload()), base)


def test_peft_rescales_experts_as_it_does_its_own_layers() -> None:
    ours = randomise(inject(make_model(), SPEC))
    theirs = randomise(peft.get_peft_model(make_model(), _plain_config(SPEC)))
    before = logits(ours)
    for model in (ours, theirs):
        model.eval()
    with (
        peft.helpers.rescale_adapter_scale(ours, 0.3),
        peft.helpers.rescale_adapter_scale(theirs, 0.3),
    ):
        assert close(logits(ours), logits(theirs)) and not close(logits(ours), before)
    assert close(logits(ours), before)


def test_peft_merges_and_unmerges() -> None:
    model = randomise(inject(make_model(), SHARED))
    adapted = logits(model)
    model.merge_adapter()
    assert close(logits(model), adapted)
    model.unmerge_adapter()
    assert close(logits(model), adapted)
    assert close(logits(model.merge_and_unload()), adapted)


def test_adapters_on_one_base_differ_in_rank_targets_and_layout() -> None:
    """PEFT's own layers demand equal targets."""
    specs = {
        "one": SPEC,
        "two": replace(SHARED, rank=5, alpha=3),
        "three": replace(SPEC, targets=["experts.down_proj"]),
    }
    alone = {
        name: logits(randomise(inject(make_model(), spec), seed=len(name)))
        for name, spec in specs.items()
    }
    model = inject(make_model(), specs["one"], adapter_name="one")
    for name in ("two", "three"):
        model.add_adapter(name, to_peft_config(plan_lora(make_model(), specs[name])))
    for name in specs:
        model.set_adapter(name)
        randomise(model, seed=len(name))
    for name, spec in specs.items():
        model.set_adapter(name)
        assert close(logits(model), alone[name])
        assert (
            sum(p.numel() for p in model.parameters() if p.requires_grad)
            == plan_lora(make_model(), spec).num_params
        )
    model.base_model.set_adapter(["one", "two"])
    both = logits(model)
    assert not close(both, alone["one"]) and not close(both, alone["two"])
    assert close(logits(_sum_of(specs, ("one", "two"))), both)
    model.set_adapter("three")
    model.delete_adapter("two")
    assert all("two" not in layer.scales for layer in layers(model)) and close(
        logits(model), alone["three"]
    )


def _sum_of(specs: dict[str, LoRASpec], names: tuple[str, ...]) -> Any:
    """The base with the sum of the adapters' changes in its matrices."""
    merged = make_model()
    original = {name: p.clone() for name, p in merged.named_parameters()}
    for name in names:
        changed = merge_into(
            randomise(inject(make_model(), specs[name]), seed=len(name)), MergeReport()
        )
        for (key, mine), theirs in zip(
            merged.named_parameters(), changed.parameters(), strict=True
        ):
            mine.data += theirs - original[key]
    return merged


def test_what_peft_saves_plain_peft_loads(tmp_path: Path) -> None:
    model = randomise(inject(make_model(), replace(SPEC, dropout=0.1)))
    model.save_pretrained(tmp_path)
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path)
    # plain PEFT indeed
    assert type(loaded.base_model.model.model.layers[0].mlp.experts).__name__ == "ParamWrapper"
    assert close(logits(loaded), logits(model))


def test_peft_loads_a_second_adapter_into_our_layers(tmp_path: Path) -> None:
    first, second = (
        randomise(inject(make_model(), SPEC), seed=1),
        randomise(inject(make_model(), SPEC), seed=2),
    )
    second.save_pretrained(tmp_path)
    first.add_adapter("second", to_peft_config(plan_lora(make_model(), SPEC)))
    peft.set_peft_model_state_dict(
        first, load_file(tmp_path / "adapter_model.safetensors"), adapter_name="second"
    )
    first.set_adapter("second")
    assert close(logits(first), logits(second))


def test_a_file_of_another_number_of_experts_is_told_by_name(tmp_path: Path) -> None:
    model = inject(make_model(), SPEC)
    model.save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    name = next(name for name in tensors if "experts.lora_A" in name)
    tensors[name] = tensors[name][:-1]
    with pytest.raises(
        RuntimeError,
        match=r"layers\.0\.mlp\.experts.* lora_A has 11 rows, which is no multiple of 4 experts",
    ):
        peft.set_peft_model_state_dict(model, tensors)


@pytest.mark.parametrize(
    "spec", [SPEC, replace(SPEC, targets=["experts.gate_up_proj"]), replace(SPEC, rslora=True)]
)
def test_gradients_are_those_of_plain_peft(spec: LoRASpec) -> None:
    ours = randomise(inject(make_model(), spec))
    theirs = randomise(peft.get_peft_model(make_model(), _plain_config(spec)))
    for model in (ours, theirs):
        model(input_ids=INPUT_IDS, use_cache=False).logits.square().sum().backward()
    found, expected = gradients(ours), gradients(theirs)
    if spec.targets:  # one stack alone is not nested
        found = {name.replace(".base_layer", ""): tensor for name, tensor in found.items()}
    assert relative_l2(found, expected) < 1e-5


def _plain_config(spec: LoRASpec) -> peft.LoraConfig:
    """The same adapter for PEFT's own layers."""
    names = ("r", "lora_alpha", "target_modules", "target_parameters", "use_rslora", "task_type")
    settings = to_peft_config(plan_lora(make_model(), spec)).to_dict()
    return peft.LoraConfig(**{name: settings[name] for name in names})


@pytest.mark.parametrize("rslora", [False, True])
def test_a_shared_outer_adapter_is_saved_compact_and_expands_exactly(
    rslora: bool, tmp_path: Path
) -> None:
    model = randomise(inject(make_model(), replace(SHARED, rslora=rslora), base_name="some/base"))
    (tmp_path / "compact").mkdir()
    (tmp_path / "peft").mkdir()
    save_adapter(model, tmp_path / "compact")
    tensors = load_file(tmp_path / "compact/adapter_model.safetensors")
    prefix = "base_model.model.model.layers.1.mlp.experts."
    shapes = {
        name.removeprefix(prefix): tuple(t.shape)
        for name, t in tensors.items()
        if name.startswith(prefix)
    }
    # the contract of SGLang: one entry where the factor touches the hidden width
    assert shapes == {
        "gate_proj.lora_A.weight": (1, 3, 32),
        "gate_proj.lora_B.weight": (4, 24, 3),
        "up_proj.lora_A.weight": (1, 3, 32),
        "up_proj.lora_B.weight": (4, 24, 3),
        "down_proj.lora_A.weight": (4, 3, 24),
        "down_proj.lora_B.weight": (1, 32, 3),
    }
    planned = plan_lora(make_model(), SHARED)
    assert sum(t.numel() for t in tensors.values()) == planned.num_params
    assert close(logits(attach(make_model(), tmp_path / "compact")), logits(model))
    write_peft(AdapterFiles.open(tmp_path / "compact"), make_model(), tmp_path / "peft")
    expanded = load_file(tmp_path / "peft/adapter_model.safetensors")
    assert sum(t.numel() for t in expanded.values()) == planned.num_peft_params
    loaded = peft.PeftModel.from_pretrained(make_model(), tmp_path / "peft")
    assert close(logits(loaded), logits(model)) and not close(logits(model), logits(make_model()))
    # rank_pattern in our own layer too
    assert close(logits(attach(make_model(), tmp_path / "peft")), logits(model))


def test_files_with_the_names_of_tinkers_archives_are_read(tmp_path: Path) -> None:
    model = randomise(inject(make_model(), SHARED, base_name="some/base"))
    save_adapter(model, tmp_path)
    file, names = (
        tmp_path / "adapter_model.safetensors",
        {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"},
    )
    tensors = load_file(file)
    for ours, theirs in names.items():
        tensors = {
            name.replace(f".experts.{ours}.", f".experts.{theirs}."): tensor
            for name, tensor in tensors.items()
        }
    save_file(tensors, file)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    config["target_modules"] = sorted({names.get(name, name) for name in config["target_modules"]})
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    assert close(logits(attach(make_model(), tmp_path)), logits(model))
    again = inject(make_model(), SHARED)
    start_from(again, replace(SHARED, init_from=str(tmp_path)), base="some/base")
    assert close(logits(again), logits(model))


def test_a_file_of_sglangs_contract_written_by_hand_means_what_it_says(tmp_path: Path) -> None:
    """gate, up and down with one entry where the factor touches the hidden width; the matrices
    are changed by hand beside it.
    """
    generator, rank, scale = torch.Generator().manual_seed(0), 3, 8 / 3
    tensors, by_hand = {}, make_model()
    for number, layer in enumerate(by_hand.model.layers):
        prefix = f"base_model.model.model.layers.{number}.mlp.experts."

        def draw(name: str, *shape: int, prefix: str = prefix) -> torch.Tensor:
            tensors[prefix + name] = torch.randn(shape, generator=generator) * 0.1
            return tensors[prefix + name]

        experts = layer.mlp.experts
        for name, rows in (("gate_proj", slice(0, 24)), ("up_proj", slice(24, 48))):
            a, b = (
                draw(f"{name}.lora_A.weight", 1, rank, 32),
                draw(f"{name}.lora_B.weight", 4, 24, rank),
            )
            for expert in range(4):
                experts.gate_up_proj.data[expert, rows] += scale * b[expert] @ a[0]
        a, b = (
            draw("down_proj.lora_A.weight", 4, rank, 24),
            draw("down_proj.lora_B.weight", 1, 32, rank),
        )
        for expert in range(4):
            experts.down_proj.data[expert] += scale * b[0] @ a[expert]
    # for its config
    save_adapter(
        inject(make_model(), replace(SHARED, targets=["experts"]), base_name="some/base"), tmp_path
    )
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    assert close(logits(attach(make_model(), tmp_path)), logits(by_hand))
    assert not close(logits(by_hand), logits(make_model()))


def test_trained_tensors_and_optimiser_state_exist_once() -> None:
    model = randomise(inject(make_model(), SHARED))
    parameters = [p for p in model.parameters() if p.requires_grad]
    assert sum(p.numel() for p in parameters) == plan_lora(make_model(), SHARED).num_params
    optimizer = torch.optim.AdamW(parameters)
    model.train()(input_ids=INPUT_IDS, use_cache=False).logits.square().sum().backward()
    optimizer.step()
    moments = sum(
        state["exp_avg"].numel() + state["exp_avg_sq"].numel() for state in optimizer.state.values()
    )
    assert moments == 2 * plan_lora(make_model(), SHARED).num_params


@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_activation_checkpointing_changes_nothing_dropout_included(spec: LoRASpec) -> None:
    found = []
    for checkpointing in (False, True):
        model = randomise(inject(make_model(), replace(spec, dropout=0.3))).train()
        if checkpointing:
            base = model.get_base_model()
            getattr(base, "activation_checkpointing_enable", base.gradient_checkpointing_enable)(
                {"use_reentrant": False}
            )
        torch.manual_seed(7)
        model(input_ids=INPUT_IDS, use_cache=False).logits.square().sum().backward()
        found.append(gradients(model))
    assert relative_l2(found[1], found[0]) < 1e-6


def _alone(spec: LoRASpec, **changes: Any) -> tuple[ExpertLora, tuple[Any, ...]]:
    """The first layer of experts in float64, and what it is called with."""
    model = randomise(inject(make_model(), replace(spec, **changes))).double()
    x = torch.randn(
        6, 32, dtype=torch.float64, generator=torch.Generator().manual_seed(0)
    ).requires_grad_()
    return layers(model)[0], (
        x,
        torch.tensor([[0, 1], [2, 3]] * 3),
        torch.full((6, 2), 0.5, dtype=torch.float64),
    )


@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_dropout_has_the_gradient_of_finite_differences(spec: LoRASpec) -> None:
    layer, (x, experts, weights) = _alone(spec, dropout=0.5, targets=["experts"])
    exact = layer.eval()(x, experts, weights).detach()
    layer.train()

    def with_seed(x: torch.Tensor, *factors: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return layer(x, experts, weights)

    assert not torch.allclose(with_seed(x), exact, atol=1e-3)
    first = [p for name, p in layer.named_parameters() if "lora_" in name]
    assert torch.autograd.gradcheck(with_seed, (x, *first), eps=1e-6, atol=1e-6, fast_mode=True)


@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_dropout_is_right_on_average(spec: LoRASpec) -> None:
    """On the way out the output is linear in what is dropped, so that its mean is the output
    without dropout.
    """
    layer, inputs = _alone(spec, dropout=0.3, targets=["experts.down_proj"])
    with torch.no_grad():
        exact = layer.eval()(*inputs)
        without = layer.train() and torch.stack([layer(*inputs) for _ in range(3000)])
    error = (without.mean(dim=0) - exact) / (without.std(dim=0) / 3000**0.5)
    assert float(error.abs().max()) < 5  # of a standard error, over 192 numbers
    assert float(without.std(dim=0).min()) > 0


def test_routers_that_score_all_experts_alike_choose_as_in_plain_peft() -> None:
    found = []
    for wrap in (
        lambda model: inject(model, SPEC),
        lambda model: peft.get_peft_model(model, _plain_config(SPEC)),
    ):
        model = make_model()
        for layer in model.model.layers:
            torch.nn.init.zeros_(layer.mlp.gate.weight)
        model = randomise(wrap(model))
        output = model(input_ids=INPUT_IDS, use_cache=False).logits
        output.square().sum().backward()
        found.append((output.detach(), gradients(model)))
    assert close(found[0][0], found[1][0])
    assert relative_l2(found[0][1], found[1][1]) < 1e-5


def test_two_adapters_at_once_have_the_gradients_of_their_sum() -> None:
    _, inputs = _alone(SPEC)
    model = inject(make_model(), replace(SPEC, targets=["experts"]), adapter_name="one")
    model.add_adapter(
        "two", to_peft_config(plan_lora(make_model(), replace(SHARED, rank=5, targets=["experts"])))
    )
    for name in ("one", "two"):
        model.set_adapter(name)
        randomise(model, seed=len(name))
    model = model.double()
    layer = layers(model)[0]
    named = {name: p for name, p in layer.named_parameters() if "lora_" in name}
    found = {}
    for active in (["one"], ["two"], ["one", "two"]):
        model.base_model.set_adapter(active)
        for p in named.values():
            p.requires_grad_(True)
        found[tuple(active)] = layer(*inputs)
    both = found["one", "two"]
    difference = torch.autograd.gradcheck(
        lambda *factors: layer(*inputs), tuple(named.values()), eps=1e-6, atol=1e-6, fast_mode=True
    )
    assert (
        difference
        and not torch.allclose(both, found["one",])
        and not torch.allclose(both, found["two",])
    )


@pytest.mark.parametrize("spec", [SPEC, SHARED])
def test_autocast_and_bf16_stay_near_float32(spec: LoRASpec) -> None:
    exact = gradients_of(randomise(inject(make_model(), spec)))
    half = randomise(inject(make_model(dtype="bfloat16"), spec))
    assert {p.dtype for p in half.parameters() if p.requires_grad} == {torch.float32}
    assert relative_l2(gradients_of(half), exact) < 0.1
    with torch.autocast("cpu", torch.bfloat16):
        assert relative_l2(gradients_of(randomise(inject(make_model(), spec))), exact) < 0.1


def gradients_of(model: Any) -> dict[str, torch.Tensor]:
    model.train()(input_ids=INPUT_IDS, use_cache=False).logits.float().square().mean().backward()
    return gradients(model)


def test_a_checkpoint_of_a_run_holds_the_factors_by_their_own_names() -> None:
    names = {
        name.rpartition("experts.")[2]
        for name, _ in inject(make_model(), SHARED).named_parameters()
        if "experts.lora" in name
    }
    assert names == {
        f"lora_{w}.default.{m}" for w in "AB" for m in ("gate_proj", "up_proj", "down_proj")
    }
    assert len(trainable(inject(make_model(), SHARED))) == 2 * (6 + 8)
