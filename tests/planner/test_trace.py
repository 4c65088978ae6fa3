"""A step without values: the same tensors come and go, and the same products are computed, as in
a step with values.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make_model
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM
from vision import make_vl_model

from lorakit.errors import ConfigError
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.loss import LOSSES
from lorakit.loss.logprobs import trust_head
from lorakit.model.layers import enable_checkpointing
from lorakit.planner.fake_images import SampleShapes
from lorakit.planner.memory import STRATEGIES, Settings, memory_of, rough_bound
from lorakit.planner.presets import preset_config
from lorakit.planner.trace import (
    ACTIVATIONS,
    StepShape,
    StepTrace,
    _Ledger,
    keeps_scores,
    trace_forward,
    trace_step,
)
from lorakit.training.step import compute_loss
from lorakit.types import Batch, Images

FAMILIES = ("qwen3_moe", "qwen3", "llama", "mistral", "gemma2")
adamw = functools.partial(torch.optim.AdamW, lr=1e-3)


def skeleton_of(model: Any) -> Any:
    return copy.deepcopy(model).to("meta")


def shape_of(rows: int = 2, positions: int = 48, **changes: Any) -> StepShape:
    return StepShape(
        num_rows=rows,
        num_positions=positions,
        dtype="float32",
        precision="32-true",
        device="cpu",
        **changes,
    )


def batch_of(rows: int, positions: int) -> Batch:
    tokens = torch.randint(3, 60, (rows, positions), generator=torch.Generator().manual_seed(0))
    return Batch(
        tokens,
        tokens.roll(-1),
        torch.ones(rows, positions),
        None,
        tuple((row, 0, positions) for row in range(rows)),
    )


@pytest.fixture(autouse=True)
def _only_padding_that_large_matrices_have(monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of small ones are padded by what the router chose, to save calls; which no plan
    knows.
    """
    monkeypatch.setattr("lorakit.lora.expert_function.RANGE_OPERATIONS", 0.0)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("is_tower_trained", [False, True])
def test_the_traced_peak_has_images_and_the_tower_in_it(
    is_tower_trained: bool, checkpointing: bool
) -> None:
    base, spec = make_vl_model(), LoRASpec(rank=4, vision=is_tower_trained, merger=is_tower_trained)
    seen = trace_step(
        skeleton_of(base),
        spec,
        shape_of(image_tokens=(24, 24, 24), checkpointing=checkpointing),
        adamw,
    )
    blind = trace_step(skeleton_of(base), spec, shape_of(checkpointing=checkpointing), adamw)
    evaluations = [
        trace_forward(skeleton_of(base), spec, shape)
        for shape in (shape_of(), shape_of(image_tokens=(24, 24, 24)))
    ]
    assert evaluations[1] > evaluations[0]
    model = inject(base, spec).train()
    if checkpointing:
        enable_checkpointing(model)
    trust_head(model)
    ledger, batch = _Ledger(), batch_of(2, 48)
    batch.input_ids.view(-1)[: 3 * 24] = base.config.image_token_id
    patches = torch.randn(3 * 24 * 4, 96, generator=torch.Generator().manual_seed(0))
    images = Images(patches, torch.tensor([[1, 2, 48]] * 3))
    batch = replace(batch, position_ids=torch.arange(48).expand(4, 2, 48), images=images)
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.add(tensor, "held")
    ledger.add(images.patches_PD, ACTIVATIONS)
    with ledger:
        compute_loss(model, batch, LOSSES["cross_entropy"]).loss_sum.backward()
    held = seen.activations + seen.head + seen.gradients
    # Experts are shared out evenly in a plan; of one layer alone that makes more of a difference.
    assert held == pytest.approx(
        ledger.peak - ledger.at_peak["held"], rel=0.15 if checkpointing else 0.05
    )
    assert seen.num_flops > 1.3 * blind.num_flops and seen.activations > blind.activations


