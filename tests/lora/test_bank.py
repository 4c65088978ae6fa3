"""Adapters of several ranks on one base, in one pass, are what PEFT computes for each of them
alone.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from tiny_models import make_datums, make_model

from lorakit.data.batch.collate import collate, join
from lorakit.errors import AdapterError, ConfigError
from lorakit.lora.adapter_batch import Adapter, AdapterBatch
from lorakit.lora.bank import AdapterBank
from lorakit.lora.expert_function import ExpertCall
from lorakit.lora.flat_parameters import FlatParameters, plan_layout
from lorakit.lora.grouped import AdapterIds
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.lora.state import adapter_state, load_adapter_state
from lorakit.loss import LOSSES
from lorakit.loss.head import as_head_adapters
from lorakit.training.step import MicroBatch, compute_loss, compute_losses
from lorakit.types import Batch, LossOutput

CROSS_ENTROPY = LOSSES["cross_entropy"]
CASES = [
    ("qwen3_moe", "per_expert", False),
    ("qwen3_moe", "per_expert", True),
    ("qwen3_moe", "shared_outer", False),
    ("qwen3", "per_expert", True),
    ("llama", "per_expert", False),
]


SORTED = pytest.mark.parametrize("is_sorted", [False, True])


def random_vector(layout: FlatParameters, seed: int) -> torch.Tensor:
    return torch.randn(layout.num_params, generator=torch.Generator().manual_seed(seed)) * 0.05


def run_mixed(
    model: Any,
    bank: AdapterBank,
    adapters: list[Adapter | None],
    batches: list[Batch],
    *,
    is_sorted: bool = False,
) -> list[LossOutput]:
    joined = join(batches, 0)
    rows = [number for number, batch in enumerate(batches) for _ in range(len(batch.input_ids))]
    adapter_ids = torch.tensor(rows).repeat_interleave(joined.input_ids.shape[1])
    shares, adapter_batch = (
        [MicroBatch(batch, CROSS_ENTROPY) for batch in batches],
        AdapterBatch(adapters, adapter_ids, is_sorted=is_sorted),
    )
    with bank.active(adapter_batch):
        outputs = compute_losses(
            model, joined, shares, as_head_adapters(bank.on_head(adapter_batch, torch.float32))
        )
        torch.stack([output.loss_sum for output in outputs]).sum().backward()
    return outputs


def file_gradients(adapter: Adapter) -> dict[str, torch.Tensor]:
    vector = torch.cat([leaf.grad.flatten() for leaf in adapter.leaves if leaf.grad is not None])
    return adapter.layout.file_tensors(vector)


@pytest.mark.parametrize(
    ("is_sorted", "pays", "rows"),
    [
        (False, False, (3, 3, 3)),
        (True, False, (3, 3, 3)),
        (True, True, (3, 3, 3)),
        (True, True, (1, 4, 2)),
    ],
)
@pytest.mark.parametrize(("family", "expert_layout", "unembedding"), CASES)
def test_a_mix_of_ranks_equals_peft_on_each_adapter_alone(
    family: str,
    expert_layout: str,
    unembedding: bool,
    is_sorted: bool,
    pays: bool,
    rows: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(AdapterIds, "pay", lambda self, *args, **options: pays)
    base = make_model(family)
    bank = AdapterBank(base)
    specs = [
        LoRASpec(rank=rank, expert_layout=expert_layout, unembedding=unembedding)
        for rank in (4, 2, 7)
    ]
    layouts = [plan_layout(base, spec) for spec in specs]
    adapters = [
        Adapter(layout, random_vector(layout, n), trains=True) for n, layout in enumerate(layouts)
    ]
    batches = [collate([[datum] for datum in make_datums(rows[n], seed=n)], 0) for n in range(3)]
    outputs = run_mixed(base, bank, [*adapters], batches, is_sorted=is_sorted)
    for spec, layout, adapter, batch, output in zip(
        specs, layouts, adapters, batches, outputs, strict=True
    ):
        alone = inject(make_model(family), spec)
        load_adapter_state(alone, layout.file_tensors(adapter.vector), source="the bank's")
        expected = compute_loss(alone, batch, CROSS_ENTROPY, all_positions=True)
        assert torch.allclose(output.logprobs, expected.logprobs, atol=1e-5)
        expected.loss_sum.backward()
        # so that the names and shapes of files are those of gradients too
        for parameter in alone.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.grad.clone()  # type: ignore[union-attr]
        theirs, ours = adapter_state(alone), file_gradients(adapter)
        assert ours.keys() == theirs.keys()
        distance = sum(float((ours[name] - theirs[name]).square().sum()) for name in ours)
        assert (
            distance**0.5
            < 1e-5 * sum(float(tensor.square().sum()) for tensor in theirs.values()) ** 0.5
        )


@SORTED
def test_rows_of_the_bare_base_beside_an_adapter_are_those_of_the_bare_base(
    is_sorted: bool,
) -> None:
    base, bare = make_model(), make_model()
    bank, layout = AdapterBank(base), plan_layout(base, LoRASpec(rank=4, unembedding=True))
    batches = [collate([[datum] for datum in make_datums(3, seed=n)], 0) for n in range(2)]
    outputs = run_mixed(
        base,
        bank,
        [Adapter(layout, random_vector(layout, 0), trains=True), None],
        batches,
        is_sorted=is_sorted,
    )
    expected = compute_loss(bare, batches[1], CROSS_ENTROPY, all_positions=True)
    assert torch.allclose(outputs[1].logprobs, expected.logprobs, atol=1e-5)
    assert not torch.allclose(
        outputs[0].logprobs,
        compute_loss(bare, batches[0], CROSS_ENTROPY, all_positions=True).logprobs,
        atol=1e-2,
    )


def test_tokens_in_any_order_have_their_own_adapter_sorted_or_behind_a_gate() -> None:
    base = make_model("llama")
    bank, layouts = (
        AdapterBank(base),
        [plan_layout(base, LoRASpec(rank=rank, alpha=3.0 * rank)) for rank in (4, 2)],
    )
    adapters = [
        Adapter(layouts[0], random_vector(layouts[0], 0)),
        None,
        Adapter(layouts[1], random_vector(layouts[1], 1)),
    ]
    linear, draw = base.model.layers[0].self_attn.q_proj, torch.Generator().manual_seed(0)
    x_TI = torch.randn(1, 40, linear.in_features, generator=draw)
    adapter_ids_T = torch.randint(0, 3, (40,), generator=draw)
    found = []
    for is_sorted in (False, True):
        with bank.active(AdapterBatch(adapters, adapter_ids_T, is_sorted=is_sorted)):
            found.append(linear(x_TI))
    assert torch.allclose(found[0], found[1], atol=1e-5)
    assert not torch.allclose(
        found[0][0, adapter_ids_T != 1], linear(x_TI)[0, adapter_ids_T != 1], atol=1e-2
    )


def make_gpt_oss() -> Any:
    torch.manual_seed(0)
    config = transformers.GptOssConfig(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        num_local_experts=4,
        num_experts_per_tok=2,
    )
    base = transformers.GptOssForCausalLM(config).eval().requires_grad_(False)
    for parameter in base.parameters():
        parameter.normal_(std=0.1)
    return base


@pytest.mark.parametrize("grouped", [False, True])
# the latter has biases, and gate and up interleaved
@pytest.mark.parametrize("family", ["qwen3_moe", "gpt_oss"])
def test_experts_rows_by_owner_equal_those_behind_a_gate(
    family: str, grouped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ExpertCall, "prefers_groups", grouped)
    base = make_model() if family == "qwen3_moe" else make_gpt_oss()
    bank, layouts = (
        AdapterBank(base),
        [plan_layout(base, LoRASpec(rank=rank, alpha=3.0 * rank)) for rank in (4, 8)],
    )
    adapters = [
        Adapter(layouts[0], random_vector(layouts[0], 0), trains=True),
        None,
        Adapter(layouts[1], random_vector(layouts[1], 1), trains=True),
    ]
    experts, draw = base.model.layers[0].mlp.experts, torch.Generator().manual_seed(0)
    width, num_experts = base.config.hidden_size, len(experts.down_proj)
    chosen_TK = torch.stack([torch.randperm(num_experts, generator=draw)[:2] for _ in range(40)])
    adapter_ids_T = torch.randint(0, 3, (40,), generator=draw)
    found = []
    for pays in (False, True):
        monkeypatch.setattr(AdapterIds, "pay", lambda self, *args, pays=pays, **options: pays)
        x_TH = torch.randn(40, width, generator=torch.Generator().manual_seed(1)).requires_grad_()
        weights_TK = torch.rand(40, 2, generator=torch.Generator().manual_seed(2)).requires_grad_()
        with bank.active(AdapterBatch(adapters, adapter_ids_T, is_sorted=True)):
            out_TH = experts(x_TH, chosen_TK, weights_TK)
        leaves = [
            leaf
            for x in adapters
            if x is not None
            for key, pair in x.factors.items()
            if "layers.0" in key.module and "experts" in key.module
            for leaf in pair
        ]
        found.append(
            [out_TH, *torch.autograd.grad(out_TH.square().sum(), [x_TH, weights_TK, *leaves])]
        )
    assert len(found[0]) == 3 + 2 * 2 * 2
    for gated, owned in zip(*found, strict=True):
        assert torch.allclose(gated, owned, atol=1e-5 * float(gated.detach().abs().max()))


def test_an_adapter_has_the_same_scale_in_company_as_alone_in_16_bit() -> None:
    base = make_model("llama")
    layouts = [
        plan_layout(base, LoRASpec(rank=6, alpha=8.0)),
        plan_layout(base, LoRASpec(rank=2, alpha=2.0)),
    ]
    one, two = (Adapter(layout, random_vector(layout, n)) for n, layout in enumerate(layouts))
    key = next(iter(one.factors))
    adapter_ids_T = torch.tensor([0, 1, 0])
    found = AdapterBatch([one, two], adapter_ids_T).pair(key, torch.bfloat16)
    assert found is not None and isinstance(found[2], torch.Tensor)
    assert found[2].tolist() == [
        [1.0] * 6 + [0.0] * 2,
        [0.0] * 6 + [1.0] * 2,
        [1.0] * 6 + [0.0] * 2,
    ]
    assert torch.equal(found[1][:, :6], (one.factors[key][1] * (8 / 6)).bfloat16())
    stacked = AdapterBatch([one, two], adapter_ids_T, is_sorted=True).stacked(key, torch.bfloat16)
    assert stacked is not None and torch.equal(
        stacked.b_nOR[0], (one.factors[key][1] * (8 / 6)).bfloat16()
    )


def test_the_base_gains_no_parameter_and_no_gradient() -> None:
    base = make_model()
    names = [name for name, _ in base.named_parameters()]
    bank, layout = AdapterBank(base), plan_layout(base, LoRASpec(rank=4))
    batch = collate([[datum] for datum in make_datums(3)], 0)
    run_mixed(
        base,
        bank,
        [Adapter(layout, random_vector(layout, n), trains=True) for n in range(2)],
        [batch, batch],
    )
    assert [name for name, _ in base.named_parameters()] == names
    assert all(parameter.grad is None for parameter in base.parameters())


@pytest.mark.parametrize("expert_layout", ["per_expert", "shared_outer"])
def test_a_vector_survives_files(expert_layout: str) -> None:
    layout = plan_layout(
        make_model(), LoRASpec(rank=3, expert_layout=expert_layout, unembedding=True)
    )
    vector = random_vector(layout, 0)
    assert torch.equal(
        layout.from_file_tensors(layout.file_tensors(vector), source="a file"), vector
    )


def test_files_that_do_not_fit_are_refused_with_every_difference() -> None:
    layout = plan_layout(make_model("qwen3"), LoRASpec(rank=3))
    tensors = layout.file_tensors(random_vector(layout, 0))
    lost, *_ = tensors
    tensors["base_model.model.elsewhere.lora_A.weight"] = tensors.pop(lost)
    name = next(name for name in tensors if "q_proj.lora_B" in name)
    tensors[name] = tensors[name][:-1]
    with pytest.raises(AdapterError) as caught:
        layout.from_file_tensors(tensors, source="there")
    for part in ("not in the plan: base_model.model.elsewhere", "missing:", "has shape"):
        assert part in str(caught.value)


def test_a_new_adapter_changes_nothing_and_the_same_seed_draws_the_same() -> None:
    base = make_model()
    layout = plan_layout(base, LoRASpec(rank=4))
    first, again, other = layout.draw(3), layout.draw(3), layout.draw(4)
    assert torch.equal(first, again) and not torch.equal(first, other)
    for a, b in layout.views(first).values():
        assert not b.any() and 0 < float(a.abs().max()) <= a.shape[-1] ** -0.5


def test_what_the_bank_cannot_serve_is_an_error() -> None:
    with pytest.raises(ConfigError, match="DoRA"):
        plan_layout(make_model("qwen3"), LoRASpec(rank=4, dora=True))
