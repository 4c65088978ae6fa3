"""Passes that are replayed give the same bits as passes that are run, whatever changes between
them.
"""

from __future__ import annotations

import gc
import random
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from test_sampler import OPEN, Text, prompts_of, run
from tiny_models import make_model

from lorakit.lora.adapter_batch import Adapter
from lorakit.lora.bank import AdapterBank
from lorakit.lora.flat_parameters import plan_layout
from lorakit.lora.inject import inject
from lorakit.lora.spec import LoRASpec
from lorakit.model.attention import attend_by_document
from lorakit.sampling import cache
from lorakit.sampling import traced_step as replay
from lorakit.sampling.request import Request
from lorakit.sampling.sampler import Sampler
from lorakit.types import SampleResponse

FAMILIES = ("llama", "qwen3", "qwen3_moe", "mistral")  # the last has a window


def samplers(
    model: Any, bank: AdapterBank | None = None, **options: Any
) -> tuple[Sampler, Sampler]:
    """One that replays, and one that does not."""
    plain = Sampler(model, Text(), bank=bank, **options)
    plain.passes.traced_step.records = False
    return Sampler(model, Text(), bank=bank, **options), plain


def made(family: str) -> Any:
    model = make_model(family)
    model.generation_config.eos_token_id = None
    assert attend_by_document(model) is None
    return model


def adapter_of(model: Any, rank: int, seed: int, **options: Any) -> Adapter:
    layout = plan_layout(model, LoRASpec(rank=rank, **options))
    return Adapter(
        layout, torch.randn(layout.num_params, generator=torch.Generator().manual_seed(seed)) * 0.05
    )


def bits(answers: list[SampleResponse]) -> list[Any]:
    return [(sample.tokens, sample.logprobs) for answer in answers for sample in answer.sequences]


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("has_adapters", [False, True])
def test_replayed_passes_give_the_same_bits(
    family: str, has_adapters: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "RUN_COST_BYTES", 4096)  # rows in several runs, too
    model = made(family)
    adapters: list[Any] = [None]
    if has_adapters:
        adapters += [adapter_of(model, 4, 1), adapter_of(model, 8, 2), adapter_of(model, 4, 3)]
    draw, prompts = random.Random(0), prompts_of(30, longest=40)
    asked = [
        Request(
            p,
            replace(OPEN, max_tokens=draw.randint(1, 60), seed=n),
            adapter=draw.choice(adapters),
            num_samples=1 + n % 2,
        )
        for n, p in enumerate(prompts)
    ]
    replaying, plain = samplers(model, AdapterBank(model) if has_adapters else None, max_rows=12)
    found = [
        bits(run(sampler, [replace(one) for one in asked], at_a_time=2))
        for sampler in (replaying, plain)
    ]
    assert found[0] == found[1]
    assert (
        replaying.passes.traced_step.num_replayed > 20
        and plain.passes.traced_step.num_replayed == 0
    )


@pytest.mark.parametrize("layout", ["per_expert", "shared_outer"])
def test_another_adapter_of_the_same_shape_has_its_own_numbers_in_a_replay(layout: Any) -> None:
    model = made("qwen3_moe")
    adapters = [
        adapter_of(model, 4, seed, unembedding=True, expert_layout=layout) for seed in range(3)
    ]
    replaying, plain = samplers(model, AdapterBank(model))
    for adapter in adapters:
        found = []
        for sampler in (replaying, plain):
            before = sampler.passes.traced_step.num_replayed
            found.append(
                bits(
                    run(
                        sampler,
                        [
                            Request(
                                [5, 6, 7],
                                replace(OPEN, max_tokens=40),
                                adapter=adapter,
                                num_samples=3,
                            )
                        ],
                    )
                )
            )
        assert found[0] == found[1]
        assert replaying.passes.traced_step.num_replayed > before
    assert len(replaying.passes.traced_step._recordings) == 1


def test_trained_weights_are_replayed_as_they_are_then_and_stay_trainable() -> None:
    model = made("llama")
    inject(model, LoRASpec(rank=4))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    replaying, plain = samplers(model)
    request = Request([5, 6, 7], replace(OPEN, max_tokens=40), num_samples=2)
    for step in range(2):
        assert bits(run(replaying, [replace(request)])) == bits(run(plain, [replace(request)]))
        with torch.no_grad():
            for parameter in trained:
                parameter.add_(0.05 * (step + 1))
    assert replaying.passes.traced_step.num_replayed > 0
    assert trained and all(parameter.requires_grad for parameter in trained)


def test_what_python_decides_by_numbers_is_not_recorded() -> None:
    model = made("llama")
    layer, num_seen = model.model.layers[0], []

    def shift(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
        num_seen.append(int((output > 0).sum()))  # a recording would hold this number for good
        return output * (1 + 0.01 * (num_seen[-1] % 2))

    layer.mlp.register_forward_hook(shift)
    replaying, plain = samplers(model)
    asked = [Request([5, 6, 7], replace(OPEN, max_tokens=40), num_samples=2)]
    assert bits(run(replaying, list(asked))) == bits(run(plain, [replace(asked[0])]))
    assert replaying.passes.traced_step.num_replayed == 0 and list(
        replaying.passes.traced_step._recordings.values()
    ) == [None]


def test_what_torch_does_not_warn_of_is_found_by_comparing(monkeypatch: pytest.MonkeyPatch) -> None:
    # another thread has put the filters of warnings back
    monkeypatch.setattr(replay.torch.jit, "TracerWarning", KeyError)
    model, steps = made("llama"), iter(range(10_000))
    model.model.layers[0].mlp.register_forward_hook(
        lambda module, args, output: output * (1 + 0.01 * (next(steps) % 2))
    )
    replaying, _ = samplers(model)
    run(replaying, [Request([5, 6, 7], replace(OPEN, max_tokens=40), num_samples=2)])
    assert replaying.passes.traced_step.num_replayed == 0 and list(
        replaying.passes.traced_step._recordings.values()
    ) == [None]


def test_a_recording_holds_neither_adapters_nor_the_base() -> None:
    model = made("llama")
    bank, adapter = AdapterBank(model), adapter_of(model, 4, 1)
    sampler = Sampler(model, Text(), bank=bank)
    run(sampler, [Request([5, 6, 7], replace(OPEN, max_tokens=60), adapter=adapter)])
    assert sampler.passes.traced_step.num_replayed > 0
    of_adapter, of_base = (
        weakref.ref(adapter),
        weakref.ref(model.model.layers[0].mlp.gate_proj.weight),
    )
    del adapter
    gc.collect()
    assert of_adapter() is None
    del sampler, bank, model
    gc.collect()
    assert of_base() is None


def test_a_recording_that_differs_for_other_rows_is_dropped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, record = made("llama"), replay._record

    def for_these_rows_alone(*args: Any) -> Any:
        recording = record(*args)
        assert recording is not None
        function, rows = recording.function, recording.made_with
        recording.function = lambda tokens, *more: function(
            (tokens + (len(tokens) != rows)) % 64, *more
        )  # writes into the cache, too
        return recording

    monkeypatch.setattr(replay, "_record", for_these_rows_alone)
    replaying, plain = samplers(model)
    asked = [
        Request([5, 6, 7 + n], replace(OPEN, max_tokens=30 + 20 * n, seed=n)) for n in range(3)
    ]
    found = [bits(run(sampler, [replace(one) for one in asked])) for sampler in (replaying, plain)]
    assert found[0] == found[1]
    assert 0 < replaying.passes.traced_step.num_replayed < 12 and list(
        replaying.passes.traced_step._recordings.values()
    ) == [None]