@pytest.mark.parametrize("family", FAMILIES)
def test_the_traced_peak_is_that_of_real_tensors(family: str) -> None:
    """Counted on tensors with values; where experts' rows are cut otherwise, padding may differ
    a little.
    """
    base = make_model(family)
    traced = trace_step(skeleton_of(base), LoRASpec(rank=4), shape_of(), adamw)
    model = inject(base, LoRASpec(rank=4)).train()
    trust_head(model)
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.add(tensor, "held")
    with ledger:
        compute_loss(model, batch_of(2, 48), LOSSES["cross_entropy"]).loss_sum.backward()
    real = ledger.at_peak[ACTIVATIONS]  # the head's and the gradients too
    planned = traced.activations + traced.head + traced.gradients
    assert planned == pytest.approx(real, rel=0.05 if family == "qwen3_moe" else 0.01)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_evaluation_takes_what_real_tensors_take(family: str) -> None:
    base = make_model(family)
    planned = trace_forward(skeleton_of(base), LoRASpec(rank=4), shape_of(6, 48))
    model = inject(base, LoRASpec(rank=4)).eval()
    trust_head(model)
    ledger = _Ledger()
    for tensor in (*model.parameters(), *model.buffers()):
        ledger.add(tensor, "held")
    before = sum(ledger.live.values())
    with torch.no_grad(), ledger:
        compute_loss(model, batch_of(6, 48), LOSSES["cross_entropy"])
    # experts are shared out evenly; a window brings a mask
    assert planned == pytest.approx(ledger.peak - before, rel=0.1)


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2"])
def test_operations_are_those_that_torch_counts(family: str) -> None:
    base = make_model(family)
    base.set_attn_implementation("eager")  # torch has no formula for its own attention on a CPU
    traced = trace_step(skeleton_of(base), LoRASpec(rank=4), shape_of(attention="eager"), adamw)
    model = inject(base, LoRASpec(rank=4)).train()
    trust_head(model)
    # else rotary tables are made for one row
    batch = replace(batch_of(2, 48), position_ids=torch.arange(48).expand(2, 48))
    with FlopCounterMode(display=False) as counter:
        compute_loss(model, batch, LOSSES["cross_entropy"]).loss_sum.backward()
    assert traced.num_flops == counter.get_total_flops()


def test_attention_counts_as_by_hand() -> None:
    base = make_model("llama")
    flops = [
        trace_step(skeleton_of(base), LoRASpec(rank=4), shape_of(1, length), adamw).num_flops
        for length in (64, 128, 256)
    ]
    # What grows with the square: 2 layers, 4 heads of width 8; two products forward, five backward.
    square = 2 * 4 * 7 * 2 * 8
    second_difference = flops[2] - 2 * flops[1] - (flops[1] - 2 * flops[0]) * 2
    assert second_difference == square * (256**2 - 2 * 128**2 - 2 * (128**2 - 2 * 64**2))


def test_checkpointing_lowers_the_peak_and_adds_operations() -> None:
    skeleton = skeleton_of(make_model("llama"))
    kept, again = (
        trace_step(skeleton, LoRASpec(rank=4), shape_of(4, 64, checkpointing=checkpointing), adamw)
        for checkpointing in (False, True)
    )
    assert again.activations < kept.activations and again.num_flops > kept.num_flops
    assert (again.weights, again.num_params) == (kept.weights, kept.num_params)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("positions", [16, 200])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.slow)])
def test_the_rough_bound_holds(
    family: str, positions: int, checkpointing: bool, device: str
) -> None:
    skeleton = skeleton_of(make_model(family))
    shape = replace(shape_of(3, positions, checkpointing=checkpointing), device=device)
    traced = trace_step(skeleton, LoRASpec(rank=8), shape, adamw)
    bound = rough_bound(
        skeleton,
        traced.num_params,
        num_tokens=3 * positions,
        num_positions=positions,
        bytes_each=4,
        checkpointing=checkpointing,
        keeps_scores=keeps_scores(skeleton, shape),
    )
    is_cuda = device == "cuda"
    assert bound > memory_of("single", 1, traced, Settings(accumulates=True, is_cuda=is_cuda)).total


@pytest.mark.parametrize("checkpointing", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_model_of_135_million_parameters_on_24_gb_needs_no_trace(checkpointing: bool) -> None:
    """The shapes of SmolLM2-135M, two rows of 1,024 tokens, which take a tenth of the memory."""
    config = LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        num_attention_heads=9,
        num_key_value_heads=3,
        vocab_size=49152,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        skeleton = LlamaForCausalLM(config)
    shape = shape_of(2, 1024, checkpointing=checkpointing)
    traced = trace_step(skeleton, LoRASpec(rank=16), shape, adamw)
    taken = memory_of("single", 1, traced, Settings(accumulates=True, is_cuda=False)).total
    bound = rough_bound(
        skeleton,
        traced.num_params,
        num_tokens=2048,
        num_positions=1024,
        bytes_each=4,
        checkpointing=checkpointing,
    )
    assert taken < bound < 9 * taken  # so what takes a tenth of the memory is below 90 %


def test_the_optimizers_own_state_is_counted() -> None:
    skeleton = skeleton_of(make_model("llama"))
    states = {}
    for name, make in {
        "sgd": functools.partial(torch.optim.SGD, lr=0.1),
        "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9),
        "adamw": adamw,
    }.items():
        found = trace_step(skeleton, LoRASpec(rank=4), shape_of(), make)
        states[name] = round(found.optimizer / found.adapter, 1)
    assert states == {"sgd": 0.0, "momentum": 1.0, "adamw": 2.0}


def test_a_model_that_depends_on_values_is_said_so() -> None:
    model = make_model("llama")
    forward = type(model).forward

    class Strange(type(model)):
        def forward(self, input_ids: Any = None, **kwargs: Any) -> Any:
            if input_ids.sum() > 0:
                return forward(self, input_ids=input_ids, **kwargs)
            return forward(self, input_ids=input_ids + 1, **kwargs)

    model.__class__ = Strange
    with pytest.raises(ConfigError, match="depends on values"):
        trace_step(skeleton_of(model), LoRASpec(rank=4), shape_of(), adamw)


@pytest.mark.parametrize(
    ("family", "changes"),
    [
        ("llama", {"dropout": 0.1, "unembedding": True}),
        ("llama", {"dora": True}),
        ("qwen3_moe", {"dropout": 0.1}),
        ("qwen3_moe", {"expert_layout": "shared_outer", "unembedding": True}),
        ("qwen3_moe", {"experts": False}),
    ],
)
@pytest.mark.parametrize(
    ("dtype", "precision"),
    [("float32", "32-true"), ("bfloat16", "bf16-mixed"), ("float16", "16-mixed")],
)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_kind_of_adapter_can_be_planned(
    family: str, changes: dict[str, Any], dtype: str, precision: str, device: str
) -> None:
    shape = StepShape(num_rows=2, num_positions=32, dtype=dtype, precision=precision, device=device)
    found = trace_step(skeleton_of(make_model(family)), LoRASpec(rank=4, **changes), shape, adamw)
    assert found.activations > 0 and found.optimizer == pytest.approx(2 * found.adapter, rel=0.05)


def test_tracing_leaves_the_skeleton_as_it_was() -> None:
    skeleton = skeleton_of(make_model("qwen3_moe"))
    before = [(name, p.shape, p.device.type) for name, p in skeleton.named_parameters()]
    trace_step(skeleton, LoRASpec(rank=4), shape_of(), adamw)
    assert [(name, p.shape, p.device.type) for name, p in skeleton.named_parameters()] == before
    assert "lora" not in str(skeleton).lower()


@pytest.fixture(scope="module")
def named() -> StepTrace:
    """A step of Qwen3-VL-30B-A3B as its preset has it."""
    from lorakit.model.load import model_class

    config = preset_config("Qwen/Qwen3-VL-30B-A3B-Instruct")
    with torch.device("meta"):
        skeleton = model_class(config).from_config(config)
    shape = StepShape(
        num_rows=1,
        num_positions=4096,
        dtype="bfloat16",
        precision="bf16-mixed",
        device="cuda",
        checkpointing=True,
    )
    return trace_step(skeleton, LoRASpec(rank=8, expert_layout="shared_outer"), shape, adamw)


def test_the_named_model_fits_a_gpu_of_80_gb(named: StepTrace) -> None:
    assert named.num_base_params == 31_070_754_032  # as the hub says: 31B
    assert named.num_params == 122_290_176  # by hand in tests/lora/test_named_models.py
    settings = Settings(accumulates=True, is_cuda=True)
    totals = {name: memory_of(name, 8, named, settings).total / 1e9 for name in STRATEGIES}
    assert 62.1 + 0.5 + 0.5 < totals["single"] < 72
    assert totals["zero3"] < totals["zero2"] < totals["zero1"] < totals["ddp"]


def test_zero_shares_out_what_it_says(named: StepTrace) -> None:
    settings = Settings(accumulates=True, is_cuda=True)
    one, eight = (memory_of("zero2", count, named, settings) for count in (1, 8))
    assert eight.optimizer == pytest.approx(
        one.optimizer / 8, abs=1
    ) and eight.gradients == pytest.approx(one.gradients / 8, abs=1)
    assert eight.weights == one.weights and eight.activations == one.activations
    assert memory_of("zero3", 8, named, settings).weights == pytest.approx(one.weights / 8, abs=1)


def test_processes_that_share_rows_compute_as_much_for_a_token_and_hold_their_share() -> None:
    skeleton, spec = skeleton_of(make_model("llama")), LoRASpec(rank=4)
    whole, part = (
        trace_step(skeleton, spec, shape_of(1, 128), adamw),
        trace_step(skeleton, spec, shape_of(1, 64, sp_size=2), adamw),
    )
    assert part.num_flops / part.num_tokens == pytest.approx(whole.num_flops / whole.num_tokens)
    assert part.activations == pytest.approx(whole.activations / 2, rel=0.05)


def test_a_row_is_as_full_of_images_as_the_rows_were() -> None:
    assert SampleShapes(1000, 600, 0.99).images_in(1, 1000) == (600, 390)
    assert SampleShapes(None, 1024, 1.0).images_in(2, 4096) == (1024,) * 8
    assert SampleShapes(50, 64, 0.2).images_in(3, 50) == (50,) * 3  # at least one whole
    assert SampleShapes(1000).images_in(4, 1000) == ()
